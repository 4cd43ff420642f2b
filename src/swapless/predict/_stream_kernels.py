"""The learned predictor's arithmetic for one token, compiled.

One token is products of a vector and a matrix. A matrix lies output by output, so that each product is a sum over what lies
side by side: nothing is written inside a loop, and the compiler makes it wide. What it takes is reading the weights from
memory, so they stay in half precision, as they lie in the file, and are widened as they are read.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from swapless.compiled import kernel, part_of

_compiled: Any = kernel(fastmath={"reassoc", "contract", "nsz"})

_X86 = llvm.get_default_triple().startswith(("x86", "i686"))
HALF = bool(not _X86 or llvm.get_host_cpu_features().get("f16c"))
"""Whether the processor widens half precision itself: nearly all do, x86 since 2012."""


def half_bits(weights: np.ndarray) -> np.ndarray:
    """Weights as the kernels take them: the bits of float16, or float32 where the processor cannot widen those."""
    if not HALF:
        return np.ascontiguousarray(weights, np.float32)
    return np.ascontiguousarray(weights, np.float16).view(np.uint16)


def _widening(_: Any, bits: Any) -> Any:
    def code(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(bits), code


_widened: Any = intrinsic(_widening)


def wide(weight: Any) -> Any:
    """A weight as float32."""
    return np.float32(weight.view(np.float16)) if weight.dtype == np.uint16 else weight


@overload(wide, inline="always")
def _wide(weight):  # type: ignore[no-untyped-def]
    if weight == types.uint16:
        return lambda weight: _widened(weight)
    return lambda weight: weight


part_of(wide, _wide)


@_compiled
def add_product(x: Any, weight: Any, out: Any) -> None:
    """Add ``weight @ x`` to ``out``: x (n,), weight (m, n) as :func:`half_bits` has it, out (m,)."""
    for row in range(len(out)):
        weights, total = weight[row], np.float32(0)
        for place in range(len(x)):
            total += x[place] * wide(weights[place])
        out[row] += total


@_compiled
def scale_rms(x: Any, out: Any) -> None:
    """``x`` scaled to a mean square of 1, into ``out``."""
    total = np.float32(0)
    for place in range(len(x)):
        total += x[place] * x[place]
    factor = np.float32(1) / np.sqrt(total / np.float32(len(x)) + np.float32(1.1920929e-07))
    for place in range(len(x)):
        out[place] = x[place] * factor


@_compiled
def silu(x: Any) -> None:
    """``x * sigmoid(x)`` in place."""
    for place in range(len(x)):
        x[place] = x[place] / (np.float32(1) + np.exp(-x[place]))


@_compiled
def attend(
    x: Any,
    place: int,
    keys: Any,
    values: Any,
    qkv: Any,
    out: Any,
    up: Any,
    up_bias: Any,
    down: Any,
    down_bias: Any,
    distance: Any,
) -> None:
    """One attention layer on the vector ``x`` (D,) of the token at ``place``, in place.

    ``keys`` and ``values`` (W, D) are rings of the last W tokens; ``distance`` (heads, W).
    """
    width, (heads, window) = len(x), distance.shape
    size = width // heads
    normed, fed = np.empty(width, np.float32), np.zeros(3 * width, np.float32)
    scale_rms(x, normed)
    add_product(normed, qkv, fed)
    keys[place % window] = fed[width : 2 * width]
    values[place % window] = fed[2 * width :]
    count = min(place + 1, window)
    mixed, weight = np.zeros(width, np.float32), np.empty(count, np.float32)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        most = np.float32(-np.inf)
        for back in range(count):
            row, total = (place - back) % window, np.float32(0)
            for d in range(part.start, part.stop):
                total += fed[d] * keys[row, d]
            weight[back] = total / np.sqrt(np.float32(size)) + distance[head, back]
            most = max(most, weight[back])
        total = np.float32(0)
        for back in range(count):
            weight[back] = np.exp(weight[back] - most)
            total += weight[back]
        for back in range(count):
            row, share = (place - back) % window, weight[back] / total
            for d in range(part.start, part.stop):
                mixed[d] += share * values[row, d]
    add_product(mixed, out, x)
    scale_rms(x, normed)
    inner = up_bias.copy()
    add_product(normed, up, inner)
    silu(inner)
    add_product(inner, down, x)
    for d in range(width):
        x[d] += down_bias[d]


@_compiled
def base_logits(
    x: Any,
    fed: Any,
    first: int,
    end: int,
    out: Any,
    bias: Any,
    base: Any,
    hidden: Any,
    into: Any,
    context: Any,
    out_weight: Any,
) -> None:
    """Base logits ``out[first:end]`` (L, E) from the context ``x`` (D,), scaled, and the blocks ``fed`` (L, BLOCKS*E)."""
    inner = np.empty(hidden.shape[2], np.float32)
    for layer in range(first, end):
        out[layer] = bias[layer]
        inner[:] = hidden[layer, 0]
        add_product(x, context[layer], inner)
        add_product(fed[layer], base[layer], out[layer])
        add_product(fed[layer], into[layer], inner)
        silu(inner)
        add_product(inner, out_weight[layer], out[layer])


@_compiled
def step(state: Any, layer: int, ids: Any, to_inner: Any, bias: Any, choice: Any, direct: Any, to_state: Any) -> None:
    """The state (D,) after the choices ``ids`` (K,) of one MoE layer, in place; weights of all layers."""
    normed, inner = np.empty(len(state), np.float32), bias[layer].copy()
    scale_rms(state, normed)
    add_product(normed, to_inner[layer], inner)
    for place in range(len(ids)):
        if ids[place] >= 0:
            for h in range(len(inner)):
                inner[h] += choice[layer, ids[place], h]
            for d in range(len(state)):
                state[d] += direct[layer, ids[place], d]
    silu(inner)
    add_product(inner, to_state[layer], state)


@_compiled
def read(state: Any, ids: Any, known: int, base: Any, gain: Any, shift: Any, weight: Any, near: Any, out: Any) -> None:
    """Likelihoods ``out`` (n, E) of the first n layers from ``known`` on; ``ids`` (L, K) of the known layers below."""
    normed, x = np.empty(len(state), np.float32), np.empty(len(state), np.float32)
    scale_rms(state, normed)
    experts = out.shape[1]
    for gap in range(len(out)):
        layer = known + gap
        for d in range(len(x)):
            x[d] = normed[d] * gain[gap, d]
        for expert in range(experts):
            out[gap, expert] = base[layer, expert] + shift[gap, layer, expert]
        add_product(x, weight[layer], out[gap])
        if gap < near.shape[0]:
            for back in range(min(near.shape[0], known)):
                for place in range(ids.shape[1]):
                    chosen = ids[known - 1 - back, place]
                    if chosen >= 0:
                        for expert in range(experts):
                            out[gap, expert] += near[gap, layer, back * experts + chosen, expert]
        for expert in range(experts):
            out[gap, expert] = np.float32(1) / (np.float32(1) + np.exp(-out[gap, expert]))
