"""The read path: byte ranges of checkpoint files into aligned memory, past the page cache where the file system allows it.

Direct I/O wants offset, length and memory in multiples of the device's block, which safetensors' 8-byte alignment never is;
so a range is widened to whole blocks and read into a bounce buffer, from where the caller copies what it needs. Where direct
I/O is refused (tmpfs, some network file systems), the same call reads buffered and then tells the kernel to drop the pages,
so that the page cache does not grow into a hidden second cache.
"""

from __future__ import annotations

import errno
import mmap
import os
import weakref
from collections.abc import Iterable
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

from swapless.errors import CheckpointMissingError, ReadError, message

BLOCK_BYTES = 4096
"""Every direct read is a multiple of this; a multiple of all common logical block sizes."""

HUGE_PAGE_BYTES = 2 << 20
"""What large buffers are made of. A direct read into pages of 4 KiB is cut into as many pieces: at half the speed or less."""

_HUGE_FROM_BYTES = 1 << 20
_O_DIRECT = getattr(os, "O_DIRECT", 0)


def buffer_bytes(nbytes: int) -> int:
    """Bytes that an :func:`aligned_buffer` of ``nbytes`` has: whole blocks, from 1 MiB on whole huge pages."""
    unit = HUGE_PAGE_BYTES if nbytes >= _HUGE_FROM_BYTES and hasattr(mmap, "MADV_HUGEPAGE") else BLOCK_BYTES
    return max(1, -(-nbytes // unit)) * unit


def aligned_buffer(nbytes: int) -> np.ndarray:
    """Page-aligned uint8 memory of :func:`buffer_bytes`, in huge pages where it is large. The caller owns it."""
    size = buffer_bytes(nbytes)
    if size % HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        raw, unit = np.empty(size + BLOCK_BYTES, np.uint8), BLOCK_BYTES
    else:
        # What lies before the first whole huge page is never touched, and so costs nothing.
        memory = mmap.mmap(-1, size + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        raw, unit = np.frombuffer(memory, np.uint8), HUGE_PAGE_BYTES
    first = -raw.ctypes.data % unit
    return raw[first : first + size]


class _Open(NamedTuple):
    file: FileIO
    size: int
    changed_ns: int
    direct: bool

    @property
    def fd(self) -> int:
        """The descriptor."""
        return self.file.fileno()


class FileReader:
    """Open files of one checkpoint, safe to read from several threads at once.

    Parameters
    ----------
    files : iterable of Path
        Files to open; they stay open until :meth:`close`.
    direct : bool
        Ask for direct I/O; each file falls back to buffered reads by itself where it is refused.

    Raises
    ------
    CheckpointMissingError
        A file cannot be opened.
    """

    def __init__(self, files: Iterable[Path], *, direct: bool = True) -> None:
        self._open: dict[Path, _Open] = {}
        self._forgotten = weakref.finalize(self, _close_all, self._open)  # a reader that nobody closes closes itself
        try:
            for path in files:
                self._open[path] = _open(path, direct and _O_DIRECT != 0)
        except OSError as error:
            self.close()
            raise CheckpointMissingError(
                message("A shard cannot be opened.", where=error.filename, got=error.strerror)
            ) from error

    @property
    def direct(self) -> bool:
        """Whether every file is read past the page cache."""
        return all(opened.direct for opened in self._open.values())

    def read(self, path: Path, offset: int, nbytes: int, buffer: np.ndarray) -> np.ndarray:
        """Read ``nbytes`` at ``offset`` and return them as a view into ``buffer``.

        ``buffer`` is page-aligned uint8 (:func:`aligned_buffer`) of at least ``nbytes + 2 * BLOCK_BYTES``; its content
        changes, the reader's state does not.

        Raises
        ------
        ReadError
            The file was truncated, replaced or unlinked since it was opened, or the device failed.
        """
        opened = self._open[path]
        self._check_unchanged(path, opened)
        start = offset // BLOCK_BYTES * BLOCK_BYTES
        wanted = offset + nbytes - start
        rounded = -(-wanted // BLOCK_BYTES) * BLOCK_BYTES
        view = buffer.data
        done = 0
        while done < wanted:
            try:
                got = os.preadv(opened.fd, [view[done:rounded]], start + done)
            except OSError as error:
                if error.errno == errno.EINVAL and opened.direct:
                    opened = self._open[path] = _reopen_buffered(path, opened)
                    continue
                raise ReadError(
                    message("A read of expert weights failed.", where=f"{path}, byte {start + done}", got=error.strerror)
                ) from error
            whole = done + got
            if opened.direct and whole < wanted:
                whole = whole // BLOCK_BYTES * BLOCK_BYTES  # a short direct read must go on from a whole block
            if whole <= done:  # nothing, or the piece of a block that only the end of a file leaves
                self._check_unchanged(path, opened)  # it may have been cut since the read began, and that says more
                raise ReadError(
                    message(
                        "A shard is shorter than when it was opened.",
                        where=path,
                        got=f"{start + done + got} bytes",
                        allowed=f"at least {offset + nbytes} bytes",
                        step="Restore the file and load the model again.",
                    )
                )
            done = whole
        if not opened.direct:
            _drop_pages(opened.fd, start, rounded)
        return buffer[offset - start : offset - start + nbytes]

    def _check_unchanged(self, path: Path, opened: _Open) -> None:
        now = os.fstat(opened.fd)
        if now.st_nlink and now.st_size == opened.size and now.st_mtime_ns == opened.changed_ns:
            return
        if not now.st_nlink:
            what, got = "A shard was unlinked or replaced while the model was in use.", "no name left"
        elif now.st_size < opened.size:
            what, got = "A shard was truncated while the model was in use.", f"{now.st_size} of {opened.size} bytes"
        else:
            what, got = "A shard was written to while the model was in use.", f"{now.st_size} bytes"
        raise ReadError(message(what, where=path, got=got, step="Restore the file and load the model again."))

    def close(self) -> None:
        """Close every file. May be called twice."""
        _close_all(self._open)
        self._forgotten.detach()


def _close_all(files: dict[Path, _Open]) -> None:
    while files:
        files.popitem()[1].file.close()


def _open_file(path: Path, flags: int) -> FileIO:
    # In one expression of C functions: Ctrl-C in between would lose a bare descriptor, which nobody closes.
    return next(map(FileIO, map(os.open, [path], [flags])))


def _open(path: Path, direct: bool) -> _Open:
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    if direct:
        try:
            file = _open_file(path, flags | _O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            direct = False
    if not direct:
        file = _open_file(path, flags)
    stat = os.fstat(file.fileno())
    return _Open(file, stat.st_size, stat.st_mtime_ns, direct)


def _reopen_buffered(path: Path, opened: _Open) -> _Open:
    # Some file systems accept the flag and refuse the read. The old descriptor may serve another thread right now: it is
    # pointed at the buffered file instead of being closed under it.
    fresh = _open(path, direct=False)
    os.dup2(fresh.fd, opened.fd, inheritable=False)
    fresh.file.close()
    return opened._replace(direct=False)


def _drop_pages(fd: int, start: int, nbytes: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, start, nbytes, os.POSIX_FADV_DONTNEED)
