"""Files that are whole or not there: write under a temporary name, flush, rename; a folder's manifest comes last."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from swapless.errors import OutputExistsError, SwaplessError, UsageError, WriteError, message
from swapless.units import format_size


def check_output(path: str | os.PathLike[str], *, force: bool = False, inputs: tuple[object, ...] = ()) -> Path:
    """``path`` if a file can be written there; to be asked before the work that fills it.

    Parameters
    ----------
    path : path
        Where the file will stand. Its folder must exist.
    force : bool
        Whether a file that stands there may be replaced.
    inputs : tuple of paths
        What the work reads. The output is never one of them, forced or not.

    Raises
    ------
    OutputExistsError
        There is a file already, and ``force`` is not given.
    UsageError
        ``path`` is an input, or is there and is no regular file.
    WriteError
        The folder does not exist, or nothing can be written there.
    """
    final = Path(path)
    for source in inputs:
        if source is not None and final.exists() and Path(str(source)).exists() and final.samefile(str(source)):
            raise UsageError(message("The output is the input itself.", where=final, step="Name another output."))
    if final.is_dir():
        raise UsageError(message("The output must be a file, and this is a folder.", where=final, step="Add a file name."))
    if final.exists() and not final.is_file():
        raise UsageError(message("The output must be a regular file.", where=final, step="Name another output."))
    if final.exists() and not force:
        raise OutputExistsError(message("The output exists already.", where=final, step="Add --force to replace it."))
    parent = final.parent
    if not parent.is_dir():
        raise WriteError(message("The output's folder does not exist.", where=parent, step=f"Create it: mkdir -p {parent}"))
    if not os.access(parent, os.W_OK):
        raise WriteError(message("The output's folder is not writable.", where=parent, step="Name another folder."))
    return final


class WholeFile:
    """A file that has its name only once it is whole.

    Write to :attr:`part`, then call :meth:`commit`. As a context manager it commits at the end, and after an exception
    (Ctrl-C and a full disk included) removes the part and leaves an older file as it was.

    Parameters
    ----------
    path : path
        The final name.

    Examples
    --------
    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "note.txt"
    >>> with WholeFile(target) as file:
    ...     _ = file.part.write_text("whole")
    >>> target.read_text()
    'whole'
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.part = self.path.with_name(f".{self.path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")

    def commit(self) -> None:
        """Put the part safely on disk and give it its name.

        Raises
        ------
        WriteError
            The disk is full, or the folder cannot be written.
        """
        with saying_where(self.path):
            descriptor = os.open(self.part, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(self.part, self.path)
            sync_folder(self.path.parent)

    def discard(self) -> None:
        """Remove the part, if there is one."""
        self.part.unlink(missing_ok=True)

    def __enter__(self) -> WholeFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trail: object) -> None:
        try:
            if kind is None:
                self.commit()
        finally:
            self.discard()


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path`` and rename it only once it is safely on disk.

    State changes only on success: after an exception (Ctrl-C and a full disk included) the temporary file is gone and an
    older ``path`` is as it was.

    Raises
    ------
    WriteError
        The disk is full, or the folder cannot be written.
    """
    with WholeFile(path) as file, saying_where(file.path):
        write(file.part)


def write_json(path: str | os.PathLike[str], document: Any) -> None:
    """Write ``document`` as JSON, whole or not at all.

    Raises
    ------
    WriteError
        The disk is full, or the folder cannot be written.
    """
    write_whole(path, lambda part: part.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8"))


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Put a folder's own entries safely on disk, so that a rename in it outlives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors that say that there is no more room."""

_REASONS = {
    errno.ENOSPC: ("The disk is full.", "Free some space, or name another folder."),
    errno.EDQUOT: ("The disk quota is used up.", "Free some space, or name another folder."),
    errno.EFBIG: ("The file is larger than a file may be here.", "Raise the limit (ulimit -f), or name another folder."),
    errno.EROFS: ("The file system is read-only.", "Name another folder."),
    errno.EACCES: ("The folder is not writable.", "Name another folder."),
    errno.EPERM: ("The folder is not writable.", "Name another folder."),
    errno.ENOENT: ("The folder does not exist.", "Create it first."),
    errno.ENAMETOOLONG: ("The file name is too long.", "Name a shorter one."),
}


@contextlib.contextmanager
def saying_where(path: str | os.PathLike[str], *, nbytes: int = 0) -> Iterator[None]:
    """Turn the operating system's errors into one :class:`WriteError` that names ``path`` and the next step.

    Where the size of the file is known, ``nbytes``, a full disk is told with it.
    """
    try:
        yield
    except SwaplessError:
        raise
    except OSError as error:
        what, step = _REASONS.get(error.errno or 0, ("The file could not be written.", "Look at the disk."))
        allowed = f"{format_size(nbytes)} for this file" if nbytes and error.errno in FULL else None
        raise WriteError(message(what, where=path, got=error.strerror or str(error), allowed=allowed, step=step)) from error
