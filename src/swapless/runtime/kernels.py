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
from typing import Any, NamedTuple

import numpy as np
import torch

from swapless.compiled import CFunction, kernel
from swapless.runtime.kernels_call import (
    ACTIVATION,
    BITS,
    BLOCKS,
    COLUMN_BLOCKS,
    DOWN,
    EXPERTS,
    FLOATS,
    GATE,
    GROUP_SHIFT,
    INNER,
    INNER_COUNT,
    INPUT,
    INTO,
    INTO_TASKS,
    LINE,
    NEXT,
    OUT,
    OUT_TASKS,
    OUTPUT,
    OUTPUT_STRIDE,
    ROUNDED,
    ROUNDED_COUNT,
    SCALES,
    TILES,
    TOKENS,
    TOKENS_IN_ALL,
    UP,
    ZEROS,
    experts_of,
    new_call,
    rounded_bytes,
)
from swapless.runtime.kernels_code import address_of, claim, pause, read_int, read_shared, stack_of
from swapless.runtime.kernels_threads import run_on_all
from swapless.runtime.kernels_tiles import TILE_TOKENS, configure_tiles, restore_tiles, tile_product, tiles_allowed
from swapless.runtime.kernels_vector import GELU_TANH, ROUNDED_BLOCK_BYTES, SILU, block_product, gating, rounding
from swapless.store.matrix import COLUMN_BLOCK, ROW_BLOCK, MatrixLayout

ACTIVATIONS = {"silu": SILU, "gelu_tanh": GELU_TANH}
"""What a call can apply as ``activation(gate) * up``."""

_AT_ONCE = 4
"""Tokens that share one walk over the weights: as many as the sums of fit in registers."""

_product_8_one, _product_8_many = block_product(8, 1), block_product(8, _AT_ONCE)
_product_4_one, _product_4_many = block_product(4, 1), block_product(4, _AT_ONCE)
_product_8_tiles, _product_4_tiles = tile_product(8), tile_product(4)
_round, _gate = rounding(), gating()
_scratch = stack_of(2 * TILE_TOKENS * ROW_BLOCK)

_inlined: Any = kernel(error_model="numpy", boundscheck=False)


