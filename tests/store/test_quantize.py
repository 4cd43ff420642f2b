"""Rounding and layout of quantised matrices, held against twins in plain Python that know nothing of blocks and planes."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from swapless.errors import CheckpointCorruptError, UsageError
from swapless.store.matrix import ROW_BLOCK, MatrixLayout, check_precision
from swapless.store.quantize import dequantize, quantize
from swapless.store.read import aligned_buffer

SHAPES = [(1, 1), (33, 31), (70, 130), (64, 128)]


def layout(rows: int, columns: int, bits: int, group: int = 32) -> MatrixLayout:
    return MatrixLayout(rows=rows, columns=columns, bits=bits, group=group)


def quantized(weights: np.ndarray, how: MatrixLayout) -> np.ndarray:
    memory = aligned_buffer(how.nbytes)[: how.nbytes]
    memory[:] = 0xAA
    quantize(weights, how, memory)
    return memory


def random(rows: int, columns: int) -> np.ndarray:
    weights = np.random.default_rng(rows * 1000 + columns).standard_normal((rows, columns)).astype(np.float32)
    weights[rows // 2] = 0.0
    weights[-1] += 3.0  # all of one sign: the range must still hold zero
    return weights


def bfloat16(value: float) -> float:
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    return struct.unpack("<f", struct.pack("<I", (bits + 0x8000) & 0xFFFF0000))[0]


def twin_8(weights: np.ndarray) -> np.ndarray:
    out = np.zeros_like(weights)
    for row, line in enumerate(weights.tolist()):
        scale = np.float32(max(map(abs, line))) / np.float32(127)
        for column, value in enumerate(line):
            q = round(value / float(scale)) if scale else 0
            out[row, column] = np.float32(q) * scale
    return out


def twin_4(weights: np.ndarray, group: int) -> np.ndarray:
    out = np.zeros_like(weights)
    for row, line in enumerate(weights.tolist()):
        for begin in range(0, len(line), group):
            part = line[begin : begin + group]
            low, high = min(0.0, *part), max(0.0, *part)
            step = bfloat16(float((np.float32(high) - np.float32(low)) / np.float32(15)))
            zero = min(15, int(0.5 - low / step)) if step else 0
            for i, value in enumerate(part):
                q = min(max(int(value / step + zero + 0.5), 0), 15) if step else 0
                out[row, begin + i] = step * (q - zero)
    return out


@pytest.mark.parametrize("rows,columns", SHAPES)
@pytest.mark.parametrize("bits,group", [(8, 32), (4, 32), (4, 64), (4, 128)])
def test_weights_are_rounded_as_the_twin_rounds_them(rows: int, columns: int, bits: int, group: int) -> None:
    weights = random(rows, columns)
    how = layout(rows, columns, bits, group)
    got = dequantize(quantized(weights, how), how)
    expected = twin_8(weights) if bits == 8 else twin_4(weights, group)
    step = np.abs(expected).max() / 7
    different = got != expected
    assert different.mean() < 1e-3, "more than a tie here and there"
    assert np.abs(got - expected).max() <= step
    assert not got[rows // 2].any() or rows == 1


@pytest.mark.parametrize("rows,columns", SHAPES)
@pytest.mark.parametrize("bits,group", [(8, 32), (4, 32), (4, 128)])
def test_bits_of_bfloat16_give_what_their_floats_give(rows: int, columns: int, bits: int, group: int) -> None:
    halves = (random(rows, columns).view(np.uint32) >> 16).astype(np.uint16)
    how = layout(rows, columns, bits, group)
    floats = (halves.astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(quantized(halves, how), quantized(floats, how))


@pytest.mark.parametrize("bits,group", [(8, 32), (4, 32), (4, 128)])
def test_the_error_is_at_most_half_a_step(bits: int, group: int) -> None:
    weights = random(70, 260)
    how = layout(70, 260, bits, group)
    error = np.abs(dequantize(quantized(weights, how), how) - weights)
    for row in range(70):
        for begin in range(0, 260, group if bits == 4 else 260):
            part = weights[row, begin : begin + (group if bits == 4 else 260)]
            spread = np.abs(part).max() / 127 if bits == 8 else (max(0, part.max()) - min(0, part.min())) / 15
            # In 4 bits the ends may lie up to a step of rounding of the zero point and of the step outside the range.
            assert error[row, begin : begin + len(part)].max() <= spread * (0.501 if bits == 8 else 1.05) + 1e-9


def test_bytes_of_a_small_matrix_in_4_bits() -> None:
    weights = np.zeros((18, 32), np.float32)
    weights[0] = np.arange(32) % 16  # step 1, zero 0
    weights[17, :2] = -7.0, 8.0  # step 1, zero 7
    how = layout(18, 32, 4)
    values, scales, zeros = how.planes(quantized(weights, how))
    assert values[0, :, 0].tolist() == [[0x40, 0x51, 0x62, 0x73], [0xC8, 0xD9, 0xEA, 0xFB]] * 2
    assert values[0, :, 17].tolist() == [[0x70, 0x7F, 0x77, 0x77]] + [[0x77] * 4] * 3
    assert not values[0, :, 1].any() and scales[0, 0, 0] == scales[0, 0, 17] == 0x3F80
    assert zeros[0, 0, 1] == 0x70 and not zeros[0, 0, 0]
    assert np.count_nonzero(scales) == 2
    assert how.nbytes == 32 * 32 // 2 + 64 + 64


def test_bytes_of_a_small_matrix_in_8_bits() -> None:
    weights = np.zeros((2, 3), np.float32)
    weights[1] = -127, 2.4, 63.6
    how = layout(2, 3, 8)
    values, scales, zeros = how.planes(quantized(weights, how))
    assert values[0, 0, 1].tolist() == [-127, 2, 64, 0] and scales[0, 1] == 1.0
    assert values.shape == (1, 8, ROW_BLOCK, 4) and np.count_nonzero(values) == 3 and not zeros.size


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_refused(bits: int, value: float) -> None:
    weights = random(40, 64)
    weights[39, 63] = value
    how = layout(40, 64, bits)
    with pytest.raises(CheckpointCorruptError, match="no finite numbers"):
        quantized(weights, how)


@pytest.mark.parametrize("bits,group", [(5, 32), (4, 48)])
def test_unknown_precision_is_refused(bits: int, group: int) -> None:
    with pytest.raises(UsageError, match="Allowed: "):
        check_precision(bits, group)


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_and_memory_of_another_layout_are_refused(bits: int) -> None:
    how = layout(40, 64, bits)
    out = np.zeros(how.nbytes, np.uint8)
    for weights, memory in (
        (np.zeros((40, 96), np.float32), out),
        (np.zeros((41, 64), np.float32), out),
        (np.zeros((40, 64)), out),
        (np.zeros((40, 64), np.float32), out[:-64]),
        (np.zeros((40, 64), np.float32), out.view(np.int8)),
    ):
        with pytest.raises(UsageError, match="wrong"):
            quantize(weights, how, memory)
    quantize(np.zeros((40, 64), np.float32), how, out)
