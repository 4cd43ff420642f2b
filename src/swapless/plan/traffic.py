"""Reads without a purpose: what compute and the read path take from each other can only be timed while both are at work.

On two cores the reader threads want their share of the processors, and both want the memory bus; a virtual disk may take it
from the same processors outside of the machine.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np

from swapless.runtime.open import OpenCheckpoint
from swapless.runtime.parts import open_store
from swapless.runtime.pool import slot_bytes
from swapless.store.read import BLOCK_BYTES, FileReader, aligned_buffer

_PLACES = 4
"""Slots that one thread reads into in turn: a single one would stay in the processor's cache."""

_Fetch = Callable[[np.random.Generator], int]


@contextmanager
def blocks_traffic(files: list[Path], block_bytes: int, threads: int) -> Iterator[list[int]]:
    """Keep so many threads reading blocks of ``files`` at random places; the list receives the bytes of each read."""
    reader = FileReader(files)
    sizes = [file.stat().st_size for file in files]

    def fetcher() -> _Fetch:
        places = [aligned_buffer(block_bytes + 2 * BLOCK_BYTES) for _ in range(_PLACES)]

        def fetch(rng: np.random.Generator) -> int:
            number = int(rng.choice(len(files), p=np.array(sizes) / sum(sizes)))
            offset = int(rng.integers(max(1, sizes[number] - block_bytes))) // BLOCK_BYTES * BLOCK_BYTES
            nbytes = min(block_bytes, sizes[number])
            return len(reader.read(files[number], offset, nbytes, places[int(rng.integers(_PLACES))]))

        return fetch

    with closing(reader), busy([fetcher() for _ in range(threads)], np.random.default_rng(0)) as moved:
        yield moved


@contextmanager
def store_traffic(opened: OpenCheckpoint, threads: int) -> Iterator[list[int]]:
    """The same with experts of ``opened``, read and copied into slots as the engine does it."""
    store = open_store(opened, check=False)
    layers = opened.layout.moe_layers

    def fetcher() -> _Fetch:
        bounce, places = store.bounce_buffer(), [aligned_buffer(slot_bytes(layers)) for _ in range(_PLACES)]

        def fetch(rng: np.random.Generator) -> int:
            layer = int(rng.integers(len(layers)))
            expert, place = int(rng.integers(layers[layer].num_experts)), places[int(rng.integers(_PLACES))]
            return store.read_part(layer, expert, int(rng.integers(store.parts(layer, expert))), place, bounce)

        return fetch

    with closing(store), busy([fetcher() for _ in range(threads)], np.random.default_rng(0)) as moved:
        yield moved


@contextmanager
def busy(fetchers: Sequence[_Fetch], rng: np.random.Generator) -> Iterator[list[int]]:
    """Call each of ``fetchers`` in a thread of its own, over and over, with a stream of ``rng``; the list receives the bytes.

    Raises
    ------
    Exception
        Whatever a fetcher raised, at the end.
    """
    enough, moved, failures = threading.Event(), list[int](), list[BaseException]()

    def work(fetch: _Fetch, rng: np.random.Generator) -> None:
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
