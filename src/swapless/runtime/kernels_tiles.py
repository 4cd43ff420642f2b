"""Products of many tokens at once on processors with a matrix unit (AMX): 16 tokens by 16 rows in one instruction.

The unit works on *tiles*, registers whose shape a thread must set before and put back after, since torch's own products use
them too. The integers are those of the other kernels, and floats are added in the same order: the result has the same bits.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from swapless.runtime.kernels_code import (
    F32,
    I8,
    I16,
    I32,
    I64,
    LANES,
    Code,
    Value,
    code_intrinsic,
    constant,
    has_tiles,
    stack,
    vector,
)
from swapless.store.matrix import COLUMN_BLOCK, ROW_BLOCK

TILE_TOKENS = 16
"""Tokens of one product."""

CONFIGURATION_BYTES = 64

_SUMS, _INPUTS, _WEIGHTS = range(3)
_ROW_BYTES = 4 * LANES
_SHAPES = {_SUMS: (TILE_TOKENS, _ROW_BYTES), _INPUTS: (TILE_TOKENS, COLUMN_BLOCK), _WEIGHTS: (COLUMN_BLOCK // 4, _ROW_BYTES)}
"""Rows and bytes a row of each tile."""

_SUMS_BYTES = TILE_TOKENS * _ROW_BYTES
_WEIGHTS_BYTES = COLUMN_BLOCK // 4 * _ROW_BYTES
_SYSCALL, _REQUEST, _TILE_DATA = 158, 0x1023, 18  # arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA

_intrinsic_of: Any = intrinsic


@cache
def tiles_allowed() -> bool:
    """Ask the operating system once for the tiles; compiled code that finds no such processor never uses them."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    from numba.core.registry import cpu_target

    if not _present(cpu_target.target_context):
        return False
    return bool(ctypes.CDLL(None).syscall(_SYSCALL, _REQUEST, _TILE_DATA) == 0)


def _present(context: Any) -> bool:
    """Whether the processor compiled for has such a unit."""
    return has_tiles(context.codegen().magic_tuple()[2])


@_intrinsic_of
def configure_tiles(context: Any) -> tuple[Any, Any]:
    """Shape the tiles of this thread for the product; the address of what their shapes were."""

    def codegen(context: Any, builder: Any, signature: Any, values: Sequence[Value]) -> Value:
        if not _present(context):
            return ir.Constant(I64, 0)
        before, wanted = (cgutils.alloca_once(builder, I8, size=CONFIGURATION_BYTES) for _ in range(2))
        image = bytearray(CONFIGURATION_BYTES)
        image[0] = 1  # palette
        for tile, (rows, row_bytes) in _SHAPES.items():
            image[16 + 2 * tile], image[48 + tile] = row_bytes, rows
        for at, byte in enumerate(image):
            builder.store(ir.Constant(I8, byte), builder.gep(wanted, [ir.Constant(I64, at)]))
        _call(builder, "llvm.x86.sttilecfg", before)
        _call(builder, "llvm.x86.ldtilecfg", wanted)
        return builder.ptrtoint(before, I64)

    return types.int64(), codegen


