"""Reader threads: every read comes back, errors are carried and not lost, and close leaves no thread behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from swapless.errors import ClosedError
from swapless.runtime.loader import Loader


@pytest.fixture
def slots() -> np.ndarray:
    return np.zeros((8, 16), np.uint8)


@pytest.fixture
def make(slots: np.ndarray) -> Iterator[Callable[..., Loader]]:
    made: list[Loader] = []

    def call(read: Any = None, threads: int = 2) -> Loader:
        def fill(moe_layer: int, expert: int, part: int, slot: np.ndarray, bounce: np.ndarray) -> int:
            slot[:] = 10 * moe_layer + expert
            return 16

        made.append(Loader(read or fill, lambda *_: 1, lambda slot: slots[slot], lambda: np.zeros(4, np.uint8), threads))
        return made[-1]

    yield call
    for loader in made:
        loader.close()


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_every_read_comes_back_once_with_its_bytes(make: Any, slots: np.ndarray, threads: int) -> None:
    loader = make(threads=threads)
    for expert in range(8):
        loader.submit(2, expert, 7 - expert)
    reads = [loader.next() for _ in range(8)]
    assert sorted(read.expert for read in reads) == list(range(8))
    assert all(read.slot == 7 - read.expert and read.nbytes == 16 and read.error is None for read in reads)
    assert all((slots[7 - expert] == 20 + expert).all() for expert in range(8))
    assert loader.outstanding == 0


def test_one_thread_reads_in_the_order_of_asking(make: Any) -> None:
    loader = make(threads=1)
    asked = [5, 1, 7, 0, 3]
    for slot, expert in enumerate(asked):
        loader.submit(0, expert, slot)
    assert [loader.next().expert for _ in asked] == asked


def test_reads_really_overlap(make: Any) -> None:
    together = threading.Barrier(2, timeout=20)

    def read(*_: Any) -> int:
        together.wait()  # passes only if two reads are under way at once
        return 1

    loader = make(read)
    loader.submit(0, 0, 0)
    loader.submit(0, 1, 1)
    assert [loader.next().error for _ in range(2)] == [None, None]


def test_an_error_comes_back_with_its_read_and_the_thread_goes_on(make: Any) -> None:
    def read(moe_layer: int, expert: int, *_: Any) -> int:
        if expert == 3:
            raise OSError("the disk is gone")
        return 1

    loader = make(read, threads=1)
    for expert in (3, 4):
        loader.submit(0, expert, expert)
    failed, fine = loader.next(), loader.next()
    assert failed.expert == 3 and isinstance(failed.error, OSError)
    assert fine.expert == 4 and fine.error is None


def test_drain_waits_for_reads_under_way_and_drops_the_rest(make: Any) -> None:
    begun, go_on, done = threading.Event(), threading.Event(), []

    def read(moe_layer: int, expert: int, *_: Any) -> int:
        begun.set()
        assert go_on.wait(20)
        done.append(expert)
        return 1

    loader = make(read, threads=1)
    for expert in range(6):
        loader.submit(0, expert, expert)
    assert begun.wait(20)
    threading.Timer(0.05, go_on.set).start()
    loader.drain()
    assert done == [0], "the read under way ends, those not begun never start"
    assert loader.outstanding == 0
    loader.submit(0, 7, 7)
    assert loader.next().expert == 7, "nothing left over from before"


def test_close_ends_the_threads_and_may_be_repeated(make: Any) -> None:
    before = threading.active_count()
    loader = make(threads=4)
    assert threading.active_count() == before + 4
    loader.close()
    loader.close()
    assert threading.active_count() == before
    with pytest.raises(ClosedError):
        loader.submit(0, 0, 0)


def test_close_with_reads_under_way_does_not_hang(make: Any) -> None:
    def read(*_: Any) -> int:
        time.sleep(0.02)
        return 1

    before = threading.active_count()
    loader = make(read)
    for expert in range(6):
        loader.submit(0, expert, expert)
    closing = threading.Thread(target=loader.close)
    closing.start()
    closing.join(20)
    assert not closing.is_alive() and threading.active_count() == before
