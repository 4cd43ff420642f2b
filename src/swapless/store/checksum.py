"""Checksums: SHA-256 of what is verified as a whole, and XXH3 of what is checked on its way into memory.

XXH3 (64 bits) goes through memory some 25 times as fast as SHA-256, so that a block can be checked at its first read. It finds
whatever a disk or a copy changes. It keeps nobody out who changes bytes on purpose; no checksum does that lies beside them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import xxhash

from swapless.store.read import BLOCK_BYTES, FileReader, aligned_buffer

QUICK_DIGITS = 16
"""Hexadecimal digits of a quick checksum."""

_READ_BYTES = 4 << 20


def quick_checksum(data: np.ndarray) -> str:
    """XXH3 of bytes, uint8 of one dimension: 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(data.data)


def checksum(data: np.ndarray) -> str:
    """SHA-256 of bytes, uint8 of one dimension: 64 hexadecimal digits."""
    return hashlib.sha256(data.data).hexdigest()


def file_checksum(path: Path) -> str:
    """SHA-256 of a file, read past the page cache.

    Raises
    ------
    CheckpointMissingError, ReadError
        It cannot be opened or read.
    """
    digest = hashlib.sha256()
    reader = FileReader([path])
    total = path.stat().st_size
    buffer = aligned_buffer(_READ_BYTES + 2 * BLOCK_BYTES)
    try:
        for first in range(0, total, _READ_BYTES):
            digest.update(reader.read(path, first, min(_READ_BYTES, total - first), buffer).data)
    finally:
        reader.close()
    return digest.hexdigest()
