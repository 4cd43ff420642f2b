"""A builder of vector code for kernels: what numba's own language cannot say, given to LLVM as explicit vectors.

Left to itself the compiler does not find these vectors. It fits them to the registers that the processor has: one AVX-512, two
AVX2 or four NEON registers for 16 lanes of 32 bits. Products of bytes go through the widest instruction that there is, and all
ways give the same integers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16

I8, I16, I32, I64, F32 = (ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType())
_BYTES = {I8: 1, I16: 2, I32: 4, F32: 4}

BYTE_PRODUCTS = ("avx512vnni", "avxvnni", "avx2", "generic")
"""Ways of multiplying bytes, best first; the first three are names of processor features."""

Value = Any
"""An LLVM value; llvmlite has no types of its own for the checker."""

_intrinsic_of: Any = intrinsic


def vector(kind: ir.Type, lanes: int = LANES) -> ir.VectorType:
    """The type of a vector."""
    return ir.VectorType(kind, lanes)


def constant(kind: ir.Type, value: float, lanes: int = LANES) -> Value:
    """A vector of one value."""
    return ir.Constant(vector(kind, lanes), [value] * lanes)


def byte_product_of(features: str) -> str:
    """The best of :data:`BYTE_PRODUCTS` for a processor with ``features``, a list as LLVM writes it."""
    present = set(features.split(","))
    return next((way for way in BYTE_PRODUCTS if f"+{way}" in present), "generic")


def has_tiles(features: str) -> bool:
    """Whether a processor with ``features`` has a matrix unit for bytes."""
    return {"+amx-int8", "+avx512vnni"} <= set(features.split(","))


class Code:
    """A builder with the few vector operations that the kernels are made of.

    Parameters
    ----------
    builder : llvmlite.ir.IRBuilder
        Where the code goes.
    way : str
        One of :data:`BYTE_PRODUCTS`.
    tiles : bool
        Whether the processor has a matrix unit for bytes.
    """

    def __init__(self, builder: Any, way: str, tiles: bool) -> None:
        self.b = builder
        self.way = way
        self.tiles = tiles

    def integer(self, value: int) -> Value:
        return ir.Constant(I64, value)

    def pointer(self, address: Value, kind: ir.Type) -> Value:
        return self.b.inttoptr(address, kind.as_pointer())

    def at(self, pointer: Value, *offsets: Value) -> Value:
        for offset in offsets:
            pointer = self.b.gep(pointer, [offset])
        return pointer

    def load(self, pointer: Value, kind: ir.Type, align: int | None = None) -> Value:
        place = self.b.bitcast(pointer, vector(kind).as_pointer())
        return self.b.load(place, align=LANES * _BYTES[kind] if align is None else align)

    def store(self, value: Value, pointer: Value) -> None:
        self.b.store(value, self.b.bitcast(pointer, value.type.as_pointer()), align=1)

    def prefetch(self, address: Value, lines: int) -> None:
        """Ask for so many lines of the cache from an address on, which need not be anyone's."""
        for line in range(lines):
            where = self.pointer(self.b.add(address, self.integer(64 * line)), I8)
            self.call("llvm.prefetch.p0i8", ir.VoidType(), where, I32(0), I32(3), I32(1))

    def scalar(self, address: Value, kind: ir.Type) -> Value:
        return self.b.load(self.pointer(address, kind), align=_BYTES[kind])

    def splat(self, scalar: Value) -> Value:
        nothing = ir.Constant(vector(scalar.type), ir.Undefined)
        first = self.b.insert_element(nothing, scalar, ir.Constant(I32, 0))
        return self.b.shuffle_vector(first, nothing, constant(I32, 0))

    def call(self, name: str, result: ir.Type, *arguments: Value) -> Value:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, name), arguments)

    def multiply_add(self, x: Value, y: Value, z: Value) -> Value:
        return self.call(f"llvm.fmuladd.v{LANES}f32", z.type, x, y, z)

    def bfloat16(self, halves: Value) -> Value:
        return self.b.bitcast(self.b.shl(self.b.zext(halves, vector(I32)), constant(I32, 16)), vector(F32))

    def rounded(self, x: Value) -> Value:
        """Whole numbers nearest to ``x``, halves to even, as int32; no number becomes 0."""
        nearest = self.call(f"llvm.rint.v{LANES}f32", x.type, x)
        return self.call(f"llvm.fptosi.sat.v{LANES}i32.v{LANES}f32", vector(I32), nearest)

    def exponential(self, x: Value) -> Value:
        """``e ** x`` to about one unit in the last place, between the least normal number and the largest."""
        b = self.b
        x = self.call(f"llvm.minnum.v{LANES}f32", x.type, x, constant(F32, 88.0))
        x = self.call(f"llvm.maxnum.v{LANES}f32", x.type, x, constant(F32, -87.0))
        whole = self.call(f"llvm.rint.v{LANES}f32", x.type, b.fmul(x, constant(F32, 1.4426950408889634)))
        rest = self.multiply_add(whole, constant(F32, -0.693359375), x)
        rest = self.multiply_add(whole, constant(F32, 2.12194440e-4), rest)
        total = constant(F32, 1 / 5040)
        for factor in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
            total = self.multiply_add(total, rest, constant(F32, factor))
        power = b.add(b.fptosi(whole, vector(I32)), constant(I32, 127))
        return b.fmul(total, b.bitcast(b.shl(power, constant(I32, 23)), vector(F32)))

    def add_products(self, total: Value, unsigned: Value, signed: Value) -> Value:
        """``total`` plus the products of the four unsigned bytes of each lane with the four signed bytes of ``signed``.

        ``total`` and ``unsigned`` are vectors of int32, ``signed`` is one int32 for all lanes.
        """
        other = self.splat(signed)
        if self.way == "avx512vnni":
            return self.call("llvm.x86.avx512.vpdpbusd.512", vector(I32), total, unsigned, other)
        if self.way == "avxvnni":
            return self._in_halves(
                lambda *parts: self.call("llvm.x86.avx512.vpdpbusd.256", vector(I32, LANES // 2), *parts),
                total,
                unsigned,
                other,
            )
        if self.way == "avx2":
            return self.b.add(total, self._in_halves(self._pairs, unsigned, other))
        return self._one_by_one(total, unsigned, other)

    def _pairs(self, unsigned: Value, signed: Value) -> Value:
        """Bytes widened to 16 bits, even ones and odd ones apart, each pair multiplied and added by one instruction."""
        b, lanes = self.b, LANES // 2
        wide = vector(I16, LANES)
        eight, low = constant(I16, 8), constant(I16, 255)
        u, s = b.bitcast(unsigned, wide), b.bitcast(signed, wide)
        pairs = ((b.and_(u, low), b.ashr(b.shl(s, eight), eight)), (b.lshr(u, eight), b.ashr(s, eight)))
        even, odd = (self.call("llvm.x86.avx2.pmadd.wd", vector(I32, lanes), *pair) for pair in pairs)
        return b.add(even, odd)

    def _one_by_one(self, total: Value, unsigned: Value, signed: Value) -> Value:
        b = self.b
        for byte in range(4):
            u = b.and_(b.lshr(unsigned, constant(I32, 8 * byte)), constant(I32, 255))
            s = b.ashr(b.shl(signed, constant(I32, 24 - 8 * byte)), constant(I32, 24))
            total = b.add(total, b.mul(u, s))
        return total

    def _in_halves(self, apply: Callable[..., Value], *vectors: Value) -> Value:
        def part(whole: Value, first: int) -> Value:
            places = ir.Constant(vector(I32, LANES // 2), list(range(first, first + LANES // 2)))
            return self.b.shuffle_vector(whole, ir.Constant(whole.type, ir.Undefined), places)

        halves = [apply(*(part(whole, first) for whole in vectors)) for first in (0, LANES // 2)]
        return self.b.shuffle_vector(*halves, ir.Constant(vector(I32), list(range(LANES))))

    def loop(
        self, count: Value, carried: Sequence[Value], body: Callable[[Value, list[Value]], Sequence[Value]]
    ) -> Sequence[Value]:
        """Run ``body(i, carried)`` for i in 0 .. count - 1 (at least once) and return what it carried out."""
        b, before = self.b, self.b.block
        inside, after = b.append_basic_block("inside"), b.append_basic_block("after")
        b.branch(inside)
        b.position_at_end(inside)
        i = b.phi(I64)
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


def code_intrinsic(arguments: int, generate: Callable[[Code, Sequence[Value]], None], way: str | None = None) -> Any:
    """A function of one tuple of so many int64 that returns nothing, callable from compiled code.

    ``way`` of multiplying bytes; None takes the best that the processor compiled for has.
    """

    @_intrinsic_of
    def kernel(context: Any, given: Any) -> tuple[Any, Any]:
        def codegen(context: Any, builder: Any, signature: Any, values: Sequence[Value]) -> Value:
            features = context.codegen().magic_tuple()[2]
            code = Code(builder, way or byte_product_of(features), has_tiles(features))
            generate(code, cgutils.unpack_tuple(builder, values[0], arguments))
            return context.get_dummy_value()

        return types.void(types.UniTuple(types.int64, arguments)), codegen

    return kernel


@_intrinsic_of
def claim(context: Any, address: Any) -> tuple[Any, Any]:
    """Take the int64 at an address and add one to it, as one step that no other thread can come between."""

    def codegen(context: Any, builder: Any, signature: Any, values: Sequence[Value]) -> Value:
        return builder.atomic_rmw("add", builder.inttoptr(values[0], I64.as_pointer()), ir.Constant(I64, 1), "seq_cst")

    return types.int64(types.int64), codegen


@_intrinsic_of
def read_shared(context: Any, address: Any) -> tuple[Any, Any]:
    """The int64 at an address that other threads add to: what they wrote before is seen too."""

    def codegen(context: Any, builder: Any, signature: Any, values: Sequence[Value]) -> Value:
        return builder.load_atomic(builder.inttoptr(values[0], I64.as_pointer()), "acquire", 8)

    return types.int64(types.int64), codegen


@_intrinsic_of
def address_of(context: Any, pointer: Any) -> tuple[Any, Any]:
    """The int64 that a C pointer is."""

    def codegen(context: Any, builder: Any, signature: Any, values: Sequence[Value]) -> Value:
        return builder.ptrtoint(values[0], I64)

    return types.int64(types.voidptr), codegen


@_intrinsic_of
def read_int(context: Any, address: Any) -> tuple[Any, Any]:
    """The int64 at an address."""

    def codegen(context: Any, builder: Any, signature: Any, values: Sequence[Value]) -> Value:
        return builder.load(builder.inttoptr(values[0], I64.as_pointer()))

    return types.int64(types.int64), codegen


def stack_of(floats: int) -> Any:
    """A function without arguments whose result is the address of so many floats that live as long as its caller."""

    @_intrinsic_of
    def scratch(context: Any) -> tuple[Any, Any]:
        def codegen(context: Any, builder: Any, signature: Any, values: Sequence[Value]) -> Value:
            return stack(builder, floats)

        return types.int64(), codegen

    return scratch


def stack(builder: Any, floats: int) -> Value:
    """Address of memory for so many floats that lives as long as the function that ``builder`` writes."""
    place = cgutils.alloca_once(builder, F32, size=floats)
    place.align = 64
    return builder.ptrtoint(place, I64)


@_intrinsic_of
def pause(context: Any) -> tuple[Any, Any]:
    """Tell the processor that this thread waits for another, where it has an instruction for that."""

    def codegen(context: Any, builder: Any, signature: Any, values: Sequence[Value]) -> Value:
        if "x86" in context.codegen().magic_tuple()[0]:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), codegen
