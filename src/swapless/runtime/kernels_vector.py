"""The inner loops of quantised experts, written in the compiler's vector language.

A block of 32 rows is two vectors of 16 lanes, one row a lane; one input value, broadcast, serves all of them. The loops are
given to LLVM as explicit vectors, because left to itself the compiler does not find them: it then fits them to the
registers that the processor has (two AVX-512, four AVX2, eight NEON registers a block).

In 4 bits, a value is not converted but put into the mantissa of 16.0 with one shift and one three-way logic operation, which
gives ``16 + value`` exactly; the surplus of 16 and the zero point are taken off once a group, times the sum of its inputs.

Everything is an address: what a kernel is given, it trusts. :mod:`~swapless.runtime.kernels` is the only caller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from swapless.store.matrix import COLUMN_BLOCK, ROW_BLOCK

LANES = 16
HALVES = ROW_BLOCK // LANES
_CHAINS = 2
"""Sums kept apart by column, so that an addition need not wait for the one before it."""

_I8, _I16, _I32, _I64, _F32 = (ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType())
_BYTES = {_I8: 1, _I16: 2, _I32: 4, _F32: 4}
_BIAS = 16
_BIAS_BITS = 0x41800000
"""16.0, the least power of two whose last four bits of mantissa count ones: those from bit 19 on."""

_ONES_BIT = 19

Value = Any
"""An LLVM value; llvmlite has no types of its own for the checker."""

_intrinsic_of: Any = intrinsic


def _vector(kind: ir.Type) -> ir.VectorType:
    return ir.VectorType(kind, LANES)


def _constant(kind: ir.Type, value: float) -> Value:
    return ir.Constant(_vector(kind), [value] * LANES)


class _Code:
    """A builder with the few vector operations that the kernels are made of."""

    def __init__(self, builder: Any) -> None:
        self.b = builder

    def integer(self, value: int) -> Value:
        return ir.Constant(_I64, value)

    def pointer(self, address: Value, kind: ir.Type) -> Value:
        return self.b.inttoptr(address, kind.as_pointer())

    def at(self, pointer: Value, *offsets: Value) -> Value:
        for offset in offsets:
            pointer = self.b.gep(pointer, [offset])
        return pointer

    def load(self, pointer: Value, kind: ir.Type) -> Value:
        return self.b.load(self.b.bitcast(pointer, _vector(kind).as_pointer()), align=LANES * _BYTES[kind])

    def store(self, value: Value, pointer: Value) -> None:
        self.b.store(value, self.b.bitcast(pointer, value.type.as_pointer()), align=4)

    def splat(self, scalar: Value) -> Value:
        nothing = ir.Constant(_vector(scalar.type), ir.Undefined)
        first = self.b.insert_element(nothing, scalar, ir.Constant(_I32, 0))
        return self.b.shuffle_vector(first, nothing, _constant(_I32, 0))

    def multiply_add(self, x: Value, y: Value, z: Value) -> Value:
        kind = ir.FunctionType(z.type, [z.type] * 3)
        return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, f"llvm.fmuladd.v{LANES}f32"), [x, y, z])

    def bfloat16(self, halves: Value) -> Value:
        return self.b.bitcast(self.b.shl(self.b.zext(halves, _vector(_I32)), _constant(_I32, 16)), _vector(_F32))

    def biased_nibble(self, words: Value, place: int) -> Value:
        """``16 + value`` of the nibble at ``place`` of every word."""
        shift = _ONES_BIT - 4 * place
        moved = self.b.shl(words, _constant(_I32, shift)) if shift > 0 else self.b.lshr(words, _constant(_I32, -shift))
        masked = self.b.and_(moved, _constant(_I32, 15 << _ONES_BIT))
        return self.b.bitcast(self.b.or_(masked, _constant(_I32, _BIAS_BITS)), _vector(_F32))

    def loop(
        self, count: Value, carried: Sequence[Value], body: Callable[[Value, list[Value]], Sequence[Value]]
    ) -> Sequence[Value]:
        """Run ``body(i, carried)`` for i in 0 .. count - 1 (at least once) and return what it carried out."""
        b, before = self.b, self.b.block
        inside, after = b.append_basic_block("inside"), b.append_basic_block("after")
        b.branch(inside)
        b.position_at_end(inside)
        i = b.phi(_I64)
        i.add_incoming(self.integer(0), before)
        held = [b.phi(value.type) for value in carried]
        for phi, value in zip(held, carried, strict=True):
            phi.add_incoming(value, before)
        results = body(i, list(held))
        following = b.add(i, self.integer(1))
        for phi, value in zip([i, *held], [following, *results], strict=True):
            phi.add_incoming(value, b.block)
        b.cbranch(b.icmp_signed("<", following, count), inside, after)
        b.position_at_end(after)
        return results


def _intrinsic(arguments: int, generate: Callable[[_Code, Sequence[Value]], None]) -> Any:
    """A function of one tuple of so many int64 that returns nothing, callable from compiled code."""

    @_intrinsic_of
    def kernel(context: Any, given: Any) -> tuple[Any, Any]:
        def codegen(context: Any, builder: Any, signature: Any, values: Sequence[Value]) -> Value:
            generate(_Code(builder), cgutils.unpack_tuple(builder, values[0], arguments))
            return context.get_dummy_value()

        return types.void(types.UniTuple(types.int64, arguments)), codegen

    return kernel


def product_8(tokens: int) -> Any:
    """Kernel of ``tokens`` rows of input times a block of 32 rows in 8 bits.

    Arguments: addresses of values, scales and input, floats from one input to the next, column blocks, address of the output,
    floats from one output to the next.
    """

    def generate(code: _Code, given: Sequence[Value]) -> None:
        b = code.b
        values, scales = code.pointer(given[0], _I8), code.pointer(given[1], _F32)
        inputs = [code.at(code.pointer(given[2], _F32), b.mul(given[3], code.integer(t))) for t in range(tokens)]

        def body(block: Value, sums: list[Value]) -> list[Value]:
            for column in range(COLUMN_BLOCK):
                place = b.add(b.mul(block, code.integer(COLUMN_BLOCK)), code.integer(column))
                weights = []
                for half in range(HALVES):
                    where = code.at(values, b.mul(place, code.integer(ROW_BLOCK)), code.integer(half * LANES))
                    weights.append(b.sitofp(b.sext(code.load(where, _I8), _vector(_I32)), _vector(_F32)))
                for t in range(tokens):
                    x = code.splat(b.load(code.at(inputs[t], place)))
                    for half in range(HALVES):
                        chain = (t * HALVES + half) * _CHAINS + column % _CHAINS
                        sums[chain] = code.multiply_add(weights[half], x, sums[chain])
            return sums

        sums = code.loop(given[4], [_constant(_F32, 0.0)] * (tokens * HALVES * _CHAINS), body)
        for t in range(tokens):
            for half in range(HALVES):
                first = (t * HALVES + half) * _CHAINS
                scale = code.load(code.at(scales, code.integer(half * LANES)), _F32)
                out = code.at(code.pointer(given[5], _F32), b.mul(given[6], code.integer(t)), code.integer(half * LANES))
                code.store(b.fmul(b.fadd(sums[first], sums[first + 1]), scale), out)

    return _intrinsic(7, generate)


def product_4(tokens: int) -> Any:
    """Kernel of ``tokens`` rows of input times a block of 32 rows in 4 bits.

    Arguments: addresses of values, scales, zeros, input and the input's sums by column block, floats from one input to the
    next, from one row of sums to the next, column blocks, log2 of column blocks a group, address of the output, floats from
    one output to the next.
    """

    def generate(code: _Code, given: Sequence[Value]) -> None:
        b = code.b
        words, scales, zeros = (code.pointer(at, kind) for at, kind in zip(given[:3], (_I32, _I16, _I8), strict=True))
        inputs = [code.at(code.pointer(given[3], _F32), b.mul(given[5], code.integer(t))) for t in range(tokens)]
        sums = [code.at(code.pointer(given[4], _F32), b.mul(given[6], code.integer(t))) for t in range(tokens)]

        def body(block: Value, totals: list[Value]) -> list[Value]:
            products: dict[tuple[int, int, int], Value] = {}
            for word in range(COLUMN_BLOCK // 8):
                packed = []
                for half in range(HALVES):
                    first = b.mul(block, code.integer(COLUMN_BLOCK // 8 * ROW_BLOCK))
                    packed.append(code.load(code.at(words, first, code.integer(word * ROW_BLOCK + half * LANES)), _I32))
                for place in range(8):
                    column = word * 8 + place
                    nibbles = [code.biased_nibble(halves, place) for halves in packed]
                    for t in range(tokens):
                        where = code.at(inputs[t], b.mul(block, code.integer(COLUMN_BLOCK)), code.integer(column))
                        x = code.splat(b.load(where))
                        for half in range(HALVES):
                            key = t, half, column % _CHAINS
                            so_far = products.get(key)
                            products[key] = (
                                b.fmul(nibbles[half], x) if so_far is None else code.multiply_add(nibbles[half], x, so_far)
                            )
            scale, zero = _scale_and_zero(code, scales, zeros, b.lshr(block, given[8]))
            for t in range(tokens):
                x_sum = code.splat(b.load(code.at(sums[t], block)))
                for half in range(HALVES):
                    both = b.fadd(products[t, half, 0], products[t, half, 1])
                    unbiased = b.fsub(both, b.fmul(zero[half], x_sum))
                    totals[t * HALVES + half] = code.multiply_add(scale[half], unbiased, totals[t * HALVES + half])
            return totals

        totals = code.loop(given[7], [_constant(_F32, 0.0)] * (tokens * HALVES), body)
        for t in range(tokens):
            for half in range(HALVES):
                out = code.at(code.pointer(given[9], _F32), b.mul(given[10], code.integer(t)), code.integer(half * LANES))
                code.store(totals[t * HALVES + half], out)

    return _intrinsic(11, generate)


def _scale_and_zero(code: _Code, scales: Value, zeros: Value, group: Value) -> tuple[list[Value], list[Value]]:
    """Of a group: its scales, and ``16 + zero``, by half."""
    b = code.b
    both = b.zext(code.load(code.at(zeros, b.mul(group, code.integer(LANES))), _I8), _vector(_I32))
    halves = [b.and_(both, _constant(_I32, 15)), b.lshr(both, _constant(_I32, 4))]
    zero = [b.uitofp(b.add(half, _constant(_I32, _BIAS)), _vector(_F32)) for half in halves]
    first = b.mul(group, code.integer(ROW_BLOCK))
    places = [code.at(scales, first, code.integer(half * LANES)) for half in range(HALVES)]
    return [code.bfloat16(code.load(place, _I16)) for place in places], zero


def expansion_8() -> Any:
    """Kernel that writes a block of 32 rows in 8 bits as float32, a column after the other.

    Arguments: addresses of values and scales, column blocks, address of the output, floats from one column to the next.
    """

    def generate(code: _Code, given: Sequence[Value]) -> None:
        b = code.b
        values, scales, out = (code.pointer(given[i], kind) for i, kind in ((0, _I8), (1, _F32), (3, _F32)))
        scale = [code.load(code.at(scales, code.integer(half * LANES)), _F32) for half in range(HALVES)]

        def body(column: Value, nothing: list[Value]) -> list[Value]:
            for half in range(HALVES):
                where = code.at(values, b.mul(column, code.integer(ROW_BLOCK)), code.integer(half * LANES))
                weights = b.sitofp(b.sext(code.load(where, _I8), _vector(_I32)), _vector(_F32))
                place = code.at(out, b.mul(column, given[4]), code.integer(half * LANES))
                code.store(b.fmul(weights, scale[half]), place)
            return nothing

        code.loop(b.mul(given[2], code.integer(COLUMN_BLOCK)), [], body)

    return _intrinsic(5, generate)


def expansion_4() -> Any:
    """Kernel that writes a block of 32 rows in 4 bits as float32, a column after the other.

    Arguments: addresses of values, scales and zeros, column blocks, log2 of column blocks a group, address of the output,
    floats from one column to the next.
    """

    def generate(code: _Code, given: Sequence[Value]) -> None:
        b = code.b
        words, scales, zeros = (code.pointer(at, kind) for at, kind in zip(given[:3], (_I32, _I16, _I8), strict=True))
        out = code.pointer(given[5], _F32)

        def body(block: Value, nothing: list[Value]) -> list[Value]:
            scale, zero = _scale_and_zero(code, scales, zeros, b.lshr(block, given[4]))
            for word in range(COLUMN_BLOCK // 8):
                for half in range(HALVES):
                    first = b.mul(block, code.integer(COLUMN_BLOCK // 8 * ROW_BLOCK))
                    packed = code.load(code.at(words, first, code.integer(word * ROW_BLOCK + half * LANES)), _I32)
                    for place in range(8):
                        column = b.add(b.mul(block, code.integer(COLUMN_BLOCK)), code.integer(word * 8 + place))
                        weights = b.fmul(b.fsub(code.biased_nibble(packed, place), zero[half]), scale[half])
                        code.store(weights, code.at(out, b.mul(column, given[6]), code.integer(half * LANES)))
            return nothing

        code.loop(given[3], [], body)

    return _intrinsic(7, generate)


@_intrinsic_of
def claim(context: Any, address: Any) -> tuple[Any, Any]:
    """Take the int64 at an address and add one to it, as one step that no other thread can come between."""

    def codegen(context: Any, builder: Any, signature: Any, values: Sequence[Value]) -> Value:
        pointer = builder.inttoptr(values[0], _I64.as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(_I64, 1), "seq_cst")

    return types.int64(types.int64), codegen


@_intrinsic_of
def address_of(context: Any, pointer: Any) -> tuple[Any, Any]:
    """The int64 that a C pointer is."""

    def codegen(context: Any, builder: Any, signature: Any, values: Sequence[Value]) -> Value:
        return builder.ptrtoint(values[0], _I64)

    return types.int64(types.voidptr), codegen


def _access(kind: Any, llvm: ir.Type) -> tuple[Any, Any]:
    @_intrinsic_of
    def read(context: Any, address: Any) -> tuple[Any, Any]:
        def codegen(context: Any, builder: Any, signature: Any, values: Sequence[Value]) -> Value:
            return builder.load(builder.inttoptr(values[0], llvm.as_pointer()))

        return kind(types.int64), codegen

    @_intrinsic_of
    def write(context: Any, address: Any, value: Any) -> tuple[Any, Any]:
        def codegen(context: Any, builder: Any, signature: Any, values: Sequence[Value]) -> Value:
            builder.store(values[1], builder.inttoptr(values[0], llvm.as_pointer()))
            return context.get_dummy_value()

        return types.void(types.int64, kind), codegen

    return read, write


read_int, _ = _access(types.int64, _I64)
read_float, write_float = _access(types.float32, _F32)
