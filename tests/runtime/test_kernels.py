"""The kernels against their slow twins: dense products in float64 over weights taken apart by plain array operations."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch

from swapless.runtime.kernels import as_inputs, expanded, expanded_product, gated_product, product
from swapless.runtime.kernels_threads import openmp, run_on_all
from swapless.store.matrix import MatrixLayout
from swapless.store.quantize import dequantize, quantize
from swapless.store.read import aligned_buffer

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


def tokens(count: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(seed))


def assert_product(got: torch.Tensor, x: torch.Tensor, weights: np.ndarray) -> None:
    dense = torch.from_numpy(weights).double()
    expected = x.double() @ dense.T
    scale = x.double().abs() @ dense.abs().T
    assert got.shape == expected.shape
    assert ((got - expected).abs() <= BOUND * scale + 1e-30).all()


@pytest.mark.parametrize("bits,group", PRECISIONS)
@pytest.mark.parametrize("rows,columns", SHAPES)
@pytest.mark.parametrize("count", [1, 3, 4, 9])
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


@pytest.mark.parametrize("bits,group", PRECISIONS)
@pytest.mark.parametrize("rows,columns", SHAPES)
def test_expanded_weights_are_the_weights(rows: int, columns: int, bits: int, group: int) -> None:
    m = matrix(rows, columns, bits, group)
    got = expanded(m.layout, m.address, 0, m.layout.row_blocks)
    assert np.array_equal(got.numpy().T[:rows, :columns], m.weights)
    assert not got.numpy().T[rows:].any() and not got.numpy().T[:, columns:].any()


@pytest.mark.parametrize("bits,group", PRECISIONS)
def test_many_tokens_give_what_few_give(bits: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    m = matrix(100, 300, bits, group)
    x = tokens(40, 300)
    monkeypatch.setattr("swapless.runtime.kernels.EXPAND_BYTES", 2 * 32 * 300 * 4)  # several pieces, the last one short
    got = expanded_product(m.layout, m.address, x)
    assert_product(got, x, m.weights)
    assert_product(product(m.layout, [m.address], as_inputs([x], m.layout)), x, m.weights)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_token_depends_on_nothing_but_itself(bits: int) -> None:
    matrices = [matrix(70, 50, bits, seed=seed) for seed in range(2)]
    x = tokens(7, 50)
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
def test_gated_product_and_the_second_matrix(bits: int, group: int, activation: str) -> None:
    gates, ups = [matrix(100, 80, bits, group, s) for s in (1, 2)], [matrix(100, 80, bits, group, s) for s in (3, 4)]
    downs = [matrix(60, 100, bits, group, s) for s in (5, 6)]
    given = [tokens(5, 80, 7), tokens(1, 80, 8)]
    inner = gated_product(
        gates[0].layout,
        [m.address for m in gates],
        [m.address for m in ups],
        as_inputs(given, gates[0].layout),
        activation,
        downs[0].layout,
    )
    act = torch.nn.SiLU() if activation == "silu" else torch.nn.GELU(approximate="tanh")
    assert not inner.rows[:, 100:].any()
    assert torch.allclose(inner.sums, inner.rows.view(6, -1, 32).sum(-1), rtol=1e-4, atol=1e-4)
    for i, (x, h) in enumerate(zip(given, inner.split(inner.rows), strict=True)):
        gate, up = (torch.from_numpy(m[i].weights).double() for m in (gates, ups))
        expected = act(x.double() @ gate.T) * (x.double() @ up.T)
        assert torch.allclose(h[:, :100].double(), expected, rtol=1e-4, atol=1e-3)
    out = inner.split(product(downs[0].layout, [m.address for m in downs], inner))
    for m, h, y in zip(downs, inner.split(inner.rows), out, strict=True):
        assert_product(y, h[:, :100], m.weights)


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
