"""Quantised experts computed: all experts of a call in two passes over their weights, with no interpreter in between.

The first pass makes gate and up of every expert, a block of 32 rows at a time, and applies the activation while the block is
in the cache; the second makes down. A task is one block of one expert; threads claim tasks from a counter. Where the gate is
not the common one (a bias, clamping, no gate at all), the caller does that part and asks for plain products instead.

Inputs stay float32, so the only error is that of the rounded weights. A token's result depends on nothing but its
own input: neither on the other tokens and experts of the call nor on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import cfunc, njit, types

from swapless.runtime.kernels_threads import run_on_all
from swapless.runtime.kernels_vector import (
    address_of,
    claim,
    expansion_4,
    expansion_8,
    product_4,
    product_8,
    read_float,
    read_int,
    write_float,
)
from swapless.store.matrix import COLUMN_BLOCK, ROW_BLOCK, MatrixLayout

_NONE, _SILU, _GELU_TANH = range(3)
ACTIVATIONS = {"silu": _SILU, "gelu_tanh": _GELU_TANH}
"""What the first pass can apply as ``activation(gate) * up``."""

_AT_ONCE = 4
"""Tokens that share one walk over the weights: as many as the sums of fit in registers."""

EXPAND_BYTES = 4 << 20
"""Rows are expanded in pieces of about this size: they stay in the cache until they are multiplied."""

_product_8_one, _product_8_many = product_8(1), product_8(_AT_ONCE)
_product_4_one, _product_4_many = product_4(1), product_4(_AT_ONCE)
_expand_8, _expand_4 = expansion_8(), expansion_4()

_inlined: Any = njit(cache=True, nogil=True, error_model="numpy", boundscheck=False)
_cfunc: Any = cfunc
_on_threads: Any = _cfunc(types.void(types.voidptr), cache=True, nopython=True, error_model="numpy", boundscheck=False)

# A call is a row of int64: its own fields, then those of each expert. Bytes from field to field: 8.
_NEXT, _TASKS, _BLOCKS, _BITS, _COLUMN_BLOCKS, _GROUP_SHIFT, _SCALES, _ZEROS = (8 * i for i in range(8))
_INPUT_STRIDE, _SUMS_STRIDE, _OUTPUT_STRIDE, _OUTPUT_SUMS_STRIDE, _ACTIVATION = (8 * i for i in range(8, 13))
_CALL_FIELDS = 13
_MATRIX, _OTHER, _TOKENS, _INPUT, _SUMS, _OUTPUT, _OTHER_OUTPUT, _OUTPUT_SUMS = (8 * i for i in range(8))
_EXPERT_FIELDS = 8


@_inlined
def _block_product(call, matrix, block, tokens, inputs, sums, output):  # type: ignore[no-untyped-def]
    """One block of rows of one matrix, times all tokens of the expert."""
    bits, columns, shift = read_int(call + _BITS), read_int(call + _COLUMN_BLOCKS), read_int(call + _GROUP_SHIFT)
    stride, sums_stride, out_stride = (
        read_int(call + _INPUT_STRIDE),
        read_int(call + _SUMS_STRIDE),
        read_int(call + _OUTPUT_STRIDE),
    )
    groups = columns >> shift
    values = matrix + block * columns * (COLUMN_BLOCK * ROW_BLOCK // 8) * bits
    scales = matrix + read_int(call + _SCALES) + block * ROW_BLOCK * (4 if bits == 8 else groups * 2)
    zeros = matrix + read_int(call + _ZEROS) + block * groups * (ROW_BLOCK // 2)
    token = 0
    while token < tokens:
        at = inputs + 4 * token * stride
        out = output + 4 * (token * out_stride + block * ROW_BLOCK)
        many = token + _AT_ONCE <= tokens
        if bits == 8:
            if many:
                _product_8_many((values, scales, at, stride, columns, out, out_stride))
            else:
                _product_8_one((values, scales, at, stride, columns, out, out_stride))
        else:
            at_sums = sums + 4 * token * sums_stride
            if many:
                _product_4_many((values, scales, zeros, at, at_sums, stride, sums_stride, columns, shift, out, out_stride))
            else:
                _product_4_one((values, scales, zeros, at, at_sums, stride, sums_stride, columns, shift, out, out_stride))
        token += _AT_ONCE if many else 1


@_inlined
def _activate(kind, gate, up):  # type: ignore[no-untyped-def]
    if kind == _SILU:
        return gate / (np.float32(1) + math.exp(-gate)) * up
    inner = np.float32(0.7978845608028654) * (gate + np.float32(0.044715) * gate * gate * gate)
    return np.float32(0.5) * gate * (np.float32(1) + math.tanh(inner)) * up


@_inlined
def _gate_block(call, block, tokens, output, other, sums):  # type: ignore[no-untyped-def]
    """Gate and up of a block become ``activation(gate) * up`` in place, and its sum is noted for the second pass."""
    kind, stride, sums_stride = (
        read_int(call + _ACTIVATION),
        read_int(call + _OUTPUT_STRIDE),
        read_int(call + _OUTPUT_SUMS_STRIDE),
    )
    for token in range(tokens):
        first = 4 * (token * stride + block * ROW_BLOCK)
        total = np.float32(0)
        for lane in range(ROW_BLOCK):
            at = first + 4 * lane
            value = np.float32(_activate(kind, read_float(output + at), read_float(other + at)))
            write_float(output + at, value)
            total += value
        write_float(sums + 4 * (token * sums_stride + block), total)


@_on_threads
def _products(data):  # type: ignore[no-untyped-def]
    """Claim tasks of a call until there are none left; runs on every thread."""
    call = address_of(data)
    blocks, tasks, activation = read_int(call + _BLOCKS), read_int(call + _TASKS), read_int(call + _ACTIVATION)
    task = claim(call + _NEXT)
    while task < tasks:
        block = task % blocks
        expert = call + 8 * (_CALL_FIELDS + task // blocks * _EXPERT_FIELDS)
        tokens, output = read_int(expert + _TOKENS), read_int(expert + _OUTPUT)
        inputs, sums = read_int(expert + _INPUT), read_int(expert + _SUMS)
        _block_product(call, read_int(expert + _MATRIX), block, tokens, inputs, sums, output)
        if activation != _NONE:
            other = read_int(expert + _OTHER_OUTPUT)
            _block_product(call, read_int(expert + _OTHER), block, tokens, inputs, sums, other)
            _gate_block(call, block, tokens, output, other, read_int(expert + _OUTPUT_SUMS))
        task = claim(call + _NEXT)


@_on_threads
def _expansions(data):  # type: ignore[no-untyped-def]
    """Claim row blocks of one matrix to expand until there are none left; runs on every thread."""
    call = address_of(data)
    only = call + 8 * _CALL_FIELDS
    bits, columns, shift = read_int(call + _BITS), read_int(call + _COLUMN_BLOCKS), read_int(call + _GROUP_SHIFT)
    matrix, stride = read_int(only + _MATRIX), read_int(call + _OUTPUT_STRIDE)
    groups = columns >> shift
    tasks = read_int(call + _TASKS)
    task = claim(call + _NEXT)
    while task < tasks:
        block = task + read_int(call + _BLOCKS)
        values = matrix + block * columns * (COLUMN_BLOCK * ROW_BLOCK // 8) * bits
        scales = matrix + read_int(call + _SCALES) + block * ROW_BLOCK * (4 if bits == 8 else groups * 2)
        out = read_int(only + _OUTPUT) + 4 * task * ROW_BLOCK
        if bits == 8:
            _expand_8((values, scales, columns, out, stride))
        else:
            zeros = matrix + read_int(call + _ZEROS) + block * groups * (ROW_BLOCK // 2)
            _expand_4((values, scales, zeros, columns, shift, out, stride))
        task = claim(call + _NEXT)


class Inputs(NamedTuple):
    """Inputs of the experts of a call, one expert's tokens after the other's.

    ``rows`` float32 (tokens, padded columns), padding zero; ``sums`` float32 (tokens, column blocks), the sum of each block,
    which only 4 bits need; ``counts`` tokens of each expert.
    """

    rows: torch.Tensor
    sums: torch.Tensor
    counts: list[int]

    def split(self, outputs: torch.Tensor) -> list[torch.Tensor]:
        """Rows of ``outputs`` by expert."""
        return list(outputs.split(self.counts))


def as_inputs(tokens: Sequence[torch.Tensor], layout: MatrixLayout) -> Inputs:
    """Gathered tokens of several experts, each (N, columns) of any floating type, as the kernels want them."""
    counts = [len(part) for part in tokens]
    together = torch.cat(list(tokens)) if len(tokens) > 1 else tokens[0]
    rows = torch.nn.functional.pad(together.float(), (0, layout.padded_columns - layout.columns)).contiguous()
    sums = rows.view(len(rows), -1, COLUMN_BLOCK).sum(-1) if layout.bits == 4 else rows[:, :0]
    return Inputs(rows, sums, counts)


def product(layout: MatrixLayout, matrices: Sequence[int], given: Inputs) -> torch.Tensor:
    """Each expert's tokens times its matrix: float32 (tokens, rows).

    ``matrices`` are addresses of memory in ``layout``, at multiples of 64, one an expert.
    """
    out = torch.empty(len(given.rows), layout.padded_rows)
    call = _call(layout, len(matrices), given)
    experts = _experts(call, matrices, given)
    experts[:, _OUTPUT // 8] = out.data_ptr() + 4 * out.stride(0) * _first(given)
    call[_OUTPUT_STRIDE // 8] = out.stride(0)
    run_on_all(_products.address, call.ctypes.data)
    return out[:, : layout.rows]


def gated_product(
    layout: MatrixLayout,
    gates: Sequence[int],
    ups: Sequence[int],
    given: Inputs,
    activation: str,
    following: MatrixLayout,
) -> Inputs:
    """``activation(gate @ x) * (up @ x)`` of each expert's tokens, as inputs of a matrix in the layout ``following``."""
    tokens = len(given.rows)
    rows = torch.zeros(tokens, following.padded_columns)
    sums = torch.zeros(tokens, following.padded_columns // COLUMN_BLOCK)
    other = torch.empty_like(rows)
    call = _call(layout, len(gates), given)
    experts = _experts(call, gates, given)
    first = _first(given)
    experts[:, _OTHER // 8] = ups
    experts[:, _OUTPUT // 8] = rows.data_ptr() + 4 * rows.stride(0) * first
    experts[:, _OTHER_OUTPUT // 8] = other.data_ptr() + 4 * rows.stride(0) * first
    experts[:, _OUTPUT_SUMS // 8] = sums.data_ptr() + 4 * sums.stride(0) * first
    call[_OUTPUT_STRIDE // 8], call[_OUTPUT_SUMS_STRIDE // 8] = rows.stride(0), sums.stride(0)
    call[_ACTIVATION // 8] = ACTIVATIONS[activation]
    run_on_all(_products.address, call.ctypes.data)
    return Inputs(rows, sums, given.counts)


def expanded_product(layout: MatrixLayout, matrix: int, x_NC: torch.Tensor) -> torch.Tensor:
    """Many tokens, float32 (N, columns), times one matrix: float32 (N, rows), by torch's product on expanded rows.

    The same weights as :func:`product` and float32 sums, in another order.
    """
    padded = torch.nn.functional.pad(x_NC, (0, layout.padded_columns - layout.columns))
    out = torch.empty(len(x_NC), layout.padded_rows)
    at_once = max(1, EXPAND_BYTES // (4 * ROW_BLOCK * layout.padded_columns))
    for first in range(0, layout.row_blocks, at_once):
        blocks = min(at_once, layout.row_blocks - first)
        rows = slice(first * ROW_BLOCK, (first + blocks) * ROW_BLOCK)
        torch.mm(padded, expanded(layout, matrix, first, blocks), out=out[:, rows])
    return out[:, : layout.rows]


def expanded(layout: MatrixLayout, matrix: int, first_block: int, blocks: int) -> torch.Tensor:
    """Weights of some row blocks of a matrix: float32 (padded columns, 32 * blocks), that is, transposed."""
    out = torch.empty(layout.padded_columns, blocks * ROW_BLOCK)
    call = _call(layout, 1, None)
    call[_TASKS // 8], call[_BLOCKS // 8], call[_OUTPUT_STRIDE // 8] = blocks, first_block, out.stride(0)
    experts = call[_CALL_FIELDS:]
    experts[_MATRIX // 8], experts[_OUTPUT // 8] = matrix, out.data_ptr()
    run_on_all(_expansions.address, call.ctypes.data)
    return out


def _call(layout: MatrixLayout, experts: int, given: Inputs | None) -> np.ndarray:
    call = np.zeros(_CALL_FIELDS + experts * _EXPERT_FIELDS, np.int64)
    column_blocks = layout.padded_columns // COLUMN_BLOCK
    shift = (layout.group // COLUMN_BLOCK).bit_length() - 1
    fields = {
        _TASKS: experts * layout.row_blocks,
        _BLOCKS: layout.row_blocks,
        _BITS: layout.bits,
        _COLUMN_BLOCKS: column_blocks,
        _GROUP_SHIFT: shift,
        _SCALES: layout.scales_offset,
        _ZEROS: layout.zeros_offset,
    }
    if given is not None:
        fields |= {_INPUT_STRIDE: given.rows.stride(0), _SUMS_STRIDE: given.sums.stride(0)}
    for field, value in fields.items():
        call[field // 8] = value
    return call


def _experts(call: np.ndarray, matrices: Sequence[int], given: Inputs) -> np.ndarray:
    experts = call[_CALL_FIELDS:].reshape(-1, _EXPERT_FIELDS)
    first = _first(given)
    experts[:, _MATRIX // 8] = matrices
    experts[:, _TOKENS // 8] = given.counts
    experts[:, _INPUT // 8] = given.rows.data_ptr() + 4 * given.rows.stride(0) * first
    experts[:, _SUMS // 8] = given.sums.data_ptr() + 4 * given.sums.stride(0) * first
    return experts


def _first(given: Inputs) -> np.ndarray:
    """Row at which the tokens of each expert begin."""
    return np.cumsum([0, *given.counts[:-1]])
