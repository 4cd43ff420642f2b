"""The allocator of the C library: what it gives back to the system, and when.

glibc keeps large blocks that were freed, to hand them out again, and what small ones lie between cannot be given back. While
a prompt is read, many large values come and go: each gets pages of its own then, and leaves none behind. A decode step asks
for the same few values again and again, and takes them faster from what is kept. Neither changes a result.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1

PROMPT_BYTES = 128 << 10
"""While a prompt is read, a value of so many bytes has pages of its own: glibc's first threshold. With one of 1 MiB, what
products leave behind lay between values of half as much, and a prompt of 8,192 tokens left 16 MiB that nothing could use."""

KEPT_BYTES = 32 << 20
"""At all other times: the most that glibc has for this, and comes to by itself."""


@cache
def _libc() -> Any:
    """The C library if it is glibc, else None: others know neither call, or make nothing of it."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "gnu_get_libc_version") else None


def pages_of_their_own(large: bool) -> None:
    """Whether large values get pages of their own from now on, which go back as soon as they are freed."""
    libc = _libc()
    if libc is not None:
        libc.mallopt(_MMAP_THRESHOLD, PROMPT_BYTES if large else KEPT_BYTES)
        libc.mallopt(_TRIM_THRESHOLD, 2 * (PROMPT_BYTES if large else KEPT_BYTES))


def give_back() -> None:
    """Give all whole pages that hold nothing back to the system."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)


class TooMuchError(Exception):
    """What ran in :func:`most_memory` asked for more."""


@contextmanager
def most_memory(nbytes: int | None) -> Iterator[None]:
    """Refuse this process more memory than so many bytes beyond what it has, for as long as it is open; None refuses nothing.

    A memory cgroup kills, and a machine that is full swaps; this way whoever asks is told. Where the system knows no such limit
    nothing is refused.

    Raises
    ------
    TooMuchError
        More was asked for, and torch or Python said so.
    """
    if nbytes is None or not sys.platform.startswith("linux"):
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    rows = Path("/proc/self/status").read_text().splitlines()
    there = next((int(row.split()[1]) << 10 for row in rows if row.startswith("VmData:")), None)
    bounds = [bound for bound in (soft, hard) if bound != resource.RLIM_INFINITY]
    if there is None or any(there + nbytes >= bound for bound in bounds):
        yield
        return
    resource.setrlimit(resource.RLIMIT_DATA, (there + nbytes, hard))
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or "memory" in str(error):
            raise TooMuchError from error
        raise
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def madvise_away(memory: np.ndarray) -> None:
    """Give whole pages, uint8 of our own and aligned to pages, back to the system: they read as zeros afterwards.

    Where the system knows no such call they stay.
    """
    if len(memory) and sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(memory.ctypes.data), ctypes.c_size_t(len(memory)), mmap.MADV_DONTNEED)
