"""``exp`` and ``log`` that give the same bits on every machine, for compiled loops.

Those of numpy, of torch and of the C library choose their code by the processor, and the codes differ in the last bit; a rank
or a tie may hang on that bit. These use additions, multiplications, divisions and shifts of exponents alone, which IEEE 754
rounds alike everywhere, in an order that is fixed: numba fuses and reorders nothing unless it is told to.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from swapless.compiled import kernel

_LN2 = 0.6931471805599453
_LN2_HIGH = 0.693147180558298714458942413330078125
"""The first 38 bits of ln 2: its product with a whole number of up to 14 bits is exact."""
_LN2_LOW = 1.6465949582897082e-12
_SQRT2 = 1.4142135623730951
_LN2_HIGH32 = np.float32(0.693145751953125)
_LN2_LOW32 = np.float32(1.42860677e-06)
_MOST32 = np.float32(88.0)

_compiled: Any = kernel(error_model="numpy")


@_compiled
def exp(x: float) -> float:
    """e to the power of ``x``, float64, to about one unit in the last place; 0 below -700, and as at 700 above it."""
    x = np.float64(x)
    if x < -700.0:
        return 0.0
    x = min(x, 700.0)
    whole = np.floor(x / _LN2 + 0.5)
    r = (x - whole * _LN2_HIGH) - whole * _LN2_LOW
    total = 1.0
    for step in range(14, 0, -1):
        total = 1.0 + total * r / step
    return total * np.int64((np.int64(whole) + 1023) << 52).view(np.float64)


@_compiled
def log(x: float) -> float:
    """Natural logarithm of a normal number above 0, float64, to about one unit in the last place."""
    bits = np.float64(x).view(np.int64)
    exponent = (bits >> 52) - 1023
    part = np.int64((bits & ((1 << 52) - 1)) | (1023 << 52)).view(np.float64)
    if part > _SQRT2:
        part *= 0.5
        exponent += 1
    s = (part - 1.0) / (part + 1.0)
    square, total = s * s, 0.0
    for step in range(23, 1, -2):
        total = (total + 1.0 / step) * square
    return exponent * _LN2_HIGH + (2.0 * (s + s * total) + exponent * _LN2_LOW)


@_compiled
def exp32(x: np.float32) -> np.float32:
    """e to the power of ``x``, float32, to about two units in the last place; as at -87 below it and as at 88 above it."""
    x = max(min(np.float32(x), _MOST32), np.float32(-87.0))
    whole = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    r = (x - whole * _LN2_HIGH32) - whole * _LN2_LOW32
    total = np.float32(1 / 5040)
    total = total * r + np.float32(1 / 720)
    total = total * r + np.float32(1 / 120)
    total = total * r + np.float32(1 / 24)
    total = total * r + np.float32(1 / 6)
    total = total * r + np.float32(0.5)
    total = total * r + np.float32(1)
    total = total * r + np.float32(1)
    return total * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


@_compiled
def log32(x: np.float32) -> np.float32:
    """Natural logarithm of a normal number above 0, float32, to about two units in the last place."""
    bits = np.float32(x).view(np.int32)
    exponent = (bits >> np.int32(23)) - np.int32(127)
    part = np.int32((bits & np.int32((1 << 23) - 1)) | np.int32(127 << 23)).view(np.float32)
    if part > np.float32(_SQRT2):
        part *= np.float32(0.5)
        exponent += np.int32(1)
    s = (part - np.float32(1)) / (part + np.float32(1))
    square = s * s
    total = np.float32(1 / 11)
    total = total * square + np.float32(1 / 9)
    total = total * square + np.float32(1 / 7)
    total = total * square + np.float32(1 / 5)
    total = total * square + np.float32(1 / 3)
    whole = np.float32(exponent)
    return whole * _LN2_HIGH32 + (np.float32(2) * (s + s * (total * square)) + whole * _LN2_LOW32)
