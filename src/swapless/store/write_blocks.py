"""The blocks of one MoE layer, one after the other into a file: experts are read, rounded, hashed and written at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from swapless.processors import processors
from swapless.store.checkpoint import FetchedPart
from swapless.store.checksum import checksum
from swapless.store.kept import part_checksums
from swapless.store.read import aligned_buffer, buffer_bytes
from swapless.store.write import FileWriter

Report = Callable[[int], None]
"""Told the bytes read and written since the last call."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where blocks come from: ``fetch(moe_layer, expert, bounce)`` reads an expert into ``bounce`` (``bounce_bytes``).

    It is called from one thread while what it fetched is placed on others. The largest expert has ``expert_bytes``.
    """

    expert_bytes: int
    bounce_bytes: int
    fetch: Callable[[int, int, np.ndarray], FetchedPart]


_AT_ONCE = 4
"""Experts on their way at once: while one is read, others are rounded, hashed or written."""

_SMALL_BYTES = 64 << 20
"""In so much memory all of them may be, however small an expert is beside its buffers."""


def write_blocks(
    writer: FileWriter, moe_layer: int, num_experts: int, block_bytes: int, source: Source, report: Report
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Write a block an expert, in order, and return their checksums, and those of their parts.

    One thread does nothing but read, so that the disk never waits for a processor, and one nothing but write. There are
    buffers for two experts, and for more as long as all of them are no larger than four experts of the checkpoint, or than
    64 MiB where those are small.
    """
    each_bytes = buffer_bytes(source.bounce_bytes) + buffer_bytes(block_bytes)
    at_once = min(_AT_ONCE, num_experts, max(2, max(_SMALL_BYTES, 4 * source.expert_bytes) // each_bytes))
    bounces = [aligned_buffer(source.bounce_bytes) for _ in range(at_once)]
    blocks = [aligned_buffer(block_bytes)[:block_bytes] for _ in range(at_once)]
    for block in blocks:
        block[:] = 0

    with (
        ThreadPoolExecutor(1) as scribe,
        ThreadPoolExecutor(1) as reader,
        ThreadPoolExecutor(min(at_once, processors())) as workers,
    ):

        def fetch(expert: int) -> Future[FetchedPart]:
            return reader.submit(source.fetch, moe_layer, expert, bounces[expert % at_once])

        def make(expert: int) -> tuple[int, str, str]:
            fetched, block = fetching[expert].result(), blocks[expert % at_once]
            fetched.place(block)
            if expert + at_once < num_experts:  # its bounce buffer is free now
                fetching[expert + at_once] = fetch(expert + at_once)
            return fetched.nbytes, checksum(block), part_checksums(block)

        fetching = {expert: fetch(expert) for expert in range(at_once)}
        making = {expert: workers.submit(make, expert) for expert in range(at_once)}
        writing: list[Future[None]] = []
        checksums, parts = [], []
        for expert in range(num_experts):
            nbytes, whole, quick = making[expert].result()
            writing.append(scribe.submit(writer.write, blocks[expert % at_once]))
            checksums.append(whole)
            parts.append(quick)
            report(nbytes + block_bytes)
            if expert:  # the block before is free as soon as it is written
                writing[expert - 1].result()
                if expert - 1 + at_once < num_experts:
                    making[expert - 1 + at_once] = workers.submit(make, expert - 1 + at_once)
        writing[-1].result()
    return tuple(checksums), tuple(parts)
