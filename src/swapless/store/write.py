"""Write large files past the page cache, whole or not at all: what is written once and read later need not stay in memory.

Under a memory cap that counts page cache, buffered writes of a checkpoint fill the cap with pages that nobody needs.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from swapless.atomic import FULL, WholeFile, saying_where
from swapless.errors import WriteError
from swapless.store.read import BLOCK_BYTES, aligned_buffer

_BUFFER_BYTES = 4 << 20


class FileWriter:
    """A file of known size that appears under its name when :meth:`commit` is called, and not before.

    Parameters
    ----------
    path : Path
        Its name in the end; an older file of that name is replaced.
    nbytes : int
        Its size: the room is taken at once, so that a full disk is met before the work and not after it.

    Raises
    ------
    WriteError
        No room, or no permission.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path = path
        self._whole = WholeFile(path)
        self._nbytes = nbytes
        self._buffer = aligned_buffer(_BUFFER_BYTES)
        self._held = 0
        self._written = 0
        self._fd = -1
        self._over = False
        direct = getattr(os, "O_DIRECT", 0)
        flags = os.O_CREAT | os.O_TRUNC | os.O_WRONLY | getattr(os, "O_CLOEXEC", 0)

        def begin() -> None:
            try:
                self._fd = os.open(self._whole.part, flags | direct, 0o666)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._fd = os.open(self._whole.part, flags, 0o666)  # no direct I/O on this file system
            if nbytes and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._fd, 0, nbytes)

        self._trying(begin)

    def write(self, data: np.ndarray) -> None:
        """Append ``data``, uint8 of one dimension.

        Raises
        ------
        WriteError
            The disk is full or failed; the file is abandoned.
        """
        at = 0
        while at < len(data):
            size = min(len(data) - at, _BUFFER_BYTES - self._held)
            self._buffer[self._held : self._held + size] = data[at : at + size]
            self._held += size
            at += size
            if self._held == _BUFFER_BYTES:
                self._flush()

    def commit(self) -> None:
        """Put everything safely on disk and give the file its name.

        Raises
        ------
        WriteError
            The disk is full or failed; the file is abandoned.
        """
        whole = self._written + self._held
        assert whole == self._nbytes, f"{whole} bytes were written to a file of {self._nbytes}"
        padded = -(-self._held // BLOCK_BYTES) * BLOCK_BYTES
        self._buffer[self._held : padded] = 0
        self._held = padded
        self._flush()

        def end() -> None:
            os.ftruncate(self._fd, whole)
            os.close(self._fd)
            self._fd = -1
            self._whole.commit()
            self._over = True

        self._trying(end)

    def abandon(self) -> None:
        """Close and remove what is not whole; nothing after :meth:`commit`."""
        if self._over:
            return
        self._over = True
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._whole.discard()

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.abandon()

    def _flush(self) -> None:
        def write() -> None:
            done = 0
            while done < self._held:
                done += self._write_at(self._buffer[done : self._held], self._written + done)

        self._trying(write)
        self._written += self._held
        self._held = 0

    def _write_at(self, data: np.ndarray, offset: int) -> int:
        try:
            written = os.pwrite(self._fd, data.data, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._reopen_buffered()  # some file systems accept the flag and refuse the write
            written = os.pwrite(self._fd, data.data, offset)
        if written % BLOCK_BYTES:
            self._reopen_buffered()
        return written

    def _reopen_buffered(self) -> None:
        os.close(self._fd)
        self._fd = os.open(self._whole.part, os.O_WRONLY | getattr(os, "O_CLOEXEC", 0))

    def _trying(self, step: Callable[[], Any]) -> None:
        try:
            with saying_where(self.path, nbytes=self._nbytes):
                step()
        except WriteError:
            with contextlib.suppress(OSError):
                self.abandon()
            raise


@contextlib.contextmanager
def saying_that_it_goes_on() -> Iterator[None]:
    """Let an error that ends the writing of a packed store say that nothing is lost."""
    try:
        yield
    except WriteError as error:
        full = isinstance(error.__cause__, OSError) and error.__cause__.errno in FULL
        what = "There is no room for the packed store." if full else "The packed store cannot be written."
        kept = "What is done is kept, and the same command goes on from there."
        raise WriteError(f"{what} {error} {kept}") from error.__cause__
