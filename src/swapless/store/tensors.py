"""Whole tensors of a checkpoint, read when they are asked for, past the page cache, into 64-byte aligned memory.

Non-expert weights come this way. Mapping their files instead would fill the page cache with whatever lies around them,
experts included, and a memory cap counts that.
"""

from __future__ import annotations

from typing import final

import numpy as np

from swapless.store.headers import TensorRef
from swapless.store.read import BLOCK_BYTES, FileReader, aligned_buffer

_CHUNK_BYTES = 2 << 20
_ALIGNMENT = 64


@final
class TensorReader:
    """Reads tensors by reference; safe to use from several threads at once.

    Parameters
    ----------
    reader : FileReader
        Open files that hold the tensors; whoever made it closes it.
    """

    def __init__(self, reader: FileReader) -> None:
        self._reader = reader

    def read(self, ref: TensorRef) -> np.ndarray:
        """The tensor's bytes: uint8 (nbytes,), aligned, the caller's own.

        Raises
        ------
        ReadError
            A file changed under us or a read failed.
        """
        raw = np.empty(ref.nbytes + _ALIGNMENT, np.uint8)
        first = -raw.ctypes.data % _ALIGNMENT
        out = raw[first : first + ref.nbytes]
        bounce = aligned_buffer(min(_CHUNK_BYTES, ref.nbytes) + 2 * BLOCK_BYTES)
        for start in range(0, ref.nbytes, _CHUNK_BYTES):
            size = min(_CHUNK_BYTES, ref.nbytes - start)
            out[start : start + size] = self._reader.read(ref.file, ref.offset + start, size, bounce)
        return out
