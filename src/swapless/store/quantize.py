"""Round a matrix to 8 or 4 bits, straight into the layout of :mod:`~swapless.store.matrix`.

8 bits: the largest magnitude of a row becomes 127. 4 bits: the range of a group of columns, zero included, is cut into 15 equal
steps, and the step is rounded to bfloat16 before the weights are rounded to it, so that its own rounding costs nothing. Nothing
depends on the machine: the same weights always give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import numpy as np
from numba import njit

from swapless.errors import CheckpointCorruptError, message
from swapless.store.matrix import ROW_BLOCK, MatrixLayout

_compiled: Callable[..., Any] = njit(cache=True, nogil=True, error_model="numpy", fastmath={"nnan", "nsz"})

_INFINITE = np.uint32(0x7F800000)


def quantize(weights: np.ndarray, layout: MatrixLayout, out: np.ndarray, workers: Executor | None = None) -> None:
    """Quantise ``weights``, float32 (rows, columns) C-contiguous, into ``out``, uint8 of ``layout.nbytes``.

    Parameters
    ----------
    workers : Executor, optional
        Threads to share the row blocks among.

    Raises
    ------
    CheckpointCorruptError
        A weight is infinite or no number.
    """
    values, scales, zeros = layout.planes(out)
    out[layout.scales_offset :] = 0  # what lies between the planes is part of the bytes
    arguments = (weights, weights.view(np.uint32), layout.rows, layout.columns, values, scales)
    blocks = layout.row_blocks
    cuts = [(0, blocks)] if workers is None else [(blocks * i // 4, blocks * (i + 1) // 4) for i in range(4)]

    def work(cut: tuple[int, int]) -> bool:
        if layout.bits == 8:
            return bool(_quantize_8(*cut, *arguments))
        return bool(_quantize_4(*cut, *arguments, zeros, layout.group))

    if not all(map(work, cuts) if workers is None else workers.map(work, cuts)):
        raise CheckpointCorruptError(
            message("An expert holds weights that are no finite numbers.", step="Download the checkpoint again.")
        )


@_compiled
def _quantize_8(first, end, weights, bits, rows, columns, values, scales):  # type: ignore[no-untyped-def]
    finite = True
    for block in range(first, end):
        values[block] = 0
        for lane in range(ROW_BLOCK):
            row = block * ROW_BLOCK + lane
            if row >= rows:
                scales[block, lane] = np.float32(0)
                continue
            largest = np.uint32(0)
            for column in range(columns):
                largest = max(largest, bits[row, column] & np.uint32(0x7FFFFFFF))
            if largest >= _INFINITE:
                finite = False
            peak = np.float32(0)
            for column in range(columns):
                peak = max(peak, abs(weights[row, column]))
            scale = peak / np.float32(127)
            inverse = np.float32(1) / scale if scale > np.float32(0) else np.float32(0)
            scales[block, lane] = scale
            for column in range(columns):
                scaled = weights[row, column] * inverse + np.float32(128.5)  # positive, so that cutting off rounds
                values[block, column, lane] = min(np.int32(scaled), np.int32(255)) - np.int32(128)
    return finite


@_compiled
def _quantize_4(first, end, weights, bits, rows, columns, values, scales, zeros, group):  # type: ignore[no-untyped-def]
    finite = True
    scratch = np.zeros(group, np.uint32)
    step_of = np.zeros(1, np.float32)
    step_bits = step_of.view(np.uint32)
    for block in range(first, end):
        values[block] = 0
        zeros[block] = 0
        for lane in range(ROW_BLOCK):
            row = block * ROW_BLOCK + lane
            for g in range(scales.shape[1]):
                scales[block, g, lane] = 0
                begin = g * group
                length = min(group, columns - begin)
                if row >= rows or length <= 0:
                    continue
                largest = np.uint32(0)
                low = high = np.float32(0)
                for i in range(length):
                    largest = max(largest, bits[row, begin + i] & np.uint32(0x7FFFFFFF))
                for i in range(length):
                    low = min(low, weights[row, begin + i])
                    high = max(high, weights[row, begin + i])
                if largest >= _INFINITE:
                    finite = False
                step_of[0] = (high - low) / np.float32(15)
                step_bits[0] = (step_bits[0] + np.uint32(0x8000)) & np.uint32(0xFFFF0000)  # to bfloat16, halves upwards
                step = step_of[0]
                inverse = np.float32(1) / step if step > np.float32(0) else np.float32(0)
                zero = min(np.float32(np.int32(np.float32(0.5) - low * inverse)), np.float32(15))
                for i in range(group):
                    scratch[i] = np.uint32(zero)  # padding is a weight of zero
                for i in range(length):
                    scaled = weights[row, begin + i] * inverse + (zero + np.float32(0.5))
                    scratch[i] = np.uint32(min(max(np.int32(scaled), np.int32(0)), np.int32(15)))
                for word in range(group // 8):
                    packed = np.uint32(0)
                    for j in range(8):
                        packed |= scratch[word * 8 + j] << np.uint32(4 * j)
                    values[block, begin // 8 + word, lane] = packed
                scales[block, g, lane] = np.uint16(step_bits[0] >> np.uint32(16))
                half = ROW_BLOCK // 2
                zeros[block, g, lane % half] |= np.uint8(np.int32(zero) << (4 * (lane // half)))
    return finite


def dequantize(memory: np.ndarray, layout: MatrixLayout) -> np.ndarray:
    """The weights that a quantised matrix stands for: float32 (rows, columns), by plain array operations."""
    values, scales, zeros = layout.planes(memory)
    if layout.bits == 8:
        weights = values.astype(np.float32) * scales[:, None, :]
    else:
        shifts = np.arange(8, dtype=np.uint32)[:, None] * np.uint32(4)
        quantized = (values[:, :, None, :] >> shifts & np.uint32(15)).reshape(layout.row_blocks, layout.groups, -1, ROW_BLOCK)
        zero = np.concatenate([zeros & 15, zeros >> 4], axis=-1).astype(np.float32)[:, :, None, :]
        step = (scales.astype(np.uint32) << np.uint32(16)).view(np.float32)[:, :, None, :]
        weights = step * (quantized.astype(np.float32) - zero)
    whole = weights.reshape(layout.row_blocks, layout.padded_columns, ROW_BLOCK).transpose(0, 2, 1)
    return whole.reshape(layout.padded_rows, layout.padded_columns)[: layout.rows, : layout.columns]
