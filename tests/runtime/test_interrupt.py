"""Errors and Ctrl-C in the middle: nothing hangs, no thread stays, no slot lies, and what can go on goes on."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

import swapless
from swapless.errors import ClosedError, ReadError
from tests.runtime.slots import assert_no_slot_lies, resident

SHARDS = "*.safetensors"


class AtToken(BaseStreamer):
    """Calls ``action`` once, when ``generate`` hands out its ``number``-th piece (the prompt is the first)."""

    def __init__(self, number: int, action: Callable[[], object]) -> None:
        self._left = number
        self._action = action

    def put(self, value: Any) -> None:
        self._left -= 1
        if self._left == 0:
            self._action()

    def end(self) -> None: ...


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("swapless-read")]


@pytest.fixture
def expected(olmoe: Path, eager: Any, generate: Any, prompt: Any) -> Any:
    """What the whole model says, undisturbed."""
    return generate(eager(olmoe), prompt, 10)


def truncate_all(folder: Path) -> None:
    for shard in folder.glob(SHARDS):
        os.truncate(shard, shard.stat().st_size // 2)


def unlink_all(folder: Path) -> None:
    for shard in folder.glob(SHARDS):
        shard.unlink()


def replace_all(folder: Path) -> None:
    for shard in folder.glob(SHARDS):
        other = shard.with_suffix(".new")
        other.write_bytes(shard.read_bytes())
        other.replace(shard)


@pytest.mark.few(2)
@pytest.mark.parametrize("harm", [truncate_all, unlink_all, replace_all])
@pytest.mark.parametrize("at", [1, 3])
def test_a_shard_harmed_while_generating(
    harm: Callable[[Path], None],
    at: int,
    own_olmoe: Path,
    olmoe: Path,
    load: Any,
    eager: Any,
    generate: Any,
    prompt: Any,
    expected: Any,
) -> None:
    plain, before = eager(olmoe), len(readers())
    model = load(own_olmoe, resident=0.125)
    with pytest.raises(ReadError, match="Restore the file"):
        generate(model, prompt, 10, streamer=AtToken(at, lambda: harm(own_olmoe)))
    assert_no_slot_lies(model, plain)
    with pytest.raises(ReadError):
        generate(model, prompt, 10)
    assert_no_slot_lies(model, plain)
    assert len(readers()) > before
    model.swapless.close()
    assert len(readers()) == before
    for shard in olmoe.glob(SHARDS):
        (own_olmoe / shard.name).write_bytes(shard.read_bytes())
    assert torch.equal(generate(load(own_olmoe, resident=0.125), prompt, 10), expected)


def test_a_file_put_back_as_it_was_is_read_again(
    own_olmoe: Path, olmoe: Path, load: Any, generate: Any, prompt: Any, expected: Any
) -> None:
    times = {shard.name: shard.stat().st_mtime_ns for shard in own_olmoe.glob(SHARDS)}
    model = load(own_olmoe, resident=0.125)
    with pytest.raises(ReadError, match="truncated"):
        generate(model, prompt, 10, streamer=AtToken(3, lambda: truncate_all(own_olmoe)))
    for name, changed_ns in times.items():
        with open(own_olmoe / name, "r+b") as file:  # the same inode: the model has it open
            file.write((olmoe / name).read_bytes())
        os.utime(own_olmoe / name, ns=(changed_ns, changed_ns))
    assert torch.equal(generate(model, prompt, 10), expected)


def test_ctrl_c_between_tokens(olmoe: Path, load: Any, eager: Any, generate: Any, prompt: Any, expected: Any) -> None:
    before = len(readers())
    model = load(olmoe, resident=0.25)
    with pytest.raises(KeyboardInterrupt):
        generate(model, prompt, 10, streamer=AtToken(4, lambda: signal.raise_signal(signal.SIGINT)))
    assert_no_slot_lies(model, eager(olmoe))
    assert torch.equal(generate(model, prompt, 10), expected)
    model.swapless.close()
    assert len(readers()) == before


@contextmanager
def interrupt_at_line(number: int, files: set[str]) -> Iterator[list[str]]:
    """Raise KeyboardInterrupt before the ``number``-th line that runs in one of ``files``: what a signal handler does.

    Yields a list that holds the place once it was reached.
    """
    left, place = number, []

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in files:
            return None
        if event == "line" and not place:
            left -= 1
            if left == 0:
                place.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield place
    finally:
        sys.settrace(before)


def interruptible() -> set[str]:
    """The files that run between a forward call's beginning and its end on the computation's thread."""
    from swapless.cache import serve
    from swapless.runtime import compute, engine, loader, pool

    return {str(module.__file__) for module in (compute, engine, loader, pool, serve)}


@pytest.mark.few(1)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_ctrl_c_at_any_line_leaves_no_slot_that_lies(phase: str, olmoe: Path, load: Any, eager: Any, prompt: Any) -> None:
    model, plain, files = load(olmoe, resident=0.25), eager(olmoe), interruptible()
    lied: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    number, reached = 1, True
    with torch.no_grad():
        while reached:
            ids = torch.randint(3, 128, (1, 9 if phase == "prefill" else 1), generator=generator)
            past = model(input_ids=prompt[:, :3], use_cache=True).past_key_values if phase == "decode" else None
            with interrupt_at_line(number, files) as place:
                try:
                    model(input_ids=ids, past_key_values=past, use_cache=True)
                except KeyboardInterrupt:
                    assert place
            reached = bool(place)
            try:
                assert_no_slot_lies(model, plain)
            except AssertionError as error:
                lied[place[0] if place else "nowhere"] = str(error).splitlines()[0]
                model.swapless._cache.reset()
            number += 7
    assert number > 100, "hardly a line was ever interrupted"
    assert not lied
    assert resident(model)


def test_a_closed_model_says_so(olmoe: Path, load: Any, generate: Any, prompt: Any) -> None:
    model = load(olmoe)
    generate(model, prompt, 3)
    stats = model.swapless.stats()
    model.swapless.close()
    model.swapless.close()
    with pytest.raises(ClosedError, match="closed"):
        model(input_ids=prompt)
    with pytest.raises(ClosedError):
        generate(model, prompt, 3)
    after = model.swapless.stats()
    assert (after.requests, after.hits, after.reads) == (stats.requests, stats.hits, stats.reads), "figures outlive the model"
    assert len(model.swapless.trace()) == prompt.shape[1] + 2


def test_the_context_manager_closes_on_every_way_out(olmoe: Path, prompt: Any) -> None:
    before = len(readers())
    with swapless.load(olmoe, resident=0.25, context=64) as model:
        model(input_ids=prompt)
        assert len(readers()) > before
    assert len(readers()) == before
    with pytest.raises(RuntimeError, match="mine"), swapless.load(olmoe, resident=0.25, context=64):
        raise RuntimeError("mine")
    assert len(readers()) == before


def test_no_descriptor_stays_open(olmoe: Path, prompt: Any) -> None:
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        pytest.skip("no /proc/self/fd to count descriptors in")
    with swapless.load(olmoe, resident=0.25, context=64) as model:
        model(input_ids=prompt)
        model(input_ids=prompt)
    before = len(list(descriptors.iterdir()))
    for _ in range(2):
        with swapless.load(olmoe, resident=0.25, context=64) as model:
            model(input_ids=prompt)
    assert len(list(descriptors.iterdir())) <= before
