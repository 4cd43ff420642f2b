"""The learned predictor's arithmetic, compiled: one order of every sum, so that each machine gives the same bits.

One token is products of a vector and a matrix. A matrix lies input by input, and an input is added to all outputs at once: the
compiler makes that wide without a say in the order of a sum. What one token takes is reading the weights from memory, so they
may stay in half precision, as they lie in the file, and are widened as they are read, which changes no value.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from swapless.compiled import kernel, part_of
from swapless.portable import exp32

_compiled: Any = kernel(error_model="numpy")

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
def _add_four(x: Any, weight: Any, place: int, out: Any) -> None:
    """What inputs ``place`` to ``place + 3`` add: four at a time, or most of the work would be fetching and storing sums."""
    a, b, c, d = x[place], x[place + 1], x[place + 2], x[place + 3]
    if a != 0 or b != 0 or c != 0 or d != 0:
        first, second, third, fourth = weight[place], weight[place + 1], weight[place + 2], weight[place + 3]
        for column in range(len(out)):
            total = out[column] + a * wide(first[column])
            total = total + b * wide(second[column])
            total = total + c * wide(third[column])
            out[column] = total + d * wide(fourth[column])


@_compiled
def _add_rest(x: Any, weight: Any, place: int, out: Any) -> None:
    while place < len(x):
        a, row = x[place], weight[place]
        for column in range(len(out)):
            out[column] += a * wide(row[column])
        place += 1


@_compiled
def add_product(x: Any, weight: Any, out: Any) -> None:
    """Add ``x @ weight`` to ``out``, input after input: x (n,), weight (n, m) float32 or :func:`half_bits`, out (m,)."""
    fours = len(x) // 4 * 4
    for place in range(0, fours, 4):
        _add_four(x, weight, place, out)
    _add_rest(x, weight, fours, out)


@_compiled
def add_products(rows: Any, weight: Any, out: Any) -> None:
    """:func:`add_product` of each of ``rows`` (T, n) to each of ``out`` (T, m)."""
    fours = rows.shape[1] // 4 * 4
    for begin in range(0, len(rows), 16):  # a few rows side by side, or the whole matrix would be fetched for each
        end = min(begin + 16, len(rows))
        for place in range(0, fours, 4):
            for t in range(begin, end):
                _add_four(rows[t], weight, place, out[t])
        for t in range(begin, end):
            _add_rest(rows[t], weight, fours, out[t])


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
def sigmoid(x: Any) -> Any:
    """``1 / (1 + exp(-x))``."""
    return np.float32(1) / (np.float32(1) + exp32(-x))


@_compiled
def sigmoid_all(x: Any) -> None:
    """:func:`sigmoid` of each of ``x`` (n,), in place."""
    for place in range(len(x)):
        x[place] = sigmoid(x[place])


@_compiled
def silu(x: Any) -> None:
    """``x * sigmoid(x)`` in place."""
    for place in range(len(x)):
        x[place] = x[place] / (np.float32(1) + exp32(-x[place]))


@_compiled
def add_text(word: Any, letters: Any, groups: Any, out: Any) -> None:
    """Add a token's own vector to ``out`` (D,): that of its ``word`` (D,), and the mean of its letter groups' by root of count.

    ``groups`` int64 (G,) are rows of ``letters``, the last of which stands for none.
    """
    total, count = np.zeros(len(out), np.float32), 0
    for place in range(len(groups)):
        if groups[place] < len(letters) - 1:
            count += 1
            for d in range(len(out)):
                total[d] += letters[groups[place], d]
    for d in range(len(out)):
        out[d] += word[d]
    if count:
        root = np.sqrt(np.float32(count))
        for d in range(len(out)):
            out[d] += total[d] / root


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

    ``keys`` (D, W) and ``values`` (W, D) are rings of the last W tokens; ``distance`` (heads, W).
    """
    width, (heads, window) = len(x), distance.shape
    size = width // heads
    normed, fed = np.empty(width, np.float32), np.zeros(3 * width, np.float32)
    scale_rms(x, normed)
    add_product(normed, qkv, fed)
    for d in range(width):
        keys[d, place % window] = fed[width + d]
    values[place % window] = fed[2 * width :]
    count = min(place + 1, window)
    mixed, weight, near = np.zeros(width, np.float32), np.empty(count, np.float32), np.empty(count, np.float32)
    for head in range(heads):
        weight[:] = np.float32(0)
        for d in range(head * size, (head + 1) * size):
            row = keys[d]
            for slot in range(count):
                weight[slot] += fed[d] * row[slot]
        most, total = np.float32(-np.inf), np.float32(0)
        for back in range(count):
            near[back] = weight[(place - back) % window] / np.sqrt(np.float32(size)) + distance[head, back]
            most = max(most, near[back])
        for back in range(count):
            near[back] = exp32(near[back] - most)
            total += near[back]
        for back in range(count):
            slot, share = (place - back) % window, near[back] / total
            for d in range(head * size, (head + 1) * size):
                mixed[d] += share * values[slot, d]
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
def read(
    state: Any, ids: Any, known: int, first: int, base: Any, gain: Any, shift: Any, weight: Any, near: Any, out: Any
) -> None:
    """Likelihoods ``out`` (n, E) of n layers from ``first`` on; the first ``known`` <= first ones are, by ``ids`` (L, K)."""
    normed, x = np.empty(len(state), np.float32), np.empty(len(state), np.float32)
    scale_rms(state, normed)
    experts = out.shape[1]
    for number in range(len(out)):
        layer = first + number
        gap = layer - known
        for d in range(len(x)):
            x[d] = normed[d] * gain[gap, d]
        for expert in range(experts):
            out[number, expert] = base[layer, expert] + shift[gap, layer, expert]
        add_product(x, weight[layer], out[number])
        if gap < near.shape[0]:
            for back in range(min(near.shape[0], known)):
                for place in range(ids.shape[1]):
                    chosen = ids[known - 1 - back, place]
                    if chosen >= 0:
                        for expert in range(experts):
                            out[number, expert] += near[gap, layer, back * experts + chosen, expert]
        for expert in range(experts):
            out[number, expert] = sigmoid(out[number, expert])


