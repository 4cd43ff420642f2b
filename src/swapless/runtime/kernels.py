"""Quantised matrices computed: all experts of a call in one, with no interpreter between gate, up, activation and down.

A call is a row of tasks in three stages, which threads claim in order from a counter: round a token's inputs to bytes; make a
block of 32 rows of gate and up of an expert, apply the activation and round the result; make a block of 32 rows of down. Before
a task of a later stage a thread waits for what it needs, which threads that claimed earlier are at work on. Where the gate
is not the common one (a bias, clamping, no gate at all), the caller does that part and asks for plain products instead.

Inputs are rounded to 8 bits in blocks of 32 columns; their products with the weights are summed exactly within a block and in
float32 beyond. A token's result depends on nothing but its own input: neither on the other tokens and
experts of the call, nor on the number of threads, nor on which of its instructions the processor has for products of bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import cfunc, njit, types

from swapless.cache.compiled import drop_stale
from swapless.runtime.kernels_code import address_of, claim, pause, read_int, read_shared, stack_of
from swapless.runtime.kernels_threads import run_on_all
from swapless.runtime.kernels_tiles import TILE_TOKENS, configure_tiles, restore_tiles, tile_product, tiles_allowed
from swapless.runtime.kernels_vector import GELU_TANH, ROUNDED_BLOCK_BYTES, SILU, block_product, gating, rounding
from swapless.store.matrix import COLUMN_BLOCK, ROW_BLOCK, MatrixLayout

ACTIVATIONS = {"silu": SILU, "gelu_tanh": GELU_TANH}
"""What a call can apply as ``activation(gate) * up``."""

drop_stale(Path(__file__).resolve().parent)

_AT_ONCE = 4
"""Tokens that share one walk over the weights: as many as the sums of fit in registers."""

_product_8_one, _product_8_many = block_product(8, 1), block_product(8, _AT_ONCE)
_product_4_one, _product_4_many = block_product(4, 1), block_product(4, _AT_ONCE)
_product_8_tiles, _product_4_tiles = tile_product(8), tile_product(4)
_round, _gate = rounding(), gating()
_scratch = stack_of(2 * TILE_TOKENS * ROW_BLOCK)

_inlined: Any = njit(cache=True, nogil=True, error_model="numpy", boundscheck=False)
_cfunc: Any = cfunc
_on_threads: Any = _cfunc(types.void(types.voidptr), cache=True, nopython=True, error_model="numpy", boundscheck=False)

# A call is a row of int64, by byte: counters that threads write in lines of the cache of their own, what is the same for all
# experts (among it two descriptions of matrices), and a line for each expert.
_LINE = 64
_NEXT, _ROUNDED_COUNT, _FIELDS = 0, _LINE, 2 * _LINE
_TOKENS_IN_ALL, _INTO_TASKS, _OUT_TASKS, _FLOATS, _ROUNDED, _ACTIVATION, _OUTPUT_STRIDE, _TILES = (
    _FIELDS + 8 * i for i in range(8)
)
_INTO, _OUT = 3 * _LINE, 4 * _LINE
_EXPERTS = 5 * _LINE
_BITS, _COLUMN_BLOCKS, _GROUP_SHIFT, _SCALES, _ZEROS, _BLOCKS = (8 * i for i in range(6))
_GATE, _UP, _DOWN, _TOKENS, _INPUT, _INNER, _OUTPUT, _INNER_COUNT = (8 * i for i in range(8))


@_inlined
def _block_product(how, matrix, block, tokens, rows, output, stride):  # type: ignore[no-untyped-def]
    """One block of rows of a matrix times one, ``_AT_ONCE`` or ``TILE_TOKENS`` rounded rows."""
    bits, columns, shift = read_int(how + _BITS), read_int(how + _COLUMN_BLOCKS), read_int(how + _GROUP_SHIFT)
    groups = columns >> shift
    values = matrix + block * columns * (COLUMN_BLOCK * ROW_BLOCK // 8) * bits
    scales = matrix + read_int(how + _SCALES) + block * ROW_BLOCK * (4 if bits == 8 else groups * 2)
    zeros = matrix + read_int(how + _ZEROS) + block * groups * (ROW_BLOCK // 2)
    given = (values, scales, zeros, rows, columns * ROUNDED_BLOCK_BYTES, columns, shift, output, stride)
    if bits == 8:
        if tokens == 1:
            _product_8_one(given)
        elif tokens == TILE_TOKENS:
            _product_8_tiles(given)
        else:
            _product_8_many(given)
    elif tokens == 1:
        _product_4_one(given)
    elif tokens == TILE_TOKENS:
        _product_4_tiles(given)
    else:
        _product_4_many(given)


@_inlined
def _portion(call, tokens):  # type: ignore[no-untyped-def]
    """How many of an expert's tokens go through a kernel together."""
    if tokens >= TILE_TOKENS and read_int(call + _TILES):
        return TILE_TOKENS
    return _AT_ONCE if tokens >= _AT_ONCE else 1


