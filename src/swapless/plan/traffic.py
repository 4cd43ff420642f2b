"""Reads without a purpose: what compute and the read path take from each other can only be timed while both are at work.

On two cores the reader threads want their share of the processors, and both want the memory bus; a virtual disk may take it
from the same processors outside of the machine.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from swapless.runtime.open import OpenCheckpoint
from swapless.runtime.parts import open_store
from swapless.runtime.pool import slot_bytes
from swapless.store.read import BLOCK_BYTES, FileReader, aligned_buffer

_PLACES = 4
"""Slots that one thread reads into in turn: a single one would stay in the processor's cache."""

_PAUSE_S, _PAUSES = 0.004, 24

Fetch = Callable[[np.random.Generator], int]
"""Makes one read somewhere and returns its bytes."""

Fetchers = Callable[[], AbstractContextManager[Callable[[], Fetch]]]
"""Opens files, and makes a fetcher with memory of its own for each thread that asks."""


class Traffic:
    """Reads such as the engine's.

    Parameters
    ----------
    fetchers : callable
        Makes them.
    threads : int
        How many the engine would have in flight.
    """

    def __init__(self, fetchers: Fetchers, threads: int) -> None:
        self._fetchers, self._threads = fetchers, threads

    @contextmanager
    def busy(self) -> Iterator[list[int]]:
        """Keep reading at random places for as long as it is open; the list receives the bytes of each read."""
        with self._fetchers() as fetcher, busy([fetcher() for _ in range(self._threads)], np.random.default_rng(0)) as moved:
            yield moved

    def first_read_s(self, between: Callable[[], Any]) -> float:
        """Seconds that a read takes longer after some milliseconds of ``between`` than right after another read.

        What serves a disk goes to sleep: on a virtual machine a read of 1.1 ms takes 1.3 after 2 ms and 1.5 after 5.
        """
        rng, seconds = np.random.default_rng(0), []

        def timed(fetch: Fetch) -> float:
            begun = time.perf_counter()
            fetch(rng)
            return time.perf_counter() - begun

        with self._fetchers() as fetcher:
            fetch = fetcher()
            for _ in range(_PAUSES):
                begun = time.perf_counter()
                while time.perf_counter() - begun < _PAUSE_S:
                    between()
                seconds.append((timed(fetch), timed(fetch)))
        first, following = (statistics.median(column) for column in zip(*seconds, strict=True))
        return max(0.0, first - following)


def blocks_traffic(files: list[Path], block_bytes: int, threads: int) -> Traffic:
    """Reads of blocks of ``files`` at random places."""
    sizes = [file.stat().st_size for file in files]

    @contextmanager
    def fetchers() -> Iterator[Callable[[], Fetch]]:
        with closing(FileReader(files)) as reader:

            def fetcher() -> Fetch:
                places = [aligned_buffer(block_bytes + 2 * BLOCK_BYTES) for _ in range(_PLACES)]

                def fetch(rng: np.random.Generator) -> int:
                    number = int(rng.choice(len(files), p=np.array(sizes) / sum(sizes)))
                    offset = int(rng.integers(max(1, sizes[number] - block_bytes))) // BLOCK_BYTES * BLOCK_BYTES
                    nbytes = min(block_bytes, sizes[number])
                    return len(reader.read(files[number], offset, nbytes, places[int(rng.integers(_PLACES))]))

                return fetch

            yield fetcher

    return Traffic(fetchers, threads)


def store_traffic(opened: OpenCheckpoint, threads: int) -> Traffic:
    """The same with experts of ``opened``, read and copied into slots as the engine does it."""
    layers = opened.layout.moe_layers

    @contextmanager
    def fetchers() -> Iterator[Callable[[], Fetch]]:
        with closing(open_store(opened, check=False)) as store:

            def fetcher() -> Fetch:
                bounce, places = store.bounce_buffer(), [aligned_buffer(slot_bytes(layers)) for _ in range(_PLACES)]

                def fetch(rng: np.random.Generator) -> int:
                    layer = int(rng.integers(len(layers)))
                    expert, place = int(rng.integers(layers[layer].num_experts)), places[int(rng.integers(_PLACES))]
                    return store.read_part(layer, expert, int(rng.integers(store.parts(layer, expert))), place, bounce)

                return fetch

            yield fetcher

    return Traffic(fetchers, threads)


@contextmanager
def busy(fetchers: Sequence[Fetch], rng: np.random.Generator) -> Iterator[list[int]]:
    """Call each of ``fetchers`` in a thread of its own, over and over, with a stream of ``rng``; the list receives the bytes.

    Raises
    ------
    Exception
        Whatever a fetcher raised, at the end.
    """
    enough, moved, failures = threading.Event(), list[int](), list[BaseException]()

    def work(fetch: Fetch, rng: np.random.Generator) -> None:
        try:
            while not enough.is_set():
                moved.append(fetch(rng))
        except BaseException as error:  # carried to the caller's thread and raised there
            failures.append(error)
            moved.append(0)  # nobody must wait for the first bytes

    threads = [
        threading.Thread(target=work, args=pair, daemon=True) for pair in zip(fetchers, rng.spawn(len(fetchers)), strict=True)
    ]
    for thread in threads:
        thread.start()
    try:
        yield moved
    finally:
        enough.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
