"""Whole tensors of a checkpoint, read when they are asked for, past the page cache, into 64-byte aligned memory.

Non-expert weights come this way. Mapping their files instead would fill the page cache with whatever lies around them,
experts included, and a memory cap counts that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import numpy as np

from swapless.errors import CheckpointCorruptError, message
from swapless.store.checksum import quick_checksum
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
    checksums : mapping of str to str, optional
        Quick checksums of tensors by key, as a packed store has them: what is read is held against them.
    """

    def __init__(self, reader: FileReader, checksums: Mapping[str, str] | None = None) -> None:
        self._reader = reader
        self._checksums = checksums or {}
        self._damaged: list[str] = []

    def check(self) -> None:
        """Refuse what was read so far if some of it was damaged. transformers may have hidden the error of the read itself.

        Raises
        ------
        CheckpointCorruptError
            A tensor was not what was packed.
        """
        if self._damaged:
            raise CheckpointCorruptError(
                message(
                    "Weights of the packed store are not what was packed.",
                    where=", ".join(self._damaged[:4]),
                    step="Run swapless verify on the folder, and pack the checkpoint again.",
                )
            )

    def read(self, ref: TensorRef) -> np.ndarray:
        """The tensor's bytes: uint8 (nbytes,), aligned, the caller's own.

        Raises
        ------
        ReadError
            A file changed under us or a read failed.
        CheckpointCorruptError
            The tensor is not what was packed.
        """
        raw = np.empty(ref.nbytes + _ALIGNMENT, np.uint8)
        first = -raw.ctypes.data % _ALIGNMENT
        out = raw[first : first + ref.nbytes]
        bounce = aligned_buffer(min(_CHUNK_BYTES, ref.nbytes) + 2 * BLOCK_BYTES)
        for start in range(0, ref.nbytes, _CHUNK_BYTES):
            size = min(_CHUNK_BYTES, ref.nbytes - start)
            out[start : start + size] = self._reader.read(ref.file, ref.offset + start, size, bounce)
        if ref.key in self._checksums and quick_checksum(out) != self._checksums[ref.key]:
            self._damaged.append(f"{ref.key} in {ref.file}")
            self.check()
        return out
