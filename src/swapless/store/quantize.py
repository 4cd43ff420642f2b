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
    """Quantise ``weights`` (rows, columns), C-contiguous, into ``out``, uint8 of ``layout.nbytes``.

    Parameters
    ----------
    weights : float32 or uint16 ndarray of shape (rows, columns)
        uint16 are the bits of bfloat16, which are widened row by row: no copy of the whole is made.
    workers : Executor, optional
        Threads to share the row blocks among.

    Raises
    ------
    CheckpointCorruptError
        A weight is infinite or no number.
    """
    values, scales, zeros = layout.planes(out)
    out[layout.scales_offset :] = 0  # what lies between the planes is part of the bytes
    bits = weights if weights.dtype == np.uint16 else weights.view(np.uint32)
    words = values.view(np.uint32)[..., 0]
    arguments = (bits, np.uint32(32 - 8 * bits.itemsize), layout.rows, layout.columns, words, scales)
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
def _widen(bits, shift, row, columns, out):  # type: ignore[no-untyped-def]
    """Bits of a row as those of float32, and the largest of them without its sign."""
    largest = np.uint32(0)
    for column in range(columns):
        wide = np.uint32(bits[row, column]) << shift
        out[column] = wide
        largest = max(largest, wide & np.uint32(0x7FFFFFFF))
    return largest


@_compiled
def _quantize_8(first, end, bits, shift, rows, columns, out, scales):  # type: ignore[no-untyped-def]
    finite = True
    floats = np.empty(columns, np.float32)
    row_bits = floats.view(np.uint32)
    peak_of = np.zeros(1, np.float32)
    peak_bits = peak_of.view(np.uint32)
    quantized = np.zeros((ROW_BLOCK, 4 * out.shape[1]), np.int8)  # padding is a weight of zero
    words = quantized.view(np.uint32)
    for block in range(first, end):
        for lane in range(ROW_BLOCK):
            row = block * ROW_BLOCK + lane
            if row >= rows:
                quantized[lane] = 0
                scales[block, lane] = np.float32(0)
                continue
            peak_bits[0] = _widen(bits, shift, row, columns, row_bits)
            if peak_bits[0] >= _INFINITE:
                finite = False
            scale = peak_of[0] / np.float32(127)
            inverse = np.float32(1) / scale if scale > np.float32(0) else np.float32(0)
            scales[block, lane] = scale
            for column in range(columns):
                scaled = floats[column] * inverse + np.float32(128.5)  # positive, so that cutting off rounds
                quantized[lane, column] = min(np.int32(scaled), np.int32(255)) - np.int32(128)
        for word in range(words.shape[1]):
            for lane in range(ROW_BLOCK):
                out[block, word, lane] = words[lane, word]
    return finite


@_compiled
def _quantize_4(first, end, bits, shift, rows, columns, out, scales, zeros, group):  # type: ignore[no-untyped-def]
    finite = True
    groups = scales.shape[1]
    floats = np.zeros(groups * group, np.float32)  # padding is a weight of zero
    row_bits = floats.view(np.uint32)
    quantized = np.zeros((ROW_BLOCK, groups * group), np.uint8)
    eights = quantized.view(np.uint64)
    lows, highs = np.zeros(8, np.float32), np.zeros(8, np.float32)
    step_of = np.zeros(1, np.float32)
    step_bits = step_of.view(np.uint32)
    half = ROW_BLOCK // 2
    for block in range(first, end):
        zeros[block] = 0
        for lane in range(ROW_BLOCK):
            row = block * ROW_BLOCK + lane
            if row >= rows:
                quantized[lane] = 0
                scales[block, :, lane] = 0
                continue
            if _widen(bits, shift, row, columns, row_bits) >= _INFINITE:
                finite = False
            for g in range(groups):
                begin = g * group
                for i in range(8):
                    lows[i] = highs[i] = np.float32(0)
                for at in range(begin, begin + group, 8):
                    for i in range(8):  # side by side, so that they are compared at once
                        lows[i] = min(lows[i], floats[at + i])
                        highs[i] = max(highs[i], floats[at + i])
                low = high = np.float32(0)
                for i in range(8):
                    low, high = min(low, lows[i]), max(high, highs[i])
                step_of[0] = (high - low) / np.float32(15)
                step_bits[0] = (step_bits[0] + np.uint32(0x8000)) & np.uint32(0xFFFF0000)  # to bfloat16, halves upwards
                step = step_of[0]
                inverse = np.float32(1) / step if step > np.float32(0) else np.float32(0)
                zero = min(np.float32(np.int32(np.float32(0.5) - low * inverse)), np.float32(15))
                for i in range(begin, begin + group):
                    scaled = floats[i] * inverse + (zero + np.float32(0.5))
                    quantized[lane, i] = min(max(np.int32(scaled), np.int32(0)), np.int32(15))
                scales[block, g, lane] = np.uint16(step_bits[0] >> np.uint32(16))
                zeros[block, g, lane % half] |= np.uint8(np.int32(zero) << (4 * (lane // half)))
        for word in range(eights.shape[1]):
            for lane in range(ROW_BLOCK):  # the last four of eight bytes become the upper halves of the first four
                packed = eights[lane, word]
                out[block, word, lane] = np.uint32(packed & np.uint64(0xFFFFFFFF)) | np.uint32(packed >> np.uint64(28))
    return finite


def dequantize(memory: np.ndarray, layout: MatrixLayout) -> np.ndarray:
    """The weights that a quantised matrix stands for: float32 (rows, columns), by plain array operations."""
    values, scales, zeros = layout.planes(memory)
    columns = layout.padded_columns
    if layout.bits == 8:
        weights = _by_column(values, columns).astype(np.float32) * scales[:, None, :]
    else:
        halves = np.stack([values & 15, values >> 4], axis=2)  # blocks, words of eight columns, half, rows, columns
        quantized = _by_column(halves, columns).reshape(layout.row_blocks, layout.groups, -1, ROW_BLOCK)
        zero = np.concatenate([zeros & 15, zeros >> 4], axis=-1).astype(np.float32)[:, :, None, :]
        step = (scales.astype(np.uint32) << np.uint32(16)).view(np.float32)[:, :, None, :]
        weights = step * (quantized.astype(np.float32) - zero)
    whole = weights.reshape(layout.row_blocks, layout.padded_columns, ROW_BLOCK).transpose(0, 2, 1)
    return whole.reshape(layout.padded_rows, layout.padded_columns)[: layout.rows, : layout.columns]


def _by_column(values: np.ndarray, columns: int) -> np.ndarray:
    """(blocks, ..., rows, 4) as (blocks, columns, rows)."""
    return np.swapaxes(values, -1, -2).reshape(len(values), columns, ROW_BLOCK)
