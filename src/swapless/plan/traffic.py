"""Reads without a purpose: as the engine would make them, of experts or blocks at random places.

A plan asks for the same few experts over and over, and blocks that it plans for are not there yet; the disk must not know.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np

from swapless.runtime.store import Store
from swapless.store.packed import block_parts
from swapless.store.read import BLOCK_BYTES, FileReader

Fetch = Callable[[np.random.Generator], int]
"""Makes one read somewhere and returns its bytes."""


class Traffic(Protocol):
    """What the engine's reader threads ask of a store, answered with other bytes of the same files."""

    def bounce_buffer(self) -> np.ndarray:
        """Scratch memory for one reader thread."""
        ...

    def parts(self, moe_layer: int, expert: int) -> int:
        """Into how many parts an expert is cut."""
        ...

    def read_part(self, moe_layer: int, expert: int, part: int, slot: np.ndarray, bounce: np.ndarray) -> int:
        """Fill as much of ``slot`` as that part would; returns the bytes fetched."""
        ...

    def close(self) -> None:
        """Close the files."""
        ...


class BlocksTraffic:
    """Blocks of packed experts, at random places of ``files``: nothing there is packed yet.

    Parameters
    ----------
    files : sequence of Path
        To read from.
    block_bytes : int
        Bytes of one expert.
    """

    def __init__(self, files: Sequence[Path], block_bytes: int) -> None:
        self._reader = FileReader(list(files))
        self._sizes = {file: file.stat().st_size for file in files}
        self._count = block_parts(block_bytes)
        self._part_bytes = block_bytes // self._count // BLOCK_BYTES * BLOCK_BYTES
        self._random = random.Random(0)

    def bounce_buffer(self) -> np.ndarray:
        """Nothing: an empty array."""
        return np.empty(0, np.uint8)

    def parts(self, moe_layer: int, expert: int) -> int:
        """Into how many parts a block is cut."""
        return self._count

    def read_part(self, moe_layer: int, expert: int, part: int, slot: np.ndarray, bounce: np.ndarray) -> int:
        """Read as much as one part of a block to its place in ``slot``; all of a file that is smaller."""
        (file,) = self._random.choices(list(self._sizes), list(self._sizes.values()))
        nbytes = min(self._part_bytes, self._sizes[file])
        offset = self._random.randrange(self._sizes[file] - nbytes + 1) // BLOCK_BYTES * BLOCK_BYTES
        return len(self._reader.read(file, offset, nbytes, slot[part * self._part_bytes :]))

    def close(self) -> None:
        """Close the files."""
        self._reader.close()


class StoreTraffic:
    """Experts of ``store``, any in the place of any other of their MoE layer. Closes it in the end.

    Parameters
    ----------
    store : Store
        To read from.
    experts : int
        Of each MoE layer.
    """

    def __init__(self, store: Store, experts: int) -> None:
        self._store, self._experts, self._random = store, experts, random.Random(0)

    def bounce_buffer(self) -> np.ndarray:
        """The store's."""
        return self._store.bounce_buffer()

    def parts(self, moe_layer: int, expert: int) -> int:
        """As of the store."""
        return self._store.parts(moe_layer, expert)

    def read_part(self, moe_layer: int, expert: int, part: int, slot: np.ndarray, bounce: np.ndarray) -> int:
        """Read that part of some expert, and copy it as the engine does."""
        other = self._random.randrange(self._experts)
        return self._store.read_part(moe_layer, other, part % self._store.parts(moe_layer, other), slot, bounce)

    def close(self) -> None:
        """Close the files."""
        self._store.close()


def fetcher(traffic: Traffic, places: Sequence[np.ndarray]) -> Fetch:
    """Reads of one thread, which have a bounce buffer of their own, into any of ``places``."""
    bounce = traffic.bounce_buffer()

    def fetch(rng: np.random.Generator) -> int:
        part, place = int(rng.integers(traffic.parts(0, 0))), places[int(rng.integers(len(places)))]
        return traffic.read_part(0, 0, part, place, bounce)

    return fetch


def bandwidth(traffic: Traffic, threads: int, places: Sequence[np.ndarray], seconds: float) -> float:
    """Bytes a second that so many threads get out of ``traffic`` into ``places``, copies included, beside nothing else."""
    with busy([fetcher(traffic, places) for _ in range(threads)], np.random.default_rng(0)) as moved:
        begun = time.perf_counter()
        while time.perf_counter() - begun < seconds or not moved:
            time.sleep(seconds / 8)
        return sum(moved) / (time.perf_counter() - begun)


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
