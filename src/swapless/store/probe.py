"""Measure the read path at this model's block size: bandwidth and fixed cost with 1, 2 and 4 requests in flight.

More requests in flight help on one machine and hurt on the next, so the number of reader threads is measured, not assumed.
Blocks are read direct at scattered places, so that neither the page cache nor read-ahead answers for the disk.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from swapless.store.checkpoint import Extent
from swapless.store.read import BLOCK_BYTES, FileReader, aligned_buffer

DEPTHS = (1, 2, 4)
_WORTH_A_THREAD = 1.05
"""A deeper queue must be this much faster to be chosen: threads cost memory and processor time."""


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
    reader: FileReader, extents: Sequence[Extent], *, copied: bool = False, budget_s: float = 0.4, seed: int = 0
) -> Probe:
    """Time reads of ``extents`` (the ranges of real experts) for about ``budget_s`` seconds.

    Parameters
    ----------
    reader : FileReader
        Open files.
    extents : sequence of Extent
        Ranges to draw from; their median size is the block size.
    copied : bool
        Whether whoever reads copies every read to its place: then two are in flight at least, or the disk would rest meanwhile.
    budget_s : float
        For how long.
    seed : int
        Of the order.
    """
    rng = np.random.default_rng(seed)
    order = [extents[i] for i in rng.permutation(len(extents))]
    block = int(np.median([extent.nbytes for extent in order]))
    largest = max(extent.nbytes for extent in order)
    buffers = [aligned_buffer(largest + 2 * BLOCK_BYTES) for _ in range(max(DEPTHS))]
    fixed = min(_timed(reader, [extent._replace(nbytes=min(extent.nbytes, 512))], buffers[:1])[1] for extent in order[:8])
    bandwidth = {}
    position = 0
    for depth in DEPTHS:
        nbytes = seconds = 0.0
        rounds = 0
        while (seconds < budget_s / len(DEPTHS) and rounds < 64) or rounds < 2:
            batch = [order[(position + i) % len(order)] for i in range(depth * 2)]
            position += len(batch)
            rounds += 1
            read_bytes, spent = _timed(reader, batch, buffers[:depth])
            nbytes += read_bytes
            seconds += spent
        bandwidth[depth] = nbytes / seconds
    depth = DEPTHS[0]
    for candidate in DEPTHS[1:]:
        if bandwidth[candidate] > _WORTH_A_THREAD * bandwidth[depth]:
            depth = candidate
    if copied:
        depth = max(depth, 2)
    return Probe(block_bytes=block, bytes_per_s=bandwidth, fixed_s=fixed, depth=depth, direct=reader.direct)


def _timed(reader: FileReader, batch: Sequence[Extent], buffers: Sequence[np.ndarray]) -> tuple[int, float]:
    failures: list[BaseException] = []

    def work(share: Sequence[Extent], buffer: np.ndarray) -> None:
        try:
            for extent in share:
                reader.read(*extent, buffer)
        except BaseException as error:  # carried to the caller's thread and raised there
            failures.append(error)

    threads = [
        threading.Thread(target=work, args=(batch[i :: len(buffers)], buffer), daemon=True)
        for i, buffer in enumerate(buffers[1:], start=1)
    ]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    work(batch[0 :: len(buffers)], buffers[0])
    for thread in threads:
        thread.join()
    spent = time.perf_counter() - start
    if failures:
        raise failures[0]
    return sum(extent.nbytes for extent in batch), spent
