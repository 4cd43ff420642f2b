"""The kernels against their slow twins: dense products in float64 of weights and inputs rounded by plain array operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numba import njit
from numba.core.registry import cpu_target

from swapless.runtime.kernels import as_inputs, gated_product, product
from swapless.runtime.kernels_code import BYTE_PRODUCTS, byte_product_of
from swapless.runtime.kernels_row import GatedRowProduct, RowProduct
from swapless.runtime.kernels_threads import openmp, run_on_all
from swapless.runtime.kernels_vector import ROUNDED_BLOCK_BYTES, block_product, rounding
from swapless.store.matrix import MatrixLayout
from swapless.store.quantize import dequantize, quantize
from swapless.store.read import aligned_buffer
from tests.rounded import rounded_inputs

PRECISIONS = [(8, 32), (4, 32), (4, 64), (4, 128)]
SHAPES = [(1, 1), (70, 50), (96, 300)]
BOUND = 2e-6
"""Of a product in float32, relative to the sum of the magnitudes of its terms."""


class Matrix(NamedTuple):
    """A quantised matrix, and the weights that it stands for."""

    layout: MatrixLayout
    memory: np.ndarray
    weights: np.ndarray

    @property
    def address(self) -> int:
        return self.memory.ctypes.data


def matrix(rows: int, columns: int, bits: int, group: int = 32, seed: int = 0) -> Matrix:
    layout = MatrixLayout(rows=rows, columns=columns, bits=bits, group=group)
    memory = aligned_buffer(layout.nbytes)[: layout.nbytes]
    quantize(np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32), layout, memory)
    return Matrix(layout, memory, dequantize(memory, layout))


def host_features() -> str:
    return cpu_target.target_context.codegen().magic_tuple()[2]


def tokens(count: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(seed))


def assert_product(got: torch.Tensor, x: torch.Tensor, weights: np.ndarray) -> None:
    dense, inputs = torch.from_numpy(weights).double(), rounded_inputs(x)
    expected = inputs @ dense.T
    scale = inputs.abs() @ dense.abs().T
    assert got.shape == expected.shape
    assert ((got - expected).abs() <= BOUND * scale + 1e-30).all()


@pytest.mark.few(4)
@pytest.mark.parametrize(("bits", "group"), PRECISIONS)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_one_prepared_row_is_the_same_bit_for_bit(bits: int, group: int, rows: int, columns: int) -> None:
    prepared = RowProduct(matrix(rows, columns, bits, group).layout)
    for seed in range(2):
        given, x = matrix(rows, columns, bits, group, seed), tokens(1, columns, seed).to(torch.bfloat16)
        expected = product(given.layout, [given.address], as_inputs([x], given.layout))
        assert torch.equal(prepared(given.address, x), expected)


@pytest.mark.parametrize(("bits", "group"), PRECISIONS)
@pytest.mark.parametrize("inner", [100, 128])
def test_prepared_experts_are_the_same_bit_for_bit(bits: int, group: int, inner: int) -> None:
    prepared = GatedRowProduct(matrix(inner, 80, bits, group).layout, matrix(60, inner, bits, group).layout, "silu")
    for count in (1, 3, 2, 3):  # a number of experts seen before finds what the last call left behind
        gates, ups = ([matrix(inner, 80, bits, group, s + count + i) for i in range(count)] for s in (0, 10))
        downs, x = [matrix(60, inner, bits, group, 20 + count + i) for i in range(count)], tokens(1, 80, count).bfloat16()
        addresses = [[m.address for m in part] for part in (gates, ups, downs)]
        given = as_inputs([x] * count, gates[0].layout)
        expected = gated_product(gates[0].layout, *addresses[:2], downs[0].layout, addresses[2], given, "silu")
        assert torch.equal(prepared(*map(np.array, addresses), x), expected)


@pytest.mark.parametrize("bits,group", PRECISIONS)
@pytest.mark.parametrize("rows,columns", SHAPES)
@pytest.mark.parametrize("count", [1, 3, 4, 9, 16, 21])
def test_product(rows: int, columns: int, bits: int, group: int, count: int) -> None:
    m = matrix(rows, columns, bits, group)
    x = tokens(count, columns)
    assert_product(product(m.layout, [m.address], as_inputs([x], m.layout)), x, m.weights)


@pytest.mark.parametrize("bits,group", PRECISIONS)
def test_several_experts_at_once(bits: int, group: int) -> None:
    matrices = [matrix(70, 50, bits, group, seed) for seed in range(4)]
    given = [tokens(count, 50, seed=count) for count in (1, 5, 0, 2)]
    inputs = as_inputs(given, matrices[0].layout)
    out = inputs.split(product(matrices[0].layout, [m.address for m in matrices], inputs))
    for m, x, y in zip(matrices, given, out, strict=True):
        assert_product(y, x, m.weights)


@pytest.mark.few(2)
@pytest.mark.parametrize("bits,group", PRECISIONS)
def test_rounding_inputs_costs_what_it_may(bits: int, group: int) -> None:
    m = matrix(96, 300, bits, group)
    x = tokens(4, 300)
    dense = torch.from_numpy(m.weights)
    peaks = torch.nn.functional.pad(x, (0, 20)).view(4, -1, 32).abs().amax(-1).repeat_interleave(32, dim=1)[:, :300]
    bound = (peaks / 254) @ dense.abs().T  # half a step of each input
    got = product(m.layout, [m.address], as_inputs([x], m.layout))
    assert ((got - x @ dense.T).abs() <= bound * 1.001).all()
    spread = ((peaks / 127).square() @ dense.square().T / 12).sqrt()  # as errors that know nothing of each other add up
    assert 0.8 < (got - x @ dense.T).square().mean().sqrt() / spread.square().mean().sqrt() < 1.2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_number_stays_none(value: float) -> None:
    m = matrix(70, 300, 8)
    x = tokens(2, 300)
    x[1, 200] = value
    got = product(m.layout, [m.address], as_inputs([x], m.layout))
    assert got[0].isfinite().all() and not got[1].isfinite().any()


@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-44])
def test_inputs_next_to_nothing(value: float) -> None:
    m = matrix(70, 64, 4)
    x = torch.full((1, 64), value)
    x[0, 32:] = 1.0
    assert_product(product(m.layout, [m.address], as_inputs([x], m.layout)), x, m.weights)


@pytest.mark.parametrize("bits", [8, 4])
def test_extremes_do_not_overflow(bits: int) -> None:
    layout = MatrixLayout(rows=32, columns=64, bits=bits, group=32)
    memory = aligned_buffer(layout.nbytes)[: layout.nbytes]
    values, scales, zeros = layout.planes(memory)
    values.view(np.uint8)[:] = 0x80 if bits == 8 else 0xFF
    scales[:] = 1.0 if bits == 8 else 0x3F80
    zeros[:] = 0
    x = torch.ones(5, 64)
    got = product(layout, [memory.ctypes.data], as_inputs([x], layout))
    assert (got - 64 * (-128 if bits == 8 else 15)).abs().max() < 1e-2


@pytest.mark.few(1)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("count", [1, 4])
def test_all_ways_of_multiplying_bytes_give_the_same_bits(bits: int, count: int) -> None:
    m = matrix(32, 96, bits)
    given = as_inputs([tokens(count, 96)], m.layout)
    expected = product(m.layout, [m.address], given)
    rounded = torch.empty(count, 3 * ROUNDED_BLOCK_BYTES, dtype=torch.uint8)
    row = rounded.stride(0)
    starts = np.array([(given.rows.data_ptr() + 4 * 96 * i, rounded.data_ptr() + row * i, 3) for i in range(count)])
    scales, zeros = m.address + m.layout.scales_offset, m.address + m.layout.zeros_offset
    for way in BYTE_PRODUCTS:
        if way == "generic" or f"+{way}" in host_features().split(","):
            out = torch.full((count, 32), torch.nan)
            compiled = one_block(bits, count, way)
            compiled((m.address, scales, zeros, rounded.data_ptr(), row, 3, 0, out.data_ptr(), 32), starts)
            assert torch.equal(out, expected), way


def one_block(bits: int, count: int, way: str) -> Callable[..., None]:
    """A function that rounds rows and multiplies them by a block in one way."""
    kernel, rounds = block_product(bits, count, way), rounding()

    @njit
    def run(product_arguments, rounding_arguments):  # type: ignore[no-untyped-def]
        for i in range(len(rounding_arguments)):
            rounds((rounding_arguments[i, 0], rounding_arguments[i, 1], rounding_arguments[i, 2]))
        kernel(product_arguments)

    return run  # type: ignore[no-any-return]


@pytest.mark.parametrize("bits", [8, 4])
def test_without_a_matrix_unit_the_bits_are_the_same(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, up, down = matrix(100, 300, bits, seed=1), matrix(100, 300, bits, seed=2), matrix(70, 100, bits, seed=3)
    given = as_inputs([tokens(37, 300)], gate.layout)

    def run() -> torch.Tensor:
        return gated_product(gate.layout, [gate.address], [up.address], down.layout, [down.address], given, "silu")

    expected = run()
    monkeypatch.setattr("swapless.runtime.kernels.tiles_allowed", lambda: False)
    assert torch.equal(run(), expected)


def test_the_best_way_of_multiplying_bytes_is_taken() -> None:
    assert byte_product_of("+avx2,-avx512vnni,+avxvnni") == "avxvnni"
    assert byte_product_of("+avx512vnni,+avx2") == "avx512vnni"
    assert byte_product_of("+avx2,+fma") == "avx2"
    assert byte_product_of("+neon,-avx2") == byte_product_of("") == "generic"


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("count", [7, 21])  # few, and so many that a matrix unit takes them where there is one
def test_a_token_depends_on_nothing_but_itself(bits: int, count: int) -> None:
    matrices = [matrix(70, 300, bits, seed=seed) for seed in range(2)]
    x = tokens(count, 300)
    how = matrices[0].layout
    alone = torch.cat([product(how, [matrices[1].address], as_inputs([row[None]], how)) for row in x])
    together = as_inputs([x[:2], x], how)
    assert torch.equal(together.split(product(how, [m.address for m in matrices], together))[1], alone)


@pytest.mark.parametrize("bits", [8, 4])
def test_threads_change_no_bit(bits: int) -> None:
    m = matrix(700, 300, bits)
    given = as_inputs([tokens(3, 300)], m.layout)
    one = product(m.layout, [m.address], given)
    torch.set_num_threads(3)
    try:
        for _ in range(20):
            assert torch.equal(product(m.layout, [m.address], given), one)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("bits,group", PRECISIONS)
@pytest.mark.parametrize("shared", [False, True])
def test_gated_product(bits: int, group: int, activation: str, shared: bool) -> None:
    gates, ups = [matrix(100, 80, bits, group, s) for s in (1, 2)], [matrix(100, 80, bits, group, s) for s in (3, 4)]
    downs = [matrix(60, 100, bits, group, s) for s in (5, 6)]
    given = [tokens(5, 80, 7)] * 2 if shared else [tokens(5, 80, 7), tokens(1, 80, 8)]
    inputs = as_inputs(given, gates[0].layout)
    assert inputs.shared == shared
    addresses = [[m.address for m in part] for part in (gates, ups, downs)]
    y = gated_product(gates[0].layout, *addresses[:2], downs[0].layout, addresses[2], inputs, activation)
    act = torch.nn.SiLU() if activation == "silu" else torch.nn.GELU(approximate="tanh")
    for i, (x, got) in enumerate(zip(given, inputs.split(y), strict=True)):
        gate, up, down = (torch.from_numpy(m[i].weights).double() for m in (gates, ups, downs))
        x_rounded = rounded_inputs(x)
        inner = (act(x_rounded @ gate.T) * (x_rounded @ up.T)).float()
        inner_rounded = rounded_inputs(inner)
        error = (got - inner_rounded @ down.T).abs()
        assert (error <= 2e-5 * (inner_rounded.abs() @ down.abs().T)).double().mean() > 0.9
        step = inner.abs().amax(dim=1, keepdim=True) / 127  # a value on the edge between two steps may fall on either side
        assert (error <= 1.1 * step * down.abs().max()).all()


def test_plain_threads_where_no_openmp_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    m = matrix(700, 300, 4)
    given = as_inputs([tokens(3, 300)], m.layout)
    expected = product(m.layout, [m.address], given)
    monkeypatch.setattr("swapless.runtime.kernels_threads.openmp", lambda: None)
    torch.set_num_threads(3)
    try:
        assert torch.equal(product(m.layout, [m.address], given), expected)
    finally:
        torch.set_num_threads(1)


def test_torchs_own_openmp_is_found_on_linux() -> None:
    if not torch.backends.openmp.is_available() or not run_on_all:
        pytest.skip("this torch computes without OpenMP")
    assert openmp() is not None
