"""Where this project keeps what it may make anew: measured figures and compiled code. One folder, found in one way."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

CACHE_VARIABLE = "SWAPLESS_CACHE_DIR"
"""Environment variable that names the cache folder itself."""


def cache_folder() -> Path:
    """The user's cache folder for this project; it need not exist, nor be one that can be written.

    ``SWAPLESS_CACHE_DIR`` names it. Otherwise it stands where the system keeps such folders (on Linux
    ``$XDG_CACHE_HOME/swapless`` or ``~/.cache/swapless``), or for a user without a home in :func:`passing_folder`.
    """
    named = os.environ.get(CACHE_VARIABLE)
    try:
        if named:
            return Path(named).expanduser().absolute()
        from platformdirs import user_cache_path  # not before it is needed: the command line starts without

        found = user_cache_path("swapless", appauthor=False)
    except RuntimeError:
        return passing_folder()  # a user without a home
    # Other versions leave "~" in the name then, and a relative name would follow the working folder about.
    return found if found.is_absolute() else passing_folder()


def passing_folder() -> Path:
    """A folder of this user's under the system's folder for temporary files; it need not exist either."""
    try:
        parent = tempfile.gettempdir()
    except FileNotFoundError:
        parent = "/tmp"  # no folder at all can be written: whoever tries will be told
    return Path(parent) / f"swapless-{os.getuid()}"


def is_ours(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder, which exists, is this user's or the system's, and nobody else can write to it."""
    try:
        found = Path(folder).stat()
    except OSError:
        return False
    return found.st_uid in (os.getuid(), 0) and not found.st_mode & 0o022