@_inlined
def _block_product(how, matrix, block, tokens, rows, output, stride):  # type: ignore[no-untyped-def]
    """One block of rows of a matrix times one, ``_AT_ONCE`` or ``TILE_TOKENS`` rounded rows."""
    bits, columns, shift = read_int(how + BITS), read_int(how + COLUMN_BLOCKS), read_int(how + GROUP_SHIFT)
    groups = columns >> shift
    values = matrix + block * columns * (COLUMN_BLOCK * ROW_BLOCK // 8) * bits
    scales = matrix + read_int(how + SCALES) + block * ROW_BLOCK * (4 if bits == 8 else groups * 2)
    zeros = matrix + read_int(how + ZEROS) + block * groups * (ROW_BLOCK // 2)
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
    if tokens >= TILE_TOKENS and read_int(call + TILES):
        return TILE_TOKENS
    return _AT_ONCE if tokens >= _AT_ONCE else 1


@_inlined
def _gate_and_up(call, expert, block):  # type: ignore[no-untyped-def]
    """A block of gate and up for all tokens of an expert, into the inputs of its down."""
    how, activation, tokens = call + INTO, read_int(call + ACTIVATION), read_int(expert + TOKENS)
    row_bytes = read_int(how + COLUMN_BLOCKS) * ROUNDED_BLOCK_BYTES
    inner_blocks = read_int(call + OUT + COLUMN_BLOCKS)
    rows, inner = read_int(expert + INPUT), read_int(expert + INNER)
    gate = _scratch()
    up = gate + 4 * TILE_TOKENS * ROW_BLOCK
    many = _portion(call, tokens)
    token = 0
    while token < tokens:
        token = min(token, tokens - many)  # the last portion may do some again, to the same bits
        _block_product(how, read_int(expert + GATE), block, many, rows + token * row_bytes, gate, ROW_BLOCK)
        _block_product(how, read_int(expert + UP), block, many, rows + token * row_bytes, up, ROW_BLOCK)
        for i in range(many):
            at = 4 * i * ROW_BLOCK
            row = inner + (token + i) * inner_blocks * ROUNDED_BLOCK_BYTES
            _gate((gate + at, up + at, activation, row, inner_blocks, block))
        token += many


@_inlined
def _down(call, expert, block):  # type: ignore[no-untyped-def]
    """A block of down for all tokens of an expert."""
    how, tokens, stride = call + OUT, read_int(expert + TOKENS), read_int(call + OUTPUT_STRIDE)
    row_bytes = read_int(how + COLUMN_BLOCKS) * ROUNDED_BLOCK_BYTES
    rows, output = read_int(expert + INNER), read_int(expert + OUTPUT) + 4 * block * ROW_BLOCK
    many = _portion(call, tokens)
    token = 0
    while token < tokens:
        token = min(token, tokens - many)
        at = rows + token * row_bytes
        _block_product(how, read_int(expert + DOWN), block, many, at, output + 4 * token * stride, stride)
        token += many


@_inlined
def _all_tasks(call):  # type: ignore[no-untyped-def]
    """Claim tasks of a call until there are none left."""
    into_blocks, out_blocks = read_int(call + INTO + BLOCKS), read_int(call + OUT + BLOCKS)
    tokens, into_tasks, out_tasks = read_int(call + TOKENS_IN_ALL), read_int(call + INTO_TASKS), read_int(call + OUT_TASKS)
    first = INTO if into_tasks else OUT
    blocks = read_int(call + first + COLUMN_BLOCKS)
    floats, rounded = read_int(call + FLOATS), read_int(call + ROUNDED)
    while True:
        task = claim(call + NEXT)
        if task < tokens:
            _round((floats + task * blocks * COLUMN_BLOCK * 4, rounded + task * blocks * ROUNDED_BLOCK_BYTES, blocks))
            claim(call + ROUNDED_COUNT)
            continue
        task -= tokens
        while read_shared(call + ROUNDED_COUNT) < tokens:
            pause()
        if task < into_tasks:
            expert = call + EXPERTS + task // into_blocks * LINE
            _gate_and_up(call, expert, task % into_blocks)
            claim(expert + INNER_COUNT)
            continue
        task -= into_tasks
        if task >= out_tasks:
            return
        expert = call + EXPERTS + task // out_blocks * LINE
        if into_tasks:
            while read_shared(expert + INNER_COUNT) < into_blocks:
                pause()
        _down(call, expert, task % out_blocks)


def _work(data):  # type: ignore[no-untyped-def]
    """Work on a call; runs on every thread."""
    call = address_of(data)
    if read_int(call + TILES):
        before = configure_tiles()
        _all_tasks(call)
        restore_tiles(before)
    else:
        _all_tasks(call)


_tasks = CFunction(_work, error_model="numpy", boundscheck=False)


def ready() -> None:
    """Compile what calls run through, or read it from the cache: the first token must not pay for it."""
    _ = _tasks.address


def perform(call_address: int) -> None:
    """Work on a call, int64 at ``call_address``, on all of torch's threads."""
    run_on_all(_tasks.address, call_address)


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


def as_rows(tokens: torch.Tensor, layout: MatrixLayout) -> torch.Tensor:
    """Tokens (N, columns) of any floating type as float32 (N, padded columns), padding zero."""
    rows = tokens.float()
    if layout.padded_columns > layout.columns:
        rows = torch.nn.functional.pad(rows, (0, layout.padded_columns - layout.columns))
    return rows.contiguous()


def as_inputs(tokens: Sequence[torch.Tensor], layout: MatrixLayout) -> Inputs:
    """Gathered tokens of several experts, each (N, columns) of any floating type, as the kernels want them."""
    shared = all(part is tokens[0] for part in tokens)
    together = tokens[0] if shared else torch.cat(list(tokens))
    return Inputs(as_rows(together, layout), [len(part) for part in tokens], shared)


def product(layout: MatrixLayout, matrices: Sequence[int], given: Inputs) -> torch.Tensor:
    """Each expert's tokens times its matrix: float32 (tokens, rows).

    ``matrices`` are addresses of memory in ``layout``, at multiples of 64, one an expert.
    """
    call = new_call(layout, None, 0, len(matrices))
    experts = experts_of(call)
    experts[:, DOWN // 8] = matrices
    return _run(call, given, layout, layout, INNER)


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
    call = new_call(out, into, ACTIVATIONS[activation], len(gates))
    experts = experts_of(call)
    experts[:, GATE // 8], experts[:, UP // 8], experts[:, DOWN // 8] = gates, ups, downs
    row_bytes = rounded_bytes(out)
    inner = torch.zeros(
        sum(given.counts), row_bytes, dtype=torch.uint8, device="cpu"
    )  # of a padded block, nothing else is written
    experts[:, INNER // 8] = inner.data_ptr() + row_bytes * _first_rows(given.counts)
    return _run(call, given, into, out, INPUT)


def _run(call: np.ndarray, given: Inputs, first: MatrixLayout, last: MatrixLayout, field: int) -> torch.Tensor:
    """Do a call whose experts find their rounded inputs by ``field``, and return its outputs."""
    row_bytes, tokens, counts = rounded_bytes(first), len(given.rows), given.counts
    rounded = torch.empty(tokens, row_bytes, dtype=torch.uint8, device="cpu")
    output = torch.empty(sum(counts), last.padded_rows, dtype=torch.float32, device="cpu")
    starts = _first_rows(counts)
    experts = experts_of(call)
    experts[:, TOKENS // 8] = counts
    experts[:, field // 8] = rounded.data_ptr() + (0 if given.shared else row_bytes * starts)
    experts[:, OUTPUT // 8] = output.data_ptr() + 4 * last.padded_rows * starts
    call[TOKENS_IN_ALL // 8] = tokens
    call[TILES // 8] = max(counts) >= TILE_TOKENS and tiles_allowed()
    call[FLOATS // 8], call[ROUNDED // 8] = given.rows.data_ptr(), rounded.data_ptr()
    perform(call.ctypes.data)
    return output[:, : last.rows]


def _first_rows(counts: list[int]) -> np.ndarray:
    """Row at which the tokens of each expert begin."""
    return np.cumsum([0, *counts[:-1]])