@_compiled
def attend_all(x: Any, keys: Any, values: Any, weights: Any) -> None:
    """:func:`attend` on the vectors ``x`` (T, D) of a document, token after token."""
    for t in range(len(x)):
        attend(x[t], t, keys, values, *weights)


@_compiled
def document_scores(x: Any, blocks: Any, ids: Any, known: Any, base: Any, steps: Any, reading: Any, out: Any) -> None:
    """Likelihoods ``out`` (T, L, E) of a document from the states ``x`` (T, D) before its tokens, which are lost.

    ``blocks`` (BLOCKS, T, L, E); ``ids`` (T, L, K); ``known`` int64 (L,) layers known when each is asked for, ascending;
    ``base``, ``steps`` and ``reading`` the weights that :func:`base_logits`, :func:`step` and :func:`read` take.
    """
    count, (tokens, layers, experts) = len(blocks), out.shape
    normed, fed = np.empty_like(x), np.empty((layers, count * experts), np.float32)
    for t in range(tokens):
        scale_rms(x[t], normed[t])
    for layer in range(layers):  # one layer's weights at a time, for all tokens
        for t in range(tokens):
            for block in range(count):
                fed[layer, block * experts : (block + 1) * experts] = blocks[block, t, layer]
            base_logits(normed[t], fed, layer, layer + 1, out[t], *base)
    first = 0
    for level in range(layers):
        end = first
        while end < layers and known[end] == level:
            end += 1
        for t in range(tokens):
            if end > first:
                read(x[t], ids[t], level, first, out[t], *reading, out[t, first:end])
            if end < layers:
                step(x[t], level, ids[t, level], *steps)
        first = end
