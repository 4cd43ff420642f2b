"""How the kernels of this package are compiled: to disk, without the interpreter's lock, and without reference counts.

Reference counts would cost an atomic operation for each of some twenty arrays, several times a request: a replay would be
twenty times slower. Leaving them out means that kernels and policy rules may not allocate: their buffers come from outside.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from numba import njit


def drop_stale(package: Path) -> int:
    """Delete machine code kept beside the sources of ``package`` that is older than any of them; returns how many files.

    Numba asks whether the file of a kernel has changed, not whether one has that the kernel inlines. A policy whose arrays
    had changed their shape would then be served by yesterday's code, which writes past their ends.
    """
    kept = package / "__pycache__"
    if not os.access(kept, os.W_OK):
        return 0
    newest = max(file.stat().st_mtime_ns for file in package.glob("*.py"))
    stale = [file for file in kept.glob("*.nb[ci]") if file.stat().st_mtime_ns < newest]
    for file in stale:
        file.unlink(missing_ok=True)
    return len(stale)


drop_stale(Path(__file__).resolve().parent)

_OPTIONS: Any = {"nogil": True, "_nrt": False, "error_model": "numpy"}
OPTIONS: Any = {**_OPTIONS, "forceinline": True}
compiled: Any = njit(cache=True, **OPTIONS)
"""For kernels and rules that are called for every request: always inlined."""
compiled_apart: Any = njit(cache=True, **_OPTIONS)
"""For kernels that do much at each call: machine code of their own, compiled once."""
