"""The inner loops of quantised matrices: inputs rounded to bytes, products of bytes, and the activation between.

A block of 32 rows is two vectors of 16 lanes, one row a lane; a lane's four bytes are four columns, which one input word of
four bytes, broadcast, serves for all rows. Integers are exact, so that every processor and every number of threads and tokens
finds the same.

A row of inputs, *rounded*, is int8 of its padded columns, then of each block of 32 columns a float32 scale, then of each block
a float32 sum of its int8: the largest magnitude of a block becomes 127.

Everything is an address: what a kernel is given, it trusts. :mod:`~swapless.runtime.kernels` is the only caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from swapless.runtime.kernels_code import F32, I8, I16, I32, LANES, Code, Value, code_intrinsic, constant, vector
from swapless.store.matrix import COLUMN_BLOCK, ROW_BLOCK

HALVES = ROW_BLOCK // LANES
ROUNDED_BLOCK_BYTES = COLUMN_BLOCK + 8
"""Bytes of a rounded row for each block of columns."""

_LEAST = 1e-30
"""A block of inputs without a larger magnitude counts as zeros: its scale would not be a normal number."""

_AHEAD_BYTES = 4096
"""Weights are asked for so long before they are used: in 4 bits, a fifth more of them a second than without, in 8 no fewer."""

SILU, GELU_TANH = 1, 2
"""Kinds of activation."""


def block_product(bits: int, tokens: int, way: str | None = None) -> Any:
    """Kernel of ``tokens`` rounded rows times a block of 32 rows of weights.

    Arguments: addresses of values, scales and zeros (none in 8 bits), address of the first rounded row, bytes from one to the
    next, column blocks, log2 of column blocks a group, address of the output, floats from one output to the next.
    """
    block_bytes = COLUMN_BLOCK * ROW_BLOCK * bits // 8
    # Upper halves of bytes may stay where they are: their products, kept apart, are 16 times too large. That spares a shift of
    # each vector of weights, and takes registers that several tokens do not have.
    apart = 2 if bits == 4 and tokens == 1 else 1

    def generate(code: Code, given: Sequence[Value]) -> None:
        b = code.b
        values, scales, zeros = (code.pointer(at, kind) for at, kind in zip(given[:3], (I8, I16, I8), strict=True))
        columns, shift = given[5], given[6]
        rows = [b.add(given[3], b.mul(given[4], code.integer(t))) for t in range(tokens)]
        scales_at = b.mul(columns, code.integer(COLUMN_BLOCK))
        sums_at = b.mul(columns, code.integer(COLUMN_BLOCK + 4))

        def body(block: Value, totals: list[Value]) -> list[Value]:
            first = b.mul(block, code.integer(block_bytes))
            sums = [[constant(I32, 0)] * (tokens * HALVES) for _ in range(apart)]
            code.prefetch(b.add(given[0], b.add(first, code.integer(_AHEAD_BYTES))), block_bytes // 64)
            for place in range(0, block_bytes, 4 * ROW_BLOCK):
                packed = [
                    code.load(code.at(values, first, code.integer(place + 4 * LANES * half)), I32, align=64)
                    for half in range(HALVES)
                ]
                for i, weights in enumerate(_unsigned(code, packed, bits, shifted=apart == 1)):
                    products = sums[i % apart]
                    word = place // (4 * ROW_BLOCK) * (8 // bits) + i
                    for t in range(tokens):
                        at = b.add(rows[t], b.add(b.mul(block, code.integer(COLUMN_BLOCK)), code.integer(4 * word)))
                        x = code.scalar(at, I32)
                        for half in range(HALVES):
                            key = t * HALVES + half
                            products[key] = code.add_products(products[key], weights[half], x)
            products = sums[0]
            if apart == 2:
                products = [b.add(low, b.ashr(high, constant(I32, 4))) for low, high in zip(*sums, strict=True)]
            step = zero = [constant(F32, 128.0)] * HALVES
            if bits == 4:
                step, zero = _scale_and_zero(code, scales, zeros, b.lshr(block, shift))
            for t in range(tokens):
                at = b.mul(block, code.integer(4))
                scale = code.splat(code.scalar(b.add(b.add(rows[t], scales_at), at), F32))
                negative = code.splat(b.fneg(code.scalar(b.add(b.add(rows[t], sums_at), at), F32)))
                for half in range(HALVES):
                    key = t * HALVES + half
                    exact = code.multiply_add(zero[half], negative, b.sitofp(products[key], vector(F32)))
                    if bits == 8:
                        totals[key] = code.multiply_add(exact, scale, totals[key])
                    else:
                        totals[key] = code.multiply_add(b.fmul(exact, scale), step[half], totals[key])
            return totals

        totals = code.loop(columns, [constant(F32, 0.0)] * (tokens * HALVES), body)
        for t in range(tokens):
            for half in range(HALVES):
                total = totals[t * HALVES + half]
                if bits == 8:
                    row_scales = code.at(code.pointer(given[1], F32), code.integer(half * LANES))
                    total = b.fmul(total, code.load(row_scales, F32))
                out = code.at(code.pointer(given[7], F32), b.mul(given[8], code.integer(t)), code.integer(half * LANES))
                code.store(total, out)

    return code_intrinsic(9, generate, way)


def _unsigned(code: Code, packed: list[Value], bits: int, *, shifted: bool) -> list[list[Value]]:
    """Vectors of four unsigned bytes a lane, by half, of consecutive words of columns.

    In 8 bits 128 too large; in 4 bits every second word is 16 times too large unless it is to be ``shifted``.
    """
    b = code.b
    if bits == 8:
        return [[b.xor(half, constant(I32, 0x80808080)) for half in packed]]
    low = [b.and_(half, constant(I32, 0x0F0F0F0F)) for half in packed]
    if not shifted:
        return [low, [b.and_(half, constant(I32, 0xF0F0F0F0)) for half in packed]]
    return [low, [b.and_(b.lshr(half, constant(I32, 4)), constant(I32, 0x0F0F0F0F)) for half in packed]]


def _scale_and_zero(code: Code, scales: Value, zeros: Value, group: Value) -> tuple[list[Value], list[Value]]:
    """Of a group in 4 bits: its scales and its zeros, by half."""
    b = code.b
    both = b.zext(code.load(code.at(zeros, b.mul(group, code.integer(LANES))), I8), vector(I32))
    halves = [b.and_(both, constant(I32, 15)), b.lshr(both, constant(I32, 4))]
    first = b.mul(group, code.integer(ROW_BLOCK))
    places = [code.at(scales, first, code.integer(half * LANES)) for half in range(HALVES)]
    return [code.bfloat16(code.load(place, I16)) for place in places], [b.uitofp(half, vector(F32)) for half in halves]


def rounding() -> Any:
    """Kernel that rounds a row of inputs.

    Arguments: addresses of the float32 and of the rounded row, column blocks.
    """

    def generate(code: Code, given: Sequence[Value]) -> None:
        def body(block: Value, nothing: list[Value]) -> list[Value]:
            at = code.at(code.pointer(given[0], F32), code.b.mul(block, code.integer(COLUMN_BLOCK)))
            _round_block(
                code, [code.load(code.at(at, code.integer(half * LANES)), F32, 4) for half in range(2)], given[1:], block
            )
            return nothing

        code.loop(given[2], [], body)

    return code_intrinsic(3, generate)


def _round_block(code: Code, halves: list[Value], given: Sequence[Value], block: Value) -> None:
    """Round 32 floats to block ``block`` of the rounded row at ``given[0]`` of ``given[1]`` blocks."""
    b = code.b
    absolute = [b.and_(b.bitcast(half, vector(I32)), constant(I32, 0x7FFFFFFF)) for half in halves]
    larger = code.call(f"llvm.umax.v{LANES}i32", vector(I32), *absolute)  # as integers, so that no number is the largest
    peak = b.bitcast(code.call(f"llvm.vector.reduce.umax.v{LANES}i32", I32, larger), F32)
    some = b.fcmp_ordered(">", peak, F32(_LEAST))
    zero = F32(0.0)
    inverse = code.splat(b.select(some, b.fdiv(F32(127.0), peak), zero))
    small = b.fcmp_ordered("<=", peak, F32(_LEAST))
    scale = b.select(small, zero, b.fdiv(peak, F32(127.0)))
    whole = [code.rounded(b.fmul(half, inverse)) for half in halves]
    total = code.call(f"llvm.vector.reduce.add.v{LANES}i32", I32, b.add(*whole))
    row, blocks = given
    for half, value in enumerate(whole):
        place = code.at(code.pointer(row, I8), b.mul(block, code.integer(COLUMN_BLOCK)), code.integer(half * LANES))
        code.store(b.trunc(value, vector(I8)), place)
    for number, value in enumerate((scale, b.sitofp(total, F32))):
        at = b.add(row, b.add(b.mul(blocks, code.integer(COLUMN_BLOCK + 4 * number)), b.mul(block, code.integer(4))))
        b.store(value, code.pointer(at, F32), align=4)


def gating() -> Any:
    """Kernel that makes ``activation(gate) * up`` of 32 values and rounds them to a block of inputs of the next matrix.

    Arguments: addresses of gate and up (float32), kind of activation, address of the rounded row, its column blocks, the block.
    """

    def generate(code: Code, given: Sequence[Value]) -> None:
        b = code.b
        smooth = code.splat(b.icmp_signed("==", given[2], code.integer(GELU_TANH)))
        halves = []
        for half in range(HALVES):
            gate, up = (code.load(code.at(code.pointer(at, F32), code.integer(half * LANES)), F32, 4) for at in given[:2])
            # (1 + tanh(y)) / 2 is 1 / (1 + exp(-2 y)): both activations are the gate times such a quotient.
            cubic = code.multiply_add(b.fmul(b.fmul(gate, gate), gate), constant(F32, 0.044715), gate)
            inner = b.select(smooth, b.fmul(cubic, constant(F32, 1.5957691216057308)), gate)
            below = b.fadd(constant(F32, 1.0), code.exponential(b.fneg(inner)))
            halves.append(b.fmul(b.fdiv(gate, below), up))
        _round_block(code, halves, given[3:5], given[5])

    return code_intrinsic(6, generate)
