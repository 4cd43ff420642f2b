"""Fewer threads beside a busy neighbour, all of them again when it is gone; by made readings, and in a model."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from swapless.runtime.crowd import HOLD_S, LATE, WINDOW_S, Crowd, Reading, System
from swapless.runtime.kernels_threads import Before, limit_here, restore_here, threads_here


class Made:
    """A machine of two cores: what a step takes by threads and neighbours, and what the system says of it."""

    def __init__(self, threads: int = 2) -> None:
        self.threads, self.neighbours = threads, 0
        self.now_s = self.waited_s = self.readers_s = self.idle_s = 0.0
        self.reads_s = 0.0
        self.deaf, self.decode = False, True

    def __call__(self) -> Reading | None:
        return None if self.deaf else Reading(self.now_s, self.waited_s, self.readers_s, self.idle_s)

    def step_s(self, used: int) -> float:
        alone = 0.1 / used
        if self.neighbours and used > 1:
            return alone * 9  # they wait for each other
        return alone * max(1.0, (used + self.neighbours) / 2)

    def step(self, crowd: Crowd) -> int:
        used = min(crowd.limit or self.threads, self.threads)
        seconds = self.step_s(used)
        crowd.begin()
        wanted = used + self.neighbours
        self.now_s += seconds
        self.waited_s += seconds * max(0.0, wanted - 2) * used / wanted + self.reads_s * seconds
        self.readers_s += self.reads_s * seconds
        self.idle_s += seconds * max(0, 2 - wanted)
        crowd.step_done(seconds, decode=self.decode)
        crowd.leave()
        return used


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swapless.runtime.crowd.threads_here", lambda: 2)
    monkeypatch.setattr("swapless.runtime.crowd.limit_here", lambda count: Before(2, 0))
    monkeypatch.setattr("swapless.runtime.crowd.restore_here", lambda before: None)


def test_a_child_of_a_fork_amid_a_call_with_fewer_threads_gets_none_back() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        crowd = Crowd(Made())
        crowd.limit = 1
        crowd.begin()
        crowd.begin_child()
        torch.set_num_threads(1)
        crowd.leave()
        crowd.begin()
        assert threads_here() == 1
        crowd.leave()
        assert threads_here() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_alone_nothing_is_ever_tried() -> None:
    machine = Made()
    crowd = Crowd(machine, lambda: machine.now_s)
    assert {machine.step(crowd) for _ in range(2000)} == {2}


@pytest.mark.usefixtures("two_threads")
def test_beside_a_neighbour_one_thread_is_used_and_afterwards_all() -> None:
    machine = Made()
    crowd = Crowd(machine, lambda: machine.now_s)
    for _ in range(20):
        machine.step(crowd)
    machine.neighbours = 1
    used = [machine.step(crowd) for _ in range(200)]
    assert used[:10].count(1) >= 5 and set(used[10:]) == {1}, "a few steps show it"
    machine.neighbours = 0
    used = [machine.step(crowd) for _ in range(60)]
    assert used[0] == 1 and set(used[20:]) == {2}


@pytest.mark.usefixtures("two_threads")
def test_where_fewer_are_no_faster_it_goes_back_and_asks_ever_more_seldom() -> None:
    machine = Made()
    machine.step_s = lambda used: 0.1 / used  # type: ignore[method-assign]
    machine.neighbours = 1
    crowd = Crowd(machine, lambda: machine.now_s)
    used = [machine.step(crowd) for _ in range(4000)]
    assert used[-1000:].count(1) < 20 and used.count(1) < 60


@pytest.mark.usefixtures("two_threads")
def test_our_own_readers_are_no_neighbour() -> None:
    machine = Made()
    machine.reads_s = 0.8
    crowd = Crowd(machine, lambda: machine.now_s)
    assert {machine.step(crowd) for _ in range(500)} == {2}


@pytest.mark.usefixtures("two_threads")
def test_a_system_that_says_nothing_changes_nothing() -> None:
    machine = Made()
    machine.deaf, machine.neighbours = True, 1
    crowd = Crowd(machine, lambda: machine.now_s)
    assert {machine.step(crowd) for _ in range(50)} == {2}


@pytest.mark.usefixtures("two_threads")
def test_what_happened_between_two_texts_is_no_sign() -> None:
    machine = Made()
    crowd = Crowd(machine, lambda: machine.now_s)
    for _ in range(20):
        machine.step(crowd)
    machine.now_s += 600
    machine.waited_s += 600
    assert {machine.step(crowd) for _ in range(50)} == {2}
    assert LATE < 1 and WINDOW_S < HOLD_S


@pytest.mark.usefixtures("two_threads")
def test_prompts_are_computed_with_fewer_threads_too() -> None:
    machine = Made()
    machine.decode = False
    crowd = Crowd(machine, lambda: machine.now_s)
    for _ in range(20):
        machine.step(crowd)
    machine.neighbours = 1
    assert {machine.step(crowd) for _ in range(40)} == {1, 2}
    assert {machine.step(crowd) for _ in range(40)} == {1}
    machine.neighbours = 0
    assert [machine.step(crowd) for _ in range(40)][-1] == 2


# -- threads of one thread -------------------------------------------------------------------------------------------------


def test_only_the_thread_that_asks_is_limited() -> None:
    torch.set_num_threads(2)
    seen: list[int] = []
    before = limit_here(1)
    try:
        assert threads_here() == 1
        other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert seen == [2]
    finally:
        restore_here(before)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert torch.get_num_threads() == 1


def test_the_counters_of_the_system() -> None:
    if not Path("/proc/self/schedstat").exists():
        pytest.skip("no counters of the scheduler here")
    system = System(lambda: [threading.get_native_id()])
    first = system()
    sum(range(2_000_000))
    second = system()
    assert first is not None and second is not None
    assert second.now_s > first.now_s and second.readers_s > first.readers_s
    assert second.waited_s >= first.waited_s and second.idle_s >= first.idle_s


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_a_model_computes_decode_steps_so_and_leaves_the_thread_as_it_was(
    error: type[BaseException] | None, olmoe: Path, load: Any, generate: Any, prompt: Any
) -> None:
    torch.set_num_threads(2)
    model, seen = load(olmoe), []
    model.swapless._crowd.limit = 1

    def look(*_: Any) -> None:
        seen.append(torch.get_num_threads())
        if error is not None and len(seen) == 3:
            raise error

    model.lm_head.register_forward_pre_hook(look)
    if error is None:
        generate(model, prompt, 4)
    else:
        with pytest.raises(error):
            generate(model, prompt, 4)
    assert seen[:3] == [1, 1, 1]
    assert torch.get_num_threads() == 2
