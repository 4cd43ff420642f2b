"""Round a matrix to 8 or 4 bits, straight into the layout of :mod:`~swapless.store.matrix`.

8 bits: the largest magnitude of a row becomes 127. 4 bits: the range of a group of columns, zero included, is cut into 15 equal
steps, and the step is rounded to bfloat16 before the weights are rounded to it, so that its own rounding costs nothing. Nothing
depends on the machine: the same weights always give the same bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from swapless.arrays import want
from swapless.compiled import kernel
from swapless.errors import CheckpointCorruptError, message
from swapless.store.matrix import ROW_BLOCK, MatrixLayout

_compiled: Any = kernel(error_model="numpy", fastmath={"nnan", "nsz"})

_INFINITE = np.uint32(0x7F800000)

_COLUMNS = {2: ((np.uint32(16), np.uint32(0)), np.uint32(0xFFFF0000)), 4: ((np.uint32(0),), np.uint32(0xFFFFFFFF))}
"""By bytes a weight, how the columns in a word of four bytes become the bits of float32: by which shifts and which mask."""


def quantize(weights: np.ndarray, layout: MatrixLayout, out: np.ndarray) -> None:
    """Quantise ``weights`` (rows, columns), C-contiguous, into ``out``, uint8 of ``layout.nbytes``.

    Parameters
    ----------
    weights : float32 or uint16 ndarray of shape (rows, columns)
        uint16 are the bits of bfloat16, which are widened piece by piece: no copy of the whole is made.

    Raises
    ------
    CheckpointCorruptError
        A weight is infinite or no number.
    UsageError
        Weights or memory that are not those of the layout.
    """
    want(weights, "weights", (np.float32, np.uint16), (layout.rows, layout.columns))
    want(out, "memory", np.uint8, (layout.nbytes,))
    values, scales, zeros = layout.planes(out)
    out[layout.scales_offset :] = 0  # what lies between the planes is part of the bytes
    bits = weights if weights.dtype == np.uint16 else weights.view(np.uint32)
    words = values.view(np.uint32)[..., 0]
    if layout.bits == 8:
        finite = _quantize_8(bits, np.uint32(32 - 8 * bits.itemsize), words, scales)
    else:
        shifts, mask = _COLUMNS[bits.itemsize]
        finite = _quantize_4(_pairs(bits), shifts, mask, words, scales, zeros, layout.group)
    if not finite:
        raise CheckpointCorruptError(
            message("An expert holds weights that are no finite numbers.", step="Download the checkpoint again.")
        )


def _pairs(bits: np.ndarray) -> np.ndarray:
    """Bits of a matrix as uint32: two bfloat16 side by side (behind the last of an odd row a zero), or a float32."""
    if bits.shape[1] * bits.itemsize % 4:
        bits = np.pad(bits, ((0, 0), (0, 1)))
    return bits.view(np.uint32)


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
def _quantize_8(bits, shift, out, scales):  # type: ignore[no-untyped-def]
    rows, columns = bits.shape
    finite = True
    floats = np.empty(columns, np.float32)
    row_bits = floats.view(np.uint32)
    peak_of = np.zeros(1, np.float32)
    peak_bits = peak_of.view(np.uint32)
    # Padding is a weight of zero. Rows are a cache line longer: those a power of two apart fall on one another in the cache.
    quantized = np.zeros((ROW_BLOCK, 4 * out.shape[1] + 64), np.int8)
    words = quantized.view(np.uint32)
    for block in range(len(out)):
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
        for word in range(out.shape[1]):
            for lane in range(ROW_BLOCK):
                out[block, word, lane] = words[lane, word]
    return finite


@_compiled
def _quantize_4(words, shifts, mask, out, scales, zeros, group):  # type: ignore[no-untyped-def]
    """Group by group, the rows of a block side by side: what differs between rows is a vector, and nothing is shuffled.

    A word holds as many columns as there are shifts. In a tile the first columns of all words come before the second ones.
    Loops run over whole tiles as one line: a loop of 32 is too short for the compiler to make good vectors of.
    """
    rows = len(words)
    held = group // len(shifts)
    near = np.zeros((held, ROW_BLOCK), np.uint32)
    tile = np.zeros((group, ROW_BLOCK), np.float32)
    raw, floats = near.reshape(-1), tile.reshape(-1)
    float_bits = floats.view(np.uint32)
    middle = len(floats) // 2
    low, high = np.empty(middle, np.float32), np.empty(middle, np.float32)
    inverse, offset = np.empty(ROW_BLOCK, np.float32), np.empty(ROW_BLOCK, np.float32)
    zero, step_of = np.empty(ROW_BLOCK, np.int32), np.empty(ROW_BLOCK, np.float32)
    step_bits = step_of.view(np.uint32)
    largest = np.uint32(0)
    half = ROW_BLOCK // 2
    for block in range(len(out)):
        begin = block * ROW_BLOCK
        lanes = min(ROW_BLOCK, rows - begin)
        for g in range(scales.shape[1]):
            first = g * held
            width = min(held, words.shape[1] - first)
            if lanes < ROW_BLOCK or width < held:
                near[:] = np.uint32(0)  # padding is a weight of zero
            for lane in range(lanes):
                for i in range(width):
                    near[i, lane] = words[begin + lane, first + i]
            for place in range(len(shifts)):
                columns = float_bits[place * len(raw) : (place + 1) * len(raw)]
                for i in range(len(raw)):
                    columns[i] = (raw[i] << shifts[place]) & mask
            for i in range(2 * middle):
                largest = max(largest, float_bits[i] & np.uint32(0x7FFFFFFF))
            for i in range(middle):
                low[i] = min(min(floats[i], floats[middle + i]), np.float32(0))
            for i in range(middle):
                high[i] = max(max(floats[i], floats[middle + i]), np.float32(0))
            left = middle // 2
            while left >= ROW_BLOCK:  # halved until a value a row is left
                for i in range(left):
                    low[i] = min(low[i], low[left + i])
                for i in range(left):
                    high[i] = max(high[i], high[left + i])
                left //= 2
            for lane in range(ROW_BLOCK):
                step_of[lane] = (high[lane] - low[lane]) / np.float32(15)
                step_bits[lane] = (step_bits[lane] + np.uint32(0x8000)) & np.uint32(0xFFFF0000)  # to bfloat16, halves upwards
                step = step_of[lane]
                inverse[lane] = np.float32(1) / step if step > np.float32(0) else np.float32(0)
                at = min(np.float32(np.int32(np.float32(0.5) - low[lane] * inverse[lane])), np.float32(15))
                zero[lane], offset[lane] = np.int32(at), at + np.float32(0.5)
                scales[block, g, lane] = np.uint16(step_bits[lane] >> np.uint32(16))
            for lane in range(half):
                zeros[block, g, lane] = np.uint8(zero[lane] | (zero[lane + half] << 4))
            for word in range(group // 8):
                for lane in range(ROW_BLOCK):
                    packed = np.uint32(0)
                    for i in range(8):  # the last four of eight columns become the upper halves of the first four
                        column = (8 * word + i) // len(shifts) + i % len(shifts) * held
                        scaled = tile[column, lane] * inverse[lane] + offset[lane]
                        value = min(max(np.int32(scaled), np.int32(0)), np.int32(15))
                        packed |= np.uint32(value) << np.uint32(8 * (i % 4) + 4 * (i // 4))
                    out[block, g * (group // 8) + word, lane] = packed
    return largest < _INFINITE


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
