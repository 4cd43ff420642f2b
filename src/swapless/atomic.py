"""Files that are whole or not there: write under a temporary name, flush, rename; a folder's manifest comes last."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from swapless.errors import OutputExistsError, SwaplessError, UsageError, WriteError, message
from swapless.units import format_size


def check_output(path: str | os.PathLike[str], *, force: bool = False, inputs: Iterable[object] = ()) -> Path:
    """``path`` if a file can be written there; to be asked before the work that fills it.

    Parameters
    ----------
    path : path
        Where the file will stand. Its folder must exist.
    force : bool
        Whether a file that stands there may be replaced.
    inputs : iterable of paths
        What the work reads, files and folders; None among them is left out. The output never replaces one of them, nor a
        file in one of the folders, forced or not, by whatever link it is named.

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
    with saying_where(final):
        found = _status(final)
        if found is not None:
            _check_no_input(final, found, inputs)
            if stat.S_ISDIR(found.st_mode):
                raise UsageError(message("The output must be a file, not a folder.", where=final, step="Add a file name."))
            if not stat.S_ISREG(found.st_mode):
                raise UsageError(message("The output must be a regular file.", where=final, step="Name another output."))
        if os.path.lexists(final) and not force:
            raise OutputExistsError(message("The output exists already.", where=final, step="Add --force to replace it."))
        _check_writable(Path(os.path.realpath(final)).parent, final.parent)
    return final


def check_output_folder(path: str | os.PathLike[str], *, inputs: Iterable[object] = (), ours: Iterable[str] = ()) -> Path:
    """``path`` if a folder of results can be made there, or go on there; to be asked before the work that fills it.

    Parameters
    ----------
    path : path
        The folder. It and folders above it need not exist yet.
    inputs : iterable of paths
        What the work reads; None among them is left out.
    ours : iterable of str
        Names of which the folder of an earlier run of the same work holds at least one.

    Raises
    ------
    OutputExistsError
        The folder holds something else.
    UsageError
        ``path`` is an input, or is there and is no folder.
    WriteError
        Nothing can be written there.
    """
    final = Path(path)
    with saying_where(final):
        found = _status(final)
        if found is not None:
            _check_no_input(final, found, inputs)
            if not stat.S_ISDIR(found.st_mode):
                raise UsageError(message("The output must be a folder, not a file.", where=final, step="Name a new folder."))
            if any(final.iterdir()) and not any((final / name).exists() for name in ours):
                raise OutputExistsError(
                    message("The folder for the output holds something else.", where=final, step="Name a new folder.")
                )
        elif final.is_symlink():
            raise UsageError(message("The output is a link that leads nowhere.", where=final, step="Name a new folder."))
        existing = Path(os.path.realpath(final))
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir():
            raise WriteError(message("A folder cannot be made in a file.", where=existing, step="Name another folder."))
        _check_writable(existing, existing)
    return final


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _check_no_input(final: Path, found: os.stat_result, inputs: Iterable[object]) -> None:
    same = (found.st_dev, found.st_ino)
    for source in inputs:
        known = None if source is None else _status(Path(str(source)))
        if known is None:
            continue
        if (known.st_dev, known.st_ino) == same:
            raise UsageError(message("The output is the input itself.", where=final, step="Name another output."))
        if stat.S_ISDIR(known.st_mode) and stat.S_ISREG(found.st_mode) and same in _files_of(Path(str(source))):
            raise UsageError(message("The output is a file of the input.", where=final, step="Name another output."))


def _files_of(folder: Path) -> Iterator[tuple[int, int]]:
    """Device and number of each file below ``folder``, links followed to files and not to folders."""
    for root, _, names in os.walk(folder):
        for name in names:
            found = _status(Path(root, name))
            if found is not None:
                yield found.st_dev, found.st_ino


def _check_writable(folder: Path, shown: Path) -> None:
    if not folder.is_dir():
        raise WriteError(message("The output's folder does not exist.", where=shown, step=f"Create it: mkdir -p {shown}"))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise WriteError(message("The output's folder is not writable.", where=shown, step="Name another folder."))


