"""Reads that go on while something else is timed."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from swapless import embedded
from swapless.errors import ReadError
from swapless.plan.traffic import blocks_traffic, store_traffic
from swapless.runtime.open import open_checkpoint


def readers() -> int:
    return threading.active_count()


def until_moved(moved: list[int], reads: int) -> None:
    deadline = time.monotonic() + 30
    while len(moved) < reads:
        assert time.monotonic() < deadline, "the threads read nothing"
        time.sleep(0.001)


def test_blocks_are_read_until_it_is_closed(tmp_path: Path) -> None:
    files = [tmp_path / "large", tmp_path / "small"]
    files[0].write_bytes(bytes(300_000))
    files[1].write_bytes(bytes(5_000))
    before = readers()
    with blocks_traffic(files, 65_536, 2).busy() as moved:
        assert readers() == before + 2
        until_moved(moved, 200)
    assert readers() == before
    assert set(moved) == {65_536, 5_000}, "whole blocks, and all of a file that is smaller"


def test_experts_are_read_as_the_engine_does() -> None:
    opened = open_checkpoint(embedded.path())
    with store_traffic(opened, 1).busy() as moved:
        until_moved(moved, 8)
    layer = opened.layout.moe_layers[0]
    assert all(layer.expert_bytes <= nbytes < 2 * layer.expert_bytes for nbytes in moved), "an expert here is one part"


def test_what_a_thread_meets_is_raised_and_nobody_waits(tmp_path: Path) -> None:
    file = tmp_path / "cut"
    file.write_bytes(bytes(100_000))
    with pytest.raises(ReadError, match="truncated"), blocks_traffic([file], 65_536, 1).busy() as moved:
        until_moved(moved, 1)
        file.write_bytes(bytes(1_000))
        deadline = time.monotonic() + 30
        while moved[-1]:
            assert time.monotonic() < deadline, "the thread does not say that it is done"
            time.sleep(0.001)


def test_what_a_first_read_takes_longer_is_a_time(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(300_000))
    called = []
    assert 0 <= blocks_traffic([file], 65_536, 1).first_read_s(lambda: called.append(1)) < 1
    assert len(called) > 24, "something was done in every pause"
