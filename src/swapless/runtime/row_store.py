"""Rows of routing in bounded memory: what is too much goes to a temporary file, and what is too much for that is dropped."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections import deque

import numpy as np

MEMORY_BYTES = 4 << 20
"""What the rows may take in memory; the rest lies in a file."""

FILE_BYTES = 1 << 30
"""What they may take on disk."""

_LEAST_ROWS = 16
_MEMORY_CHUNKS = 4


class RowStore:
    """Records of one type, numbered as they come, the oldest dropped when there is no more room.

    Parameters
    ----------
    record : dtype
        Of a row.
    max_rows : int
        Most rows kept, about.
    memory_bytes, file_bytes : int
        Most bytes in memory and on disk. The file has no name, and is gone with the process whatever happens.

    Attributes
    ----------
    record : dtype
        As given.
    first, stop : int
        Number of the oldest row kept, and of the next one to come.
    """

    def __init__(
        self, record: np.dtype, max_rows: int, *, memory_bytes: int = MEMORY_BYTES, file_bytes: int = FILE_BYTES
    ) -> None:
        self.record = record
        self._chunk_rows = min(max(_LEAST_ROWS, memory_bytes // _MEMORY_CHUNKS // record.itemsize), max(1, max_rows))
        self._max_chunks = -(-max_rows // self._chunk_rows) + 1
        self._file_chunks = file_bytes // (self._chunk_rows * record.itemsize)
        self._file: int | None = None
        self._free_places: list[int] = []
        self._next_place = 0
        self._chunks: deque[np.ndarray | int] = deque()
        self.first = self.stop = 0

    def clear(self) -> None:
        """Drop all rows; numbers go on."""
        self._free_places += [chunk for chunk in self._chunks if isinstance(chunk, int)]
        self._chunks.clear()
        self.first = self.stop

    def begin_child(self) -> None:
        """The process was forked, and this is the child: it gets a copy of the file, which the parent goes on to write."""
        if self._file is None:
            return
        shared, own = self._file, _nameless_file()
        size = self._chunk_rows * self.record.itemsize
        for place in range(self._next_place):
            os.pwrite(own, os.pread(shared, size, place * size), place * size)
        self._file = own
        weakref.finalize(self, os.close, own)

    def append(self, records: np.ndarray) -> None:
        """Add records (n,)."""
        while len(records):
            used = (self.stop - self.first) % self._chunk_rows if self._chunks else 0
            if used == 0:
                self._make_room()
                self._chunks.append(np.empty(self._chunk_rows, self.record))
            chunk, more = self._chunks[-1], min(len(records), self._chunk_rows - used)
            assert isinstance(chunk, np.ndarray)
            chunk[used : used + more] = records[:more]
            self.stop += more
            records = records[more:]

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The records of these rows int64 (n,), as they are numbered."""
        taken = np.empty(len(rows), self.record)
        number, place = np.divmod(rows - self.first, self._chunk_rows)
        for chunk in np.unique(number):
            wanted = number == chunk
            taken[wanted] = self._load(self._chunks[chunk])[place[wanted]]
        return taken

    def _make_room(self) -> None:
        in_memory = [place for place, chunk in enumerate(self._chunks) if isinstance(chunk, np.ndarray)]
        if len(in_memory) >= _MEMORY_CHUNKS and not self._to_file(in_memory[0]):
            self._drop()
        if len(self._chunks) >= self._max_chunks:
            self._drop()

    def _drop(self) -> None:
        chunk = self._chunks.popleft()
        self.first += self._chunk_rows
        if isinstance(chunk, int):
            self._free_places.append(chunk)

    def _to_file(self, number: int) -> bool:
        chunk = self._chunks[number]
        assert isinstance(chunk, np.ndarray)
        place = self._free_places.pop() if self._free_places else self._next_place
        if place >= self._file_chunks:
            return False
        try:
            if self._file is None:
                self._file = _nameless_file()
                weakref.finalize(self, os.close, self._file)
            data = chunk.tobytes()
            if os.pwrite(self._file, data, place * len(data)) < len(data):
                raise OSError("disk full")
        except OSError:
            self._free_places.append(place)
            return False
        self._next_place = max(self._next_place, place + 1)
        self._chunks[number] = place
        return True

    def _load(self, chunk: np.ndarray | int) -> np.ndarray:
        if isinstance(chunk, np.ndarray):
            return chunk
        assert self._file is not None
        size = self._chunk_rows * self.record.itemsize
        return np.frombuffer(os.pread(self._file, size, chunk * size), self.record)


def _nameless_file() -> int:
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
