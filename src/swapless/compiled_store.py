"""Compiled code on disk: one file for each function and types of arguments, whole or not there, read only where it is proven.

A file holds a digest of its own name and content, so a truncated, changed or exchanged one counts as not there, and what is
compiled instead replaces it. There is no index: nothing that one function keeps can stand in the way of another. Several
processes may compile the same at once; each writes its file beside and renames it.

Under the cache folder lies ``code/<digest>/``, one folder for each state of the sources; code with parts from outside the
package (plug-ins) lies in ``plugins/`` therein. Of older states the few used last are kept. A process reads a file at once and
never comes back to it, so that it loses nothing but time when another one clears up.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import threading
import time
from functools import cache
from pathlib import Path

from swapless.atomic import WholeFile
from swapless.folders import CACHE_VARIABLE, cache_folder, is_ours, passing_folder

PLUGINS = "plugins"
STATES_KEPT = 4
"""Folders of this many states of the sources stay, the current one among them."""
PLUGIN_FILES_KEPT = 128
_MAGIC = b"swapless code 1\n"
_PROOF_BYTES = 32
_STALE_PART_S = 3600.0
_LONG_S = 2.0

_log = logging.getLogger("swapless.compiled")


def read(state: str, name: str) -> bytes | None:
    """The content kept as ``name`` for a state of the sources, or None."""
    for root in _roots():
        with contextlib.suppress(OSError):
            path = root / state / name
            data = path.read_bytes() if path.is_file() else b""  # never from a pipe or a device
            start = len(_MAGIC) + _PROOF_BYTES
            if data[: len(_MAGIC)] == _MAGIC and data[len(_MAGIC) : start] == _proof(name, data[start:]):
                return data[start:]
    return None


def write(state: str, name: str, content: bytes) -> None:
    """Keep ``content``; where that cannot be, a line says so, once a process, and nothing is kept."""
    root = _root_to_write()
    if root is None:
        return
    path = root / state / name
    try:
        if not path.parent.is_dir():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _clear_up(root, state)
        with WholeFile(path) as file:
            file.part.write_bytes(_MAGIC + _proof(name, content) + content)
        if path.parent.name == PLUGINS:
            _keep_newest(path.parent, PLUGIN_FILES_KEPT)
    except OSError as error:
        _nowhere(f"Compiled code cannot be kept in {root} ({_reason(error)}).")


def _proof(name: str, content: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\0" + content).digest()


@cache
def _roots() -> tuple[Path, ...]:
    """Folders that may hold code of ours: machine code is only taken from where nobody else can put it."""
    named, passing = cache_folder() / "code", passing_folder() / "code"
    found = [named] if is_ours(named) else []
    if passing != named and not passing.parent.is_symlink() and is_ours(passing.parent) and is_ours(passing):
        found.append(passing)
    return tuple(found)


_unwritable = threading.Event()


def _root_to_write() -> Path | None:
    return None if _unwritable.is_set() else _first_writable()


@cache
def _first_writable() -> Path | None:
    """Where code is kept, made if need be: in the cache folder, else in one that passes."""
    named, passing = cache_folder() / "code", passing_folder() / "code"
    trouble = _trouble(named)
    chosen: Path | None = named
    if trouble is not None:
        what = f"Compiled code cannot be kept in {named} ({trouble})."
        if passing == named or passing.parent.is_symlink() or _trouble(passing.parent) or _trouble(passing):
            _nowhere(what)
            return None
        _log.warning("%s It is kept in %s instead; %s names another folder.", what, passing, CACHE_VARIABLE)
        chosen = passing
    _roots.cache_clear()  # a folder that was just made was not there before
    return chosen


def _trouble(folder: Path) -> str | None:
    """Why nothing may be kept in ``folder``, which is made if it can be."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        return _reason(error)
    if not is_ours(folder):
        return "others can write to it, or it belongs to another user"
    return None if os.access(folder, os.W_OK | os.X_OK) else "not writable"


def _reason(error: OSError) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
    return cause.strerror or str(cause)


def _nowhere(what: str) -> None:
    if not _unwritable.is_set():
        _unwritable.set()
        _log.warning("%s It is compiled anew in every process; %s names another folder.", what, CACHE_VARIABLE)


def _clear_up(root: Path, state: str) -> None:
    """Remove what was kept for older states of the sources but for the last few, and what a killed process left behind."""
    with contextlib.suppress(OSError):
        os.utime(root / state)
    states = _by_age(root)
    for old in states[STATES_KEPT:]:
        if old.name != state:
            shutil.rmtree(old, ignore_errors=True)
    for folder in states[:STATES_KEPT]:
        for part in folder.rglob(".*.part"):
            with contextlib.suppress(OSError):
                if time.time() - part.stat().st_mtime > _STALE_PART_S:
                    part.unlink()


def _keep_newest(folder: Path, count: int) -> None:
    for old in _by_age(folder)[count:]:
        with contextlib.suppress(OSError):
            old.unlink()


def _by_age(folder: Path) -> list[Path]:
    """Entries of a folder, the one changed last first."""
    found = []
    for entry in folder.iterdir():
        with contextlib.suppress(OSError):  # another process clears up as well
            found.append((entry.stat().st_mtime_ns, entry))
    return [entry for _, entry in sorted(found, reverse=True)]


class Waiting:
    """Says once in a process that code is being compiled, when that has taken two seconds in all.

    State: the seconds that were spent, and the timer of the compilation under way.
    """

    def __init__(self) -> None:
        self._spent = 0.0
        self._said = False
        self._begun: tuple[object, float, threading.Timer] | None = None

    def begin(self, owner: object) -> None:
        """``owner`` is compiled from now on, which may compile others before it ends."""
        if self._said or self._begun is not None:
            return
        timer = threading.Timer(max(0.0, _LONG_S - self._spent), self._say)
        timer.daemon = True
        timer.start()
        self._begun = (owner, time.monotonic(), timer)

    def end(self, owner: object) -> None:
        """``owner`` is compiled."""
        if self._begun is not None and self._begun[0] == owner:
            _, begun, timer = self._begun
            timer.cancel()
            self._spent += time.monotonic() - begun
            self._begun = None

    def _say(self) -> None:
        self._said = True
        _log.info("Compiling for this processor; what is compiled is kept for the next time.")