@_inlined
def _gate_and_up(call, expert, block):  # type: ignore[no-untyped-def]
    """A block of gate and up for all tokens of an expert, into the inputs of its down."""
    how, activation, tokens = call + _INTO, read_int(call + _ACTIVATION), read_int(expert + _TOKENS)
    row_bytes = read_int(how + _COLUMN_BLOCKS) * ROUNDED_BLOCK_BYTES
    inner_blocks = read_int(call + _OUT + _COLUMN_BLOCKS)
    rows, inner = read_int(expert + _INPUT), read_int(expert + _INNER)
    gate = _scratch()
    up = gate + 4 * TILE_TOKENS * ROW_BLOCK
    many = _portion(call, tokens)
    token = 0
    while token < tokens:
        token = min(token, tokens - many)  # the last portion may do some again, to the same bits
        _block_product(how, read_int(expert + _GATE), block, many, rows + token * row_bytes, gate, ROW_BLOCK)
        _block_product(how, read_int(expert + _UP), block, many, rows + token * row_bytes, up, ROW_BLOCK)
        for i in range(many):
            at = 4 * i * ROW_BLOCK
            row = inner + (token + i) * inner_blocks * ROUNDED_BLOCK_BYTES
            _gate((gate + at, up + at, activation, row, inner_blocks, block))
        token += many


@_inlined
def _down(call, expert, block):  # type: ignore[no-untyped-def]
    """A block of down for all tokens of an expert."""
    how, tokens, stride = call + _OUT, read_int(expert + _TOKENS), read_int(call + _OUTPUT_STRIDE)
    row_bytes = read_int(how + _COLUMN_BLOCKS) * ROUNDED_BLOCK_BYTES
    rows, output = read_int(expert + _INNER), read_int(expert + _OUTPUT) + 4 * block * ROW_BLOCK
    many = _portion(call, tokens)
    token = 0
    while token < tokens:
        token = min(token, tokens - many)
        at = rows + token * row_bytes
        _block_product(how, read_int(expert + _DOWN), block, many, at, output + 4 * token * stride, stride)
        token += many


@_inlined
def _all_tasks(call):  # type: ignore[no-untyped-def]
    """Claim tasks of a call until there are none left."""
    into_blocks, out_blocks = read_int(call + _INTO + _BLOCKS), read_int(call + _OUT + _BLOCKS)
    tokens, into_tasks, out_tasks = read_int(call + _TOKENS_IN_ALL), read_int(call + _INTO_TASKS), read_int(call + _OUT_TASKS)
    first = _INTO if into_tasks else _OUT
    blocks = read_int(call + first + _COLUMN_BLOCKS)
    floats, rounded = read_int(call + _FLOATS), read_int(call + _ROUNDED)
    while True:
        task = claim(call + _NEXT)
        if task < tokens:
            _round((floats + task * blocks * COLUMN_BLOCK * 4, rounded + task * blocks * ROUNDED_BLOCK_BYTES, blocks))
            claim(call + _ROUNDED_COUNT)
            continue
        task -= tokens
        while read_shared(call + _ROUNDED_COUNT) < tokens:
            pause()
        if task < into_tasks:
            expert = call + _EXPERTS + task // into_blocks * _LINE
            _gate_and_up(call, expert, task % into_blocks)
            claim(expert + _INNER_COUNT)
            continue
        task -= into_tasks
        if task >= out_tasks:
            return
        expert = call + _EXPERTS + task // out_blocks * _LINE
        if into_tasks:
            while read_shared(expert + _INNER_COUNT) < into_blocks:
                pause()
        _down(call, expert, task % out_blocks)


