"""How the kernels of this package are compiled: to disk, without the interpreter's lock, and without reference counts.

Reference counts would cost an atomic operation for each of some twenty arrays, several times a request: a replay would be
twenty times slower. Leaving them out means that kernels and policy rules may not allocate: their buffers come from outside.
"""

from __future__ import annotations

from typing import Any

from numba import njit

OPTIONS: Any = {"nogil": True, "_nrt": False, "error_model": "numpy", "forceinline": True}
compiled: Any = njit(cache=True, **OPTIONS)
