"""What an earlier run of ``pack`` left, held against its checksums before it is kept."""

from __future__ import annotations

import hashlib
import queue
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_64

from swapless.errors import CheckpointMissingError, ReadError
from swapless.processors import processors
from swapless.store.checksum import checksum, file_checksum, quick_checksum
from swapless.store.manifest import PackedLayer, block_parts, part_ranges
from swapless.store.read import BLOCK_BYTES, FileReader, aligned_buffer

_AT_ONCE = 4
"""Blocks in memory at once."""

_READ_BYTES = 4 << 20
_GONE = (CheckpointMissingError, ReadError)
"""A file that cannot be read is written anew."""


def part_checksums(block: np.ndarray) -> str:
    """Quick checksums of the parts that a block is read in, one after the other."""
    return "".join(quick_checksum(block[begin:end]) for begin, end in part_ranges(len(block), block_parts(len(block))))


def kept_blocks(file: Path, header: bytes, layer: PackedLayer, report: Callable[[int], None]) -> tuple[str, ...] | None:
    """Checksums of the parts of every block of ``layer``, if the file is what was written: header and blocks; else None.

    ``report`` is told the bytes that were read.
    """
    if not _has_size(file, len(header) + layer.num_experts * layer.block_bytes):
        return None
    reader: FileReader | None = None
    try:
        reader = FileReader([file])
        if bytes(reader.read(file, 0, len(header), aligned_buffer(len(header) + 2 * BLOCK_BYTES))) != header:
            return None
        report(len(header))
        return _checked(reader, file, len(header), layer, report)
    except _GONE:
        return None
    finally:
        if reader is not None:
            reader.close()


def _checked(
    reader: FileReader, file: Path, first: int, layer: PackedLayer, report: Callable[[int], None]
) -> tuple[str, ...] | None:
    at_once = min(_AT_ONCE, layer.num_experts)
    free: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
    for _ in range(at_once):
        free.put(aligned_buffer(layer.block_bytes))
    found: list[str] = []

    def look(expert: int) -> str | None:
        buffer = free.get()
        try:
            block = reader.read(file, first + expert * layer.block_bytes, layer.block_bytes, buffer)
            return part_checksums(block) if checksum(block) == layer.checksums[expert] else None
        finally:
            free.put(buffer)

    with ThreadPoolExecutor(min(at_once, max(2, processors()))) as threads:
        for parts in threads.map(look, range(layer.num_experts)):
            if parts is None:
                threads.shutdown(cancel_futures=True)
                return None
            found.append(parts)
            report(layer.block_bytes)
    return tuple(found)


def kept_tensors(
    file: Path, header: np.ndarray, tensors: Sequence[tuple[str, int]], noted: Mapping[str, Any]
) -> dict[str, str] | None:
    """Quick checksums of ``tensors`` (key and bytes, as they follow the header), if the file is what was written; else None."""
    if not _has_size(file, int(noted["bytes"])):
        return None
    whole, sums, at = hashlib.sha256(), list[tuple[str, str]](), 0
    buffer = aligned_buffer(_READ_BYTES + 2 * BLOCK_BYTES)
    reader: FileReader | None = None
    try:
        reader = FileReader([file])
        for key, nbytes in (("", len(header)), *tensors):
            quick = xxh3_64()
            for begin in range(at, at + nbytes, _READ_BYTES):
                chunk = reader.read(file, begin, min(_READ_BYTES, at + nbytes - begin), buffer).data
                whole.update(chunk)
                quick.update(chunk)
            at += nbytes
            sums.append((key, quick.hexdigest()))
    except _GONE:
        return None
    finally:
        if reader is not None:
            reader.close()
    return dict(sums[1:]) if whole.hexdigest() == noted["sha256"] else None


def file_holds(file: Path, noted: Mapping[str, Any]) -> bool:
    """Whether a file has the ``bytes`` and the ``sha256`` that were noted."""
    try:
        return _has_size(file, int(noted["bytes"])) and file_checksum(file) == noted["sha256"]
    except _GONE:
        return False


def _has_size(file: Path, nbytes: int) -> bool:
    return file.is_file() and file.stat().st_size == nbytes