class WholeFile:
    """A file that has its name only once it is whole.

    Write to :attr:`part`, then call :meth:`commit`. As a context manager it commits at the end, and after an exception
    (Ctrl-C and a full disk included) removes the part and leaves an older file as it was. A link is followed: what it leads to
    is replaced, and the link stays.

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
        self._final = Path(os.path.realpath(path))
        self.part = _beside(self._final)
        self._mode: int | None = None

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
                if self._mode is not None:  # some writers make files of their own that only their owner may read
                    os.fchmod(descriptor, self._mode)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(self.part, self._final)
            sync_folder(self._final.parent)

    def discard(self) -> None:
        """Remove the part, if there is one."""
        if os.path.lexists(self.part):  # a read-only file system refuses to remove even what is not there
            self.part.unlink(missing_ok=True)

    def __enter__(self) -> WholeFile:
        with saying_where(self.path):
            known = _status(self._final)
            descriptor = os.open(self.part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            self._mode = stat.S_IMODE((os.fstat(descriptor) if known is None else known).st_mode)
            os.close(descriptor)
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


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all.

    Raises
    ------
    WriteError
        The disk is full, or the folder cannot be written.
    """
    # Half of a surrogate pair, as in a file's name that is not UTF-8, has no UTF-8; a page shows it escaped.
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8", errors="backslashreplace"))


def write_json(path: str | os.PathLike[str], document: Any) -> None:
    """Write ``document`` as JSON, whole or not at all.

    Raises
    ------
    WriteError
        The disk is full, or the folder cannot be written.
    """
    write_text(path, json.dumps(document, indent=2) + "\n")


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder that has its name only once it is whole: fill what this yields, and it is renamed at the end.

    After an exception what was written is gone. ``path`` must not exist, or be an empty folder.

    Raises
    ------
    WriteError
        The disk is full, the folder cannot be written, or ``path`` holds something by now.
    """
    final = Path(os.path.realpath(path))
    part = _beside(final)
    with saying_where(path):
        part.mkdir(parents=True)
        try:
            yield part
            for root, _, names in os.walk(part):
                for name in names:
                    sync_folder(Path(root, name))
                sync_folder(root)
            os.replace(part, final)
            sync_folder(final.parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Put a folder's own entries, or a file's bytes, safely on disk, so that a rename in it outlives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(final: Path) -> Path:
    """A name in the same folder that nobody else has, short enough where the final one is."""
    stem = os.fsdecode(os.fsencode(final.name)[:128])
    return final.with_name(f".{stem}.{os.getpid()}-{secrets.token_hex(4)}.part")


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
    errno.ENOTDIR: ("A folder on the way is a file.", "Name another folder."),
    errno.ENOTEMPTY: ("The folder holds something by now.", "Name another folder."),
    errno.ELOOP: ("The links of this path lead in a circle.", "Name another path."),
    errno.ENAMETOOLONG: ("The file name is too long.", "Name a shorter one."),
}
_RUST_CODE = re.compile(r"\(os error (\d+)\)")


@contextlib.contextmanager
def saying_where(path: str | os.PathLike[str], *, nbytes: int = 0) -> Iterator[None]:
    """Turn the operating system's errors into one :class:`WriteError` that names ``path`` and the next step.

    Where the size of the file is known, ``nbytes``, a full disk is told with it.
    """
    try:
        yield
    except SwaplessError:
        raise
    except Exception as error:
        code = _code_of(error)
        if code is None:
            raise
        what, step = _REASONS.get(code, ("The file could not be written.", "Look at the disk."))
        reason = getattr(error, "strerror", None) or (os.strerror(code) if code else str(error))
        allowed = f"{format_size(nbytes)} for this file" if nbytes and code in FULL else None
        raise WriteError(message(what, where=path, got=reason, allowed=allowed, step=step)) from error


def _code_of(error: Exception) -> int | None:
    """Number of the operating system's error behind ``error``; 0 for one without a number, None for another kind of error.

    Libraries in Rust (safetensors) raise errors of their own and name the number in the text; torch raises a RuntimeError
    while it handles the one that the file raised.
    """
    if type(error) is RuntimeError and isinstance(error.__context__, OSError):
        error = error.__context__
    found = _RUST_CODE.search(str(error))
    if isinstance(error, OSError):
        return error.errno or (int(found[1]) if found else 0)
    return int(found[1]) if found else None
