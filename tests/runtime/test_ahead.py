"""Reading ahead changes no bit and no hit; it only moves reads, counts each of them, and stops where it does not pay."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from swapless.errors import BudgetError, ReadError, UnsupportedOperationError, UsageError
from swapless.runtime.ahead import Governor, ReadAhead
from swapless.runtime.loader import PREFETCH, Loader
from swapless.runtime.lookahead import LastChoice
from swapless.runtime.routers import near_experts
from tests.runtime.conftest import SHAPE
from tests.runtime.slots import assert_no_slot_lies

TOKENS = 40


def always_on(model: Any) -> None:
    model.swapless._fetcher.prefetcher._governor.token_done = lambda seconds: None


EVERY_TIME = {(3, "gate", "lru"), (12, "gate:2", "lru")}


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("slots", "prefetch", "policy"),
    [
        pytest.param(*case, marks=() if case in EVERY_TIME else pytest.mark.slow)
        for case in product((3, 12), ("gate", "gate:2"), ("lru", "lfu"))
    ],
)
def test_same_tokens_and_same_hits(
    qwen3_moe: Path, load: Any, generate: Any, prompt: Any, eager: Any, prefetch: str, policy: str, slots: int
) -> None:
    share = slots / (SHAPE.num_moe_layers * SHAPE.num_experts)
    plain = eager(qwen3_moe)
    without = load(qwen3_moe, resident=share, policy=policy)
    ahead = load(qwen3_moe, resident=share, policy=policy, prefetch=prefetch)
    always_on(ahead)
    for model in (without, ahead):
        assert torch.equal(generate(model, prompt, TOKENS), generate(plain, prompt, TOKENS))
    figures, before = ahead.swapless.stats(), without.swapless.stats()
    assert (figures.requests, figures.hits) == (before.requests, before.hits)
    assert figures.prefetch_useful + figures.prefetch_late > 0
    assert figures.prefetch_useful + figures.prefetch_late + figures.prefetch_wasted <= figures.prefetch_reads
    assert figures.bytes_read == figures.reads * SHAPE.expert_bytes
    misses = figures.requests - figures.hits
    demanded = figures.decode_reads - figures.prefetch_useful - figures.prefetch_late - figures.prefetch_wasted
    assert misses - figures.prefetch_useful - figures.prefetch_late <= demanded <= misses
    assert figures.prefetch_recall.keys() == set(range(1, 1 + (2 if prefetch == "gate:2" else 1)))
    assert_no_slot_lies(ahead, plain)


def test_recall_is_that_of_the_next_router_on_this_input_and_of_the_tokens_last_choice(
    qwen3_moe: Path, load: Any, prompt: Any, eager: Any
) -> None:
    model = load(qwen3_moe, prefetch="gate")
    always_on(model)
    inputs: dict[int, torch.Tensor] = {}
    plain = eager(qwen3_moe)
    layers = plain.model.layers
    chosen: dict[int, set[int]] = {}
    choices: list[set[int]] = []
    for moe_layer, block in enumerate(layers):

        def keep(module: Any, args: Any, output: Any, moe_layer: int = moe_layer) -> None:
            inputs[moe_layer], chosen[moe_layer] = args[0], set(output[-1].flatten().tolist())
            if moe_layer == 0:
                choices.extend(map(set, output[-1].tolist()))

        block.mlp.gate.register_forward_hook(keep)
    with torch.no_grad():
        cache = model(prompt).past_key_values
        plain_cache = plain(prompt).past_key_values
        last = dict(zip(prompt[0].tolist(), choices, strict=True))
        right = asked = 0
        for token in (*range(3, 23), *range(3, 23)):
            one = torch.tensor([[token]])
            cache = model(one, past_key_values=cache).past_key_values
            plain_cache = plain(one, past_key_values=plain_cache).past_key_values
            if token in last:
                right += len(chosen[0].intersection(last[token]))
                asked += len(chosen[0])
            last[token] = chosen[0]
            for later in range(1, SHAPE.num_moe_layers):
                foreseen = layers[later].mlp.gate.forward(inputs[later - 1])[-1].flatten().tolist()
                right += len(chosen[later].intersection(foreseen))
                asked += len(chosen[later])
    assert model.swapless.stats().prefetch_recall == {1: right / asked}


def test_the_last_choices_of_some_tokens_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LastChoice, "MOST_TOKENS", 3)
    last = LastChoice()
    last.note(np.array([7, 8, 7]), np.array([[1, 2], [3, 4], [5, 2]]))
    assert last.of(np.array([7])) == [5, 2] and last.of(np.array([9])) == []
    assert last.of(np.array([8, 7, 8, 9])) == [3, 4, 2, 5], "those of most tokens first"
    last.note(np.array([1, 8, 2]), np.array([[9, 9], [6, 6], [0, 1]]))
    assert last.of(np.array([7])) == [] and last.of(np.array([8])) == [6, 6], "the one not seen for longest is forgotten"
    last.note(np.arange(100), np.arange(200).reshape(100, 2))
    assert last.of(np.array([99])) == [198, 199] and last.of(np.array([96])) == []


def test_a_batch_reads_ahead_too(olmoe: Path, load: Any, generate: Any, eager: Any) -> None:
    ids = torch.randint(3, SHAPE.vocabulary, (3, 9), generator=torch.Generator().manual_seed(8))
    model = load(olmoe, prefetch="gate")
    always_on(model)
    assert torch.equal(generate(model, ids, 12), generate(eager(olmoe), ids, 12))
    assert model.swapless.stats().prefetch_reads > 0
    assert_no_slot_lies(model, eager(olmoe))


def test_everything_resident_needs_no_room_beside(olmoe: Path, load: Any, generate: Any, prompt: Any) -> None:
    model = load(olmoe, resident=1.0, prefetch="gate")
    generate(model, prompt)
    assert model.swapless.budget.ahead_slots == 0
    assert model.swapless.stats().prefetch_reads == 0


@pytest.mark.few(1)
@pytest.mark.parametrize(("slots", "asked"), [(2, False), (16, True)])
def test_left_to_the_budget_it_needs_no_more_memory(
    olmoe: Path, load: Any, generate: Any, prompt: Any, eager: Any, slots: int, asked: bool
) -> None:
    share = slots / (SHAPE.num_moe_layers * SHAPE.num_experts)
    model = load(olmoe, resident=share, prefetch="auto")
    assert torch.equal(generate(model, prompt), generate(eager(olmoe), prompt))
    assert (model.swapless.budget.ahead_slots > 0) == asked == bool(model.swapless.stats().prefetch_recall)
    assert model.swapless.budget.floor_bytes < load(olmoe, resident=share, prefetch="gate").swapless.budget.floor_bytes


def test_a_router_that_cannot_be_asked_is_an_error_only_where_it_must_be(
    olmoe: Path, load: Any, generate: Any, prompt: Any, eager: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "swapless.runtime.lookahead.near_experts", lambda model: [modules[-1:] for modules in near_experts(model)]
    )
    share = 16 / (SHAPE.num_moe_layers * SHAPE.num_experts)
    with pytest.raises(UnsupportedOperationError, match="cannot be asked ahead"):
        generate(load(olmoe, resident=share, prefetch="gate"), prompt)
    model = load(olmoe, resident=share, prefetch="auto")
    assert torch.equal(generate(model, prompt), generate(eager(olmoe), prompt))
    assert model.swapless.stats().prefetch_reads == 0


def test_the_room_beside_is_in_the_budget(olmoe: Path, load: Any) -> None:
    without, ahead = load(olmoe, resident=0.25), load(olmoe, resident=0.25, prefetch="gate:2")
    room = 2 * SHAPE.top_k * ahead.swapless.budget.slot_bytes
    assert ahead.swapless.budget.parts["ahead"] == room
    assert ahead.swapless.budget.slots == without.swapless.budget.slots
    with pytest.raises(BudgetError, match="at least"):
        load(olmoe, memory=ahead.swapless.budget.floor_bytes // 2, prefetch="gate:2")


@pytest.mark.parametrize("wrong", ["gates", "gate:0", "gate:x", ""])
def test_an_unknown_prefetch_is_refused(olmoe: Path, load: Any, wrong: str) -> None:
    with pytest.raises(UsageError, match="prefetch"):
        load(olmoe, prefetch=wrong)


def test_after_an_error_it_goes_on(own_olmoe: Path, load: Any, generate: Any, prompt: Any, eager: Any) -> None:
    plain = eager(own_olmoe)
    expected = generate(plain, prompt, TOKENS)
    model = load(own_olmoe, prefetch="gate")
    always_on(model)
    work = model.swapless._fetcher._loader._work
    read_part, left = work._read_part, [60]

    def fail_once(*args: Any) -> int:
        left[0] -= 1
        if left[0] == 0:
            raise OSError("the disk is gone for a moment")
        return int(read_part(*args))

    work._read_part = fail_once
    try:
        generate(model, prompt, TOKENS)
    except ReadError:
        assert_no_slot_lies(model, plain)
    assert left[0] < 0, "the error was never met"
    assert torch.equal(generate(model, prompt, TOKENS), expected)
    assert_no_slot_lies(model, plain)


# -- reads alone -----------------------------------------------------------------------------------------------------------


class Gate:
    """Reads that wait until they may go on, and the order in which they ran."""

    def __init__(self) -> None:
        self.order: list[int] = []
        self.opened = threading.Event()
        self.begun = threading.Event()

    def read(self, moe_layer: int, expert: int, part: int, slot: np.ndarray, bounce: np.ndarray) -> int:
        self.begun.set()
        assert self.opened.wait(20)
        self.order.append(expert)
        return 1


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def loader(gate: Gate) -> Any:
    made = Loader(gate.read, lambda *_: 1, lambda slot: np.zeros(1, np.uint8), lambda: np.zeros(1, np.uint8), 1)
    yield made
    gate.opened.set()
    made.close()


def test_demand_reads_go_first_and_a_hurried_one_is_a_demand_read(gate: Gate, loader: Loader) -> None:
    loader.submit(0, 9, 0)
    assert gate.begun.wait(20)
    first, second = loader.submit(1, 1, 1, PREFETCH), loader.submit(1, 2, 2, PREFETCH)
    loader.submit(0, 5, 3)
    loader.hurry(second)
    gate.opened.set()
    assert [loader.next().expert for _ in range(4)] == [9, 5, 2, 1]
    assert gate.order == [9, 5, 2, 1], "a hurried read ran twice"
    assert not loader.call_off(first), "it has been read"
    assert loader.outstanding == 0


def test_what_is_called_off_never_runs(gate: Gate, loader: Loader) -> None:
    begun = loader.submit(0, 9, 0)
    assert gate.begun.wait(20)
    waiting = loader.submit(1, 1, 1, PREFETCH)
    assert loader.call_off(waiting)
    assert not loader.call_off(begun)
    assert loader.outstanding == 1
    gate.opened.set()
    assert loader.next().expert == 9
    loader.submit(0, 4, 0)
    assert loader.next().expert == 4
    assert gate.order == [9, 4]


def landings(loader: Loader, ahead: ReadAhead) -> Callable[[int], list[bool]]:
    return lambda n: [ahead.landed(loader.next()) for _ in range(n)]


def test_useful_late_and_wasted(gate: Gate, loader: Loader) -> None:
    ahead = ReadAhead(loader, [10, 11, 12])
    land = landings(loader, ahead)
    gate.opened.set()
    ahead.fetch(1, [4, 5, 4])
    assert ahead.reads == 2, "one read an expert"
    assert land(2) == [True, True]
    block, awaited = ahead.take(1, 4)
    assert block in (10, 11, 12) and not awaited
    ahead.give(7)
    ahead.pass_by(1)
    assert (ahead.useful, ahead.wasted, ahead.late) == (1, 1, 0)
    ahead.fetch(2, [0, 1, 2, 3])
    assert ahead.reads == 5, "there are three blocks"
    assert land(3) == [True] * 3

    gate.opened.clear()
    gate.begun.clear()
    ahead.pass_by()
    ahead.fetch(3, [6, 7])
    assert gate.begun.wait(20)
    assert ahead.take(3, 6) == (None, True)
    assert ahead.take(3, 7) == (None, False), "not begun: the caller reads it itself"
    gate.opened.set()
    assert land(1) == [False], "it is awaited"
    assert (ahead.useful, ahead.wasted, ahead.late, ahead.reads) == (1, 4, 1, 6)


def test_a_read_gone_past_frees_its_block_when_it_lands(gate: Gate, loader: Loader) -> None:
    ahead = ReadAhead(loader, [10])
    ahead.fetch(1, [4])
    assert gate.begun.wait(20)
    ahead.pass_by(1)
    ahead.fetch(2, [5])
    assert ahead.reads == 1, "the block is not free yet"
    gate.opened.set()
    assert landings(loader, ahead)(1) == [True]
    assert ahead.wasted == 1
    ahead.fetch(2, [5])
    assert landings(loader, ahead)(1) == [True]
    assert ahead.take(2, 5) == (10, False)


def warmed() -> Governor:
    governor = Governor()
    for _ in range(Governor.FIRST_TOKENS):
        assert governor.on
        governor.token_done(100.0)  # of no account
    return governor


@pytest.mark.parametrize(("with_it", "stays"), [(0.98, True), (1.02, False)])
def test_a_cache_that_still_fills_does_not_decide(with_it: float, stays: bool) -> None:
    governor = warmed()
    for token in range(len(Governor.TRIAL) * Governor.WINDOW_TOKENS):
        governor.token_done((5 - 0.1 * token) * (with_it if governor.on else 1.0))
    assert governor.on is stays


@pytest.mark.parametrize(("with_it", "without", "stays"), [(1.0, 2.0, True), (2.0, 1.0, False), (1.0, 1.0, False)])
def test_the_governor_keeps_what_pays(with_it: float, without: float, stays: bool) -> None:
    governor = warmed()
    for _ in range(2):
        tried = []
        for _ in range(len(Governor.TRIAL) * Governor.WINDOW_TOKENS):
            tried.append(governor.on)
            governor.token_done(with_it if governor.on else without)
        assert tried.count(True) == tried.count(False)
        for _ in range(Governor.HOLD_TOKENS):
            assert governor.on is stays
            governor.token_done(1.0)
        assert governor.on, "a new trial begins with it on"
