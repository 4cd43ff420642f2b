"""How the kernels of this package are compiled: to disk, without the interpreter's lock, and without reference counts.

Reference counts would cost an atomic operation for each of some twenty arrays, several times a request: a replay would be
twenty times slower. Leaving them out means that kernels and policy rules may not allocate: their buffers come from outside.
"""

from __future__ import annotations

from typing import Any

from numba import njit

_OPTIONS: Any = {"nogil": True, "_nrt": False, "error_model": "numpy"}
OPTIONS: Any = {**_OPTIONS, "forceinline": True}
compiled: Any = njit(cache=True, **OPTIONS)
"""For kernels and rules that are called for every request: always inlined."""
compiled_apart: Any = njit(cache=True, **_OPTIONS)
"""For kernels that do much at each call: machine code of their own, compiled once."""
