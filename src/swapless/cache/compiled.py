"""How the kernels of this package are compiled: always into each other, and without reference counts.

Reference counts would cost an atomic operation for each of some twenty arrays, several times a request: a replay would be
twenty times slower. Leaving them out means that kernels and policy rules may not allocate: their buffers come from outside.
"""

from __future__ import annotations

from typing import Any

from swapless.compiled import kernel

_OPTIONS: Any = {"_nrt": False, "error_model": "numpy"}
_INLINED: Any = {**_OPTIONS, "forceinline": True}
OPTIONS: Any = {**_INLINED, "nogil": True}
compiled: Any = kernel(**_INLINED)
"""For kernels and rules that are called for every request: always inlined."""
compiled_apart: Any = kernel(**_OPTIONS)
"""For kernels that do much at each call: machine code of their own, compiled once."""
