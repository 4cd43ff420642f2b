"""Reads that go on while something else is timed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swapless import embedded
from swapless.errors import ReadError
from swapless.plan.traffic import BlocksTraffic, StoreTraffic, bandwidth, busy, fetcher
from swapless.runtime.open import open_checkpoint
from swapless.runtime.parts import open_store
from swapless.runtime.pool import slot_bytes
from swapless.store.read import aligned_buffer


def readers() -> int:
    return threading.active_count()


def until_moved(moved: list[int], reads: int) -> None:
    deadline = time.monotonic() + 30
    while len(moved) < reads:
        assert time.monotonic() < deadline, "the threads read nothing"
        time.sleep(0.001)


@contextmanager
def reading(traffic: Any, threads: int, slot_bytes: int) -> Iterator[list[int]]:
    places = [aligned_buffer(slot_bytes)]
    with closing(traffic), busy([fetcher(traffic, places) for _ in range(threads)], np.random.default_rng(0)) as moved:
        yield moved


def test_blocks_are_read_until_it_is_closed(tmp_path: Path) -> None:
    files = [tmp_path / "large", tmp_path / "small"]
    files[0].write_bytes(bytes(300_000))
    files[1].write_bytes(bytes(5_000))
    before = readers()
    with reading(BlocksTraffic(files, 65_536), 2, 65_536) as moved:
        assert readers() == before + 2
        until_moved(moved, 200)
    assert readers() == before
    assert set(moved) == {65_536, 5_000}, "whole blocks, and all of a file that is smaller"


def test_parts_of_a_block_fill_it(tmp_path: Path) -> None:
    file, block_bytes = tmp_path / "file", 12 << 20
    file.write_bytes(np.full(16 << 20, 7, np.uint8).tobytes())
    slot = aligned_buffer(block_bytes)
    slot[:] = 0
    with closing(BlocksTraffic([file], block_bytes)) as traffic:
        moved = [traffic.read_part(0, 0, part, slot, traffic.bounce_buffer()) for part in range(traffic.parts(0, 0))]
    assert len(moved) > 1 and sum(moved) == block_bytes and (slot == 7).all()


def test_experts_are_read_as_the_engine_does() -> None:
    opened = open_checkpoint(embedded.path())
    layer = opened.layout.moe_layers[0]
    traffic = StoreTraffic(open_store(opened, check=False), layer.num_experts)
    with reading(traffic, 1, slot_bytes(opened.layout.moe_layers)) as moved:
        until_moved(moved, 8)
    assert all(layer.expert_bytes <= nbytes < 2 * layer.expert_bytes for nbytes in moved), "an expert here is one part"


def test_some_expert_stands_for_any() -> None:
    opened = open_checkpoint(embedded.path())
    layers = opened.layout.moe_layers
    found = set()
    with closing(StoreTraffic(open_store(opened, check=False), layers[0].num_experts)) as traffic:
        bounce, slot = traffic.bounce_buffer(), aligned_buffer(slot_bytes(layers))
        for _ in range(32):
            traffic.read_part(0, 0, 0, slot, bounce)
            found.add(slot[: layers[0].expert_bytes].tobytes())
    assert len(found) > 2


def test_bandwidth_is_of_the_bytes_that_were_read(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 20))
    places = [aligned_buffer(1 << 16) for _ in range(4)]
    with closing(BlocksTraffic([file], 1 << 16)) as traffic:
        assert 1e5 < bandwidth(traffic, 2, places, 0.05) < 1e12


def test_what_a_thread_meets_is_raised_and_nobody_waits(tmp_path: Path) -> None:
    file = tmp_path / "cut"
    file.write_bytes(bytes(100_000))
    with pytest.raises(ReadError, match="truncated"), reading(BlocksTraffic([file], 65_536), 1, 65_536) as moved:
        until_moved(moved, 1)
        file.write_bytes(bytes(1_000))
        deadline = time.monotonic() + 30
        while moved[-1]:
            assert time.monotonic() < deadline, "the thread does not say that it is done"
            time.sleep(0.001)