@_intrinsic_of
def restore_tiles(context: Any, before: Any) -> tuple[Any, Any]:
    """Give the tiles the shapes at an address."""

    def codegen(context: Any, builder: Any, signature: Any, values: Sequence[Value]) -> Value:
        if _present(context):
            _call(builder, "llvm.x86.ldtilecfg", builder.inttoptr(values[0], I8.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64), codegen


def _call(builder: Any, name: str, *arguments: Value) -> None:
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def tile_product(bits: int) -> Any:
    """Kernel of ``TILE_TOKENS`` rounded rows times a block of 32 rows of weights; arguments as for the other products."""

    def generate(code: Code, given: Sequence[Value]) -> None:
        if not code.tiles:
            return
        b = code.b
        columns, shift, rows, row_bytes = given[5], given[6], given[3], given[4]
        scales_at = b.add(rows, b.mul(columns, code.integer(COLUMN_BLOCK)))
        sums_at = b.add(rows, b.mul(columns, code.integer(COLUMN_BLOCK + 4)))
        tokens = [b.mul(row_bytes, code.integer(t)) for t in range(TILE_TOKENS)]
        sums, unpacked = stack(b, 2 * _SUMS_BYTES // 4), stack(b, 4 * _WEIGHTS_BYTES // 4)
        last = b.sub(columns, code.integer(1))

        def in_turn(first: Value, block: Value, nbytes: int, turns: int) -> Value:
            return b.add(first, b.mul(b.and_(block, code.integer(turns - 1)), code.integer(nbytes)))

        def not_beyond(block: Value) -> Value:
            return b.select(b.icmp_signed("<", block, columns), block, last)

        def one_half(half: Value, nothing: list[Value]) -> list[Value]:
            lanes = b.mul(half, code.integer(LANES))

            def weights_of(block: Value) -> Value:
                return b.add(given[0], b.add(b.mul(block, code.integer(128 * bits)), b.mul(lanes, code.integer(4))))

            def unpack(block: Value) -> None:
                if bits == 4:
                    _unpack(code, weights_of(block), in_turn(unpacked, block, _WEIGHTS_BYTES, 4))

            def multiply(block: Value) -> None:
                if bits == 4:
                    weights, stride = in_turn(unpacked, block, _WEIGHTS_BYTES, 4), _ROW_BYTES
                else:
                    weights, stride = weights_of(block), 4 * ROW_BLOCK
                inputs = b.add(rows, b.mul(block, code.integer(COLUMN_BLOCK)))
                _tile_multiply(code, inputs, row_bytes, weights, stride, in_turn(sums, block, _SUMS_BYTES, 2), bits)

            # What has just been written is slow to read back: bytes are unpacked two blocks ahead and sums made one ahead.
            for ahead in range(3):
                unpack(not_beyond(code.integer(ahead)))
            multiply(code.integer(0))

            def body(block: Value, totals: list[Value]) -> list[Value]:
                unpack(not_beyond(b.add(block, code.integer(3))))
                multiply(not_beyond(b.add(block, code.integer(1))))
                own_sums = in_turn(sums, block, _SUMS_BYTES, 2)
                step = zero = None
                if bits == 4:
                    group = b.lshr(block, shift)
                    step, zero = _scale_and_zero(code, given[1], given[2], group, half)
                offset = b.mul(block, code.integer(4))
                for t in range(TILE_TOKENS):
                    exact = b.sitofp(code.load(code.at(code.pointer(own_sums, I32), code.integer(t * LANES)), I32), vector(F32))
                    scale = code.splat(code.scalar(b.add(b.add(scales_at, tokens[t]), offset), F32))
                    if bits == 4:
                        negative = b.fneg(code.splat(code.scalar(b.add(b.add(sums_at, tokens[t]), offset), F32)))
                        exact = b.fmul(code.multiply_add(zero, negative, exact), scale)
                    totals[t] = code.multiply_add(exact, scale if bits == 8 else step, totals[t])
                return totals

            totals = code.loop(columns, [constant(F32, 0.0)] * TILE_TOKENS, body)
            for t, total in enumerate(totals):
                if bits == 8:
                    total = b.fmul(total, code.load(code.at(code.pointer(given[1], F32), lanes), F32))
                code.store(total, code.at(code.pointer(given[7], F32), b.mul(given[8], code.integer(t)), lanes))
            return nothing

        code.loop(code.integer(ROW_BLOCK // LANES), [], one_half)

    return code_intrinsic(9, generate)


def _unpack(code: Code, packed: Value, out: Value) -> None:
    """32 columns of 16 rows in 4 bits as bytes."""
    b = code.b
    low = constant(I32, 0x0F0F0F0F)
    for word in range(COLUMN_BLOCK // 8):
        both = code.load(code.at(code.pointer(packed, I32), code.integer(word * ROW_BLOCK)), I32)
        for number, four in enumerate((b.and_(both, low), b.and_(b.lshr(both, constant(I32, 4)), low))):
            code.store(four, code.at(code.pointer(out, I32), code.integer((2 * word + number) * LANES)))


def _tile_multiply(code: Code, rows: Value, row_bytes: Value, weights: Value, stride: int, sums: Value, bits: int) -> None:
    """16 tokens times 16 rows over 32 columns, into ``sums`` (int32)."""

    def tile(number: int) -> Value:
        return ir.Constant(I8, number)

    b = code.b
    _call(b, "llvm.x86.tilezero", tile(_SUMS))
    _call(b, "llvm.x86.tileloadd64", tile(_INPUTS), code.pointer(rows, I8), row_bytes)
    _call(b, "llvm.x86.tileloadd64", tile(_WEIGHTS), code.pointer(weights, I8), code.integer(stride))
    _call(b, f"llvm.x86.tdpb{'ss' if bits == 8 else 'su'}d", tile(_SUMS), tile(_INPUTS), tile(_WEIGHTS))
    _call(b, "llvm.x86.tilestored64", tile(_SUMS), code.pointer(sums, I8), code.integer(_ROW_BYTES))


def _scale_and_zero(code: Code, scales: Value, zeros: Value, group: Value, half: Value) -> tuple[Value, Value]:
    b = code.b
    both = b.zext(code.load(code.at(code.pointer(zeros, I8), b.mul(group, code.integer(LANES))), I8), vector(I32))
    shift = code.splat(b.trunc(b.mul(half, code.integer(4)), I32))
    zero = b.uitofp(b.and_(b.lshr(both, shift), constant(I32, 15)), vector(F32))
    at = b.add(b.mul(group, code.integer(ROW_BLOCK)), b.mul(half, code.integer(LANES)))
    return code.bfloat16(code.load(code.at(code.pointer(scales, I16), at), I16)), zero