@_on_threads
def _tasks(data):  # type: ignore[no-untyped-def]
    """Work on a call; runs on every thread."""
    call = address_of(data)
    if read_int(call + _TILES):
        before = configure_tiles()
        _all_tasks(call)
        restore_tiles(before)
    else:
        _all_tasks(call)


class Inputs(NamedTuple):
    """Inputs of the experts of a call: ``rows`` float32 (tokens, padded columns), padding zero, and which are whose.

    ``counts`` tokens of each expert; ``shared`` says that all experts have the same tokens, which ``rows`` holds once.
    """

    rows: torch.Tensor
    counts: list[int]
    shared: bool

    def split(self, outputs: torch.Tensor) -> list[torch.Tensor]:
        """Rows of ``outputs`` by expert."""
        return list(outputs.split(self.counts))


def _as_rows(tokens: torch.Tensor, layout: MatrixLayout) -> torch.Tensor:
    rows = tokens.float()
    if layout.padded_columns > layout.columns:
        rows = torch.nn.functional.pad(rows, (0, layout.padded_columns - layout.columns))
    return rows.contiguous()


def as_inputs(tokens: Sequence[torch.Tensor], layout: MatrixLayout) -> Inputs:
    """Gathered tokens of several experts, each (N, columns) of any floating type, as the kernels want them."""
    shared = all(part is tokens[0] for part in tokens)
    together = tokens[0] if shared else torch.cat(list(tokens))
    return Inputs(_as_rows(together, layout), [len(part) for part in tokens], shared)


