"""Measure the read path at this model's block size: bandwidth and fixed cost with 1, 2 and 4 requests in flight.

More requests in flight help on one machine and hurt on the next, so the number of reader threads is measured, not assumed.
Blocks are read direct at scattered places, so that neither the page cache nor read-ahead answers for the disk, and into one
piece of memory after the other, as into slots: where a disk is a copy by the host, it is a quarter faster into a buffer that a
processor's cache still holds.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from swapless.store.checkpoint import Extent
from swapless.store.read import BLOCK_BYTES, FileReader, aligned_buffer

DEPTHS = (1, 2, 4)
_WORTH_A_THREAD = 1.15
"""A deeper queue must be this much faster to be chosen: threads cost memory and processor time."""

HELD_BYTES = 64 << 20
"""Memory that reads go to in turn."""

_MOST_PLACES = 256
_LEAST_ROUNDS, _MOST_ROUNDS = 2, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What the read path does at one block size.

    ``bytes_per_s`` maps requests in flight to the bandwidth reached; ``fixed_s`` is the time of a single-block read, one in
    flight; ``depth`` the requests in flight to use; ``direct`` whether reads pass the page cache.
    """

    block_bytes: int
    bytes_per_s: dict[int, float]
    fixed_s: float
    depth: int
    direct: bool

    @property
    def best_bytes_per_s(self) -> float:
        """Bandwidth at the chosen depth."""
        return self.bytes_per_s[self.depth]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def probe(
    reader: FileReader,
    extents: Sequence[Extent],
    *,
    copied: bool = False,
    held_bytes: int = HELD_BYTES,
    budget_s: float = 0.4,
    seed: int = 0,
) -> Probe:
    """Time reads of ``extents`` (the ranges of real experts) for about ``budget_s`` seconds, or about once each.

    Parameters
    ----------
    reader : FileReader
        Open files.
    extents : sequence of Extent
        Ranges to draw from; their median size is the block size.
    copied : bool
        Whether whoever reads copies every read to its place: then two are in flight at least, or the disk would rest meanwhile,
        and each thread reads into one buffer over and over.
    held_bytes : int
        Memory that reads go to in turn where they are not copied; less is taken for small blocks, and more if a read a thread
        needs it.
    budget_s : float
        For how long.
    seed : int
        Of the order.
    """
    rng = np.random.default_rng(seed)
    order = [extents[i] for i in rng.permutation(len(extents))]
    block = int(np.median([extent.nbytes for extent in order]))
    largest = max(extent.nbytes for extent in order)
    places = _places(largest, 0 if copied else held_bytes)
    small = [extent._replace(nbytes=min(extent.nbytes, 512)) for extent in order[:8]]
    fixed = min(_timed(reader, [extent], [itertools.cycle(places)])[1] for extent in small)
    batches = itertools.cycle(order)
    turns = {
        depth: [itertools.cycle(places[i : i + 1] if copied else places[i::depth]) for i in range(depth)] for depth in DEPTHS
    }
    nbytes, seconds = dict.fromkeys(DEPTHS, 0), dict.fromkeys(DEPTHS, 0.0)
    # None is read again and again: of a small store that would tell how fast the host's memory is.
    rounds = min(_MOST_ROUNDS, max(_LEAST_ROUNDS, len(order) // (2 * sum(DEPTHS))))
    for number in range(rounds):  # in turns: a disk that drifts meanwhile drifts for all
        if number >= _LEAST_ROUNDS and sum(seconds.values()) >= budget_s:
            break
        for depth in DEPTHS:
            read_bytes, spent = _timed(reader, [next(batches) for _ in range(depth * 2)], turns[depth])
            nbytes[depth] += read_bytes
            seconds[depth] += spent
    bandwidth = {depth: nbytes[depth] / seconds[depth] for depth in DEPTHS}
    depth = DEPTHS[0]
    for candidate in DEPTHS[1:]:
        if bandwidth[candidate] > _WORTH_A_THREAD * bandwidth[depth]:
            depth = candidate
    if copied:
        depth = max(depth, 2)
    return Probe(block_bytes=block, bytes_per_s=bandwidth, fixed_s=fixed, depth=depth, direct=reader.direct)


def _places(largest: int, held_bytes: int) -> list[np.ndarray]:
    """Places for reads of so many bytes, one a read in flight at least; memory that was never touched would be slow once."""
    size = (-(-largest // BLOCK_BYTES) + 2) * BLOCK_BYTES
    count = max(*DEPTHS, min(_MOST_PLACES, held_bytes // size))
    memory = aligned_buffer(count * size)[: count * size]
    memory[:] = 0
    return list(memory.reshape(count, size))


def _timed(reader: FileReader, batch: Sequence[Extent], turns: Sequence[Iterator[np.ndarray]]) -> tuple[int, float]:
    """Bytes and seconds of a batch, a thread for each of ``turns``, which say where its reads go."""
    failures: list[BaseException] = []

    def work(share: Sequence[Extent], places: Iterator[np.ndarray]) -> None:
        try:
            for extent in share:
                reader.read(*extent, next(places))
        except BaseException as error:  # carried to the caller's thread and raised there
            failures.append(error)

    threads = [
        threading.Thread(target=work, args=(batch[i :: len(turns)], places), daemon=True)
        for i, places in enumerate(turns[1:], start=1)
    ]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    work(batch[0 :: len(turns)], turns[0])
    for thread in threads:
        thread.join()
    spent = time.perf_counter() - start
    if failures:
        raise failures[0]
    return sum(extent.nbytes for extent in batch), spent
