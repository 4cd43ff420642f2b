"""A call of the kernels as they read it: one row of int64, filled in here and walked by the threads.

Fields are named by their byte. First come counters that threads write, in lines of the cache of their own, then what is the
same for all experts (among it two descriptions of matrices), then a line for each expert.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from swapless.runtime.kernels_vector import ROUNDED_BLOCK_BYTES
from swapless.store.matrix import COLUMN_BLOCK, MatrixLayout

LINE = 64
NEXT, ROUNDED_COUNT, FIELDS = 0, LINE, 2 * LINE
TOKENS_IN_ALL, INTO_TASKS, OUT_TASKS, FLOATS, ROUNDED, ACTIVATION, OUTPUT_STRIDE, TILES = (FIELDS + 8 * i for i in range(8))
INTO, OUT = 3 * LINE, 4 * LINE
EXPERTS = 5 * LINE
BITS, COLUMN_BLOCKS, GROUP_SHIFT, SCALES, ZEROS, BLOCKS = (8 * i for i in range(6))
GATE, UP, DOWN, TOKENS, INPUT, INNER, OUTPUT, INNER_COUNT = (8 * i for i in range(8))


def rounded_bytes(layout: MatrixLayout) -> int:
    """Bytes of one token's rounded inputs for a matrix in ``layout``."""
    return layout.padded_columns // COLUMN_BLOCK * ROUNDED_BLOCK_BYTES


def experts_of(call: np.ndarray) -> np.ndarray:
    """The lines of the experts, int64 (experts, fields)."""
    return call[EXPERTS // 8 :].reshape(-1, LINE // 8)


def new_call(out: MatrixLayout, into: MatrixLayout | None, activation: int, experts: int) -> np.ndarray:
    """A call of so many experts whose addresses and tokens are still to be filled in; without ``into``, of plain products."""
    return _template(out, into, activation, experts).copy()


@lru_cache(maxsize=256)
def _template(out: MatrixLayout, into: MatrixLayout | None, activation: int, experts: int) -> np.ndarray:
    call = np.zeros((EXPERTS + experts * LINE) // 8, np.int64)
    for at, layout in ((INTO, into), (OUT, out)):
        if layout is not None:
            call[at // 8 : at // 8 + 6] = (
                layout.bits,
                layout.padded_columns // COLUMN_BLOCK,
                (layout.group // COLUMN_BLOCK).bit_length() - 1,
                layout.scales_offset,
                layout.zeros_offset,
                layout.row_blocks,
            )
    call[ACTIVATION // 8], call[OUTPUT_STRIDE // 8] = activation, out.padded_rows
    call[INTO_TASKS // 8] = 0 if into is None else experts * into.row_blocks
    call[OUT_TASKS // 8] = experts * out.row_blocks
    return call