def product(layout: MatrixLayout, matrices: Sequence[int], given: Inputs) -> torch.Tensor:
    """Each expert's tokens times its matrix: float32 (tokens, rows).

    ``matrices`` are addresses of memory in ``layout``, at multiples of 64, one an expert.
    """
    call = _call(layout, None, 0, len(matrices))
    experts = _experts(call)
    experts[:, _DOWN // 8] = matrices
    return _run(call, given, layout, layout, _INNER)


class RowProduct:
    """A matrix in ``layout`` times one token, all prepared that is the same every time: a small product takes half as long."""

    def __init__(self, layout: MatrixLayout) -> None:
        self._layout = layout
        self._row_bytes, self._padded_rows = _row_bytes(layout), layout.padded_rows
        self._call = _call(layout, None, 0, 1)
        self._call[_TOKENS_IN_ALL // 8] = 1
        self._call[(_EXPERTS + _TOKENS) // 8] = 1

    def __call__(self, matrix: int, token: torch.Tensor) -> torch.Tensor:
        """``token`` (1, columns) of any floating type to float32 (1, rows), as :func:`product` has it.

        ``matrix`` is the address of its memory, at a multiple of 64.
        """
        rows = _as_rows(token, self._layout)
        rounded = torch.empty(self._row_bytes, dtype=torch.uint8)
        output = torch.empty(1, self._padded_rows)
        call = self._call.copy()
        call[(_EXPERTS + _DOWN) // 8] = matrix
        call[_FLOATS // 8] = rows.data_ptr()
        call[_ROUNDED // 8] = call[(_EXPERTS + _INNER) // 8] = rounded.data_ptr()
        call[(_EXPERTS + _OUTPUT) // 8] = output.data_ptr()
        run_on_all(_tasks.address, call.ctypes.data)
        return output[:, : self._layout.rows]


def gated_product(
    into: MatrixLayout,
    gates: Sequence[int],
    ups: Sequence[int],
    out: MatrixLayout,
    downs: Sequence[int],
    given: Inputs,
    activation: str,
) -> torch.Tensor:
    """``down @ (activation(gate @ x) * (up @ x))`` of each expert's tokens: float32 (tokens, rows of ``out``).

    ``gates`` and ``ups`` are addresses of memory in the layout ``into``, ``downs`` in ``out``, all at multiples of 64.
    """
    call = _call(out, into, ACTIVATIONS[activation], len(gates))
    experts = _experts(call)
    experts[:, _GATE // 8], experts[:, _UP // 8], experts[:, _DOWN // 8] = gates, ups, downs
    row_bytes = _row_bytes(out)
    inner = torch.zeros(sum(given.counts), row_bytes, dtype=torch.uint8)  # of a padded block, nothing else is written
    experts[:, _INNER // 8] = inner.data_ptr() + row_bytes * _first(given.counts)
    return _run(call, given, into, out, _INPUT)


def _run(call: np.ndarray, given: Inputs, first: MatrixLayout, last: MatrixLayout, field: int) -> torch.Tensor:
    """Do a call whose experts find their rounded inputs by ``field``, and return its outputs."""
    row_bytes, tokens, counts = _row_bytes(first), len(given.rows), given.counts
    rounded = torch.empty(tokens, row_bytes, dtype=torch.uint8)
    output = torch.empty(sum(counts), last.padded_rows)
    starts = _first(counts)
    experts = _experts(call)
    experts[:, _TOKENS // 8] = counts
    experts[:, field // 8] = rounded.data_ptr() + (0 if given.shared else row_bytes * starts)
    experts[:, _OUTPUT // 8] = output.data_ptr() + 4 * last.padded_rows * starts
    call[_TOKENS_IN_ALL // 8] = tokens
    call[_TILES // 8] = max(counts) >= TILE_TOKENS and tiles_allowed()
    call[_FLOATS // 8], call[_ROUNDED // 8] = given.rows.data_ptr(), rounded.data_ptr()
    run_on_all(_tasks.address, call.ctypes.data)
    return output[:, : last.rows]


def _row_bytes(layout: MatrixLayout) -> int:
    return layout.padded_columns // COLUMN_BLOCK * ROUNDED_BLOCK_BYTES


def _first(counts: list[int]) -> np.ndarray:
    """Row at which the tokens of each expert begin."""
    return np.cumsum([0, *counts[:-1]])


def _experts(call: np.ndarray) -> np.ndarray:
    return call[_EXPERTS // 8 :].reshape(-1, _LINE // 8)


def _call(out: MatrixLayout, into: MatrixLayout | None, activation: int, experts: int) -> np.ndarray:
    return _template(out, into, activation, experts).copy()


@lru_cache(maxsize=256)
def _template(out: MatrixLayout, into: MatrixLayout | None, activation: int, experts: int) -> np.ndarray:
    """A call with all that does not depend on its addresses and tokens."""
    call = np.zeros((_EXPERTS + experts * _LINE) // 8, np.int64)
    for at, layout in ((_INTO, into), (_OUT, out)):
        if layout is not None:
            call[at // 8 : at // 8 + 6] = (
                layout.bits,
                layout.padded_columns // COLUMN_BLOCK,
                (layout.group // COLUMN_BLOCK).bit_length() - 1,
                layout.scales_offset,
                layout.zeros_offset,
                layout.row_blocks,
            )
    call[_ACTIVATION // 8], call[_OUTPUT_STRIDE // 8] = activation, out.padded_rows
    call[_INTO_TASKS // 8] = 0 if into is None else experts * into.row_blocks
    call[_OUT_TASKS // 8] = experts * out.row_blocks
    return call
