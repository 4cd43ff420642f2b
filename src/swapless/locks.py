"""One process at a time: a lock file that says whose it is, and that the system lets go of when its owner dies."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import stat
import weakref
from datetime import UTC, datetime
from pathlib import Path

from swapless.atomic import saying_where
from swapless.errors import LockedError, SwaplessError, WriteError, message
from swapless.untrusted import Table, parse_json

_MOST_BYTES = 4096
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class Lock:
    """The lock file at ``path``, held from now on until :meth:`release`, or until the process ends in whatever way.

    Parameters
    ----------
    path : path
        A file beside what is guarded. It is made, and removed again when the lock is released. One that a killed process left
        is taken over.
    doing : str
        What the owner does, in a word or two, for whoever finds the lock taken.

    Attributes
    ----------
    held : bool
        Whether others are kept out: False on a file system that knows no locks.

    Raises
    ------
    LockedError
        Another process has it (or another part of this one); the message names it.
    WriteError
        The file cannot be made, or is no regular file.
    """

    def __init__(self, path: str | os.PathLike[str], doing: str) -> None:
        self.path = Path(path)
        with saying_where(self.path):
            descriptor, self.held = _acquire(self.path, doing)
        self._release = weakref.finalize(self, _release, descriptor, self.path, os.getpid())

    def release(self) -> None:
        """Let others in. May be called twice."""
        self._release()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _acquire(path: Path, doing: str) -> tuple[int, bool]:
    import fcntl

    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise WriteError(message("The lock file is no regular file.", where=path, step="Remove it."))
            held = True
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LockedError(
                    message(
                        "Another process is at work here.",
                        where=path.parent,
                        got=_owner(descriptor),
                        step="Wait until it has ended, or name another folder.",
                    )
                ) from None
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                held = False
            if not _is(path, descriptor):  # the owner before us removed the file between our two calls
                os.close(descriptor)
                continue
            owner = {
                "doing": doing,
                "process": os.getpid(),
                "host": platform.node(),
                "since": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            try:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(owner).encode(), 0)
            except OSError:
                path.unlink(missing_ok=True)  # a full disk: nothing is left of what failed
                raise
            return descriptor, held
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            raise


def _release(descriptor: int, path: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked child has a copy of the descriptor, and the lock is not its own
        with contextlib.suppress(OSError):
            if _is(path, descriptor):
                path.unlink()
    os.close(descriptor)


def _is(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _owner(descriptor: int) -> str:
    """Who holds the lock, as its file says; it may be about to be written."""
    try:
        raw = os.pread(descriptor, _MOST_BYTES, 0)
        table = Table(parse_json(raw, where="the lock file"), where="the lock file")
        process, doing = table.integer("process"), table.text("doing", pattern=r"[\w ]+", maximum=60)
        host, since = (table.text(key, pattern=r"[\w.:+-]*", maximum=256) for key in ("host", "since"))
    except SwaplessError:
        return "a process that does not say which"
    return f"process {process} on {host or 'this machine'}, since {since}: {doing}"
