"""Copies of layers and products that hold addresses: a copy computes from its own memory, whatever became of the first."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from swapless.errors import UnsupportedOperationError
from swapless.runtime.kernels_row import GatedRowProduct, RowProduct
from swapless.runtime.linear import QuantizedLinear
from swapless.store.matrix import MatrixLayout
from swapless.store.quantize import quantize
from swapless.store.read import aligned_buffer

ROWS, COLUMNS = 70, 96


def matrix(rows: int, columns: int, bits: int, seed: int) -> tuple[MatrixLayout, np.ndarray]:
    layout = MatrixLayout(rows=rows, columns=columns, bits=bits, group=32)
    memory = aligned_buffer(layout.nbytes)[: layout.nbytes]
    memory[:] = 0
    quantize(np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32), layout, memory)
    return layout, memory


def layer(bits: int, bias: bool = True) -> QuantizedLinear:
    layout, memory = matrix(ROWS, COLUMNS, bits, 0)
    made = QuantizedLinear(layout, torch.nn.Parameter(torch.randn(ROWS), requires_grad=False) if bias else None)
    made.fill(torch.from_numpy(memory))
    return made


def pickled(one: Any) -> Any:
    return pickle.loads(pickle.dumps(one))


def saved(one: Any) -> Any:
    file = io.BytesIO()
    torch.save(one, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def moved(one: Any) -> Any:
    return copy.deepcopy(one).to("cpu")


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": pickled,
    "torch.save": saved,
    "to": moved,
    "deepcopy in a model": lambda one: copy.deepcopy(torch.nn.Sequential(one))[0],
    "copy of a copy": lambda one: copy.deepcopy(pickled(one)),
}


@pytest.mark.few(4)
@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("how", COPIES)
def test_a_copied_layer_computes_when_the_first_is_gone(how: str, bits: int) -> None:
    one_token, many = torch.randn(1, COLUMNS), torch.randn(5, COLUMNS)
    first = layer(bits)
    expected = [first(one_token).clone(), first(many).clone()]
    second = COPIES[how](first)
    del first
    gc.collect()
    junk = [torch.full((1 << 16,), float("nan")) for _ in range(64)]  # over whatever was freed
    for _ in range(3):
        assert torch.equal(second(one_token), expected[0]) and torch.equal(second(many), expected[1])
    assert second._memory.data_ptr() % 64 == 0 and len(junk) == 64


@torch.no_grad()
def test_a_copy_and_its_first_do_not_write_into_each_other() -> None:
    first = layer(8)
    second = copy.deepcopy(first)
    one, other = torch.randn(2, 1, COLUMNS)
    expected = first(one).clone(), first(other).clone()
    for _ in range(3):
        assert torch.equal(first(one), expected[0]) and torch.equal(second(other), expected[1])
    assert second._one_token._call._rounded.data_ptr() != first._one_token._call._rounded.data_ptr()
    second._memory.zero_()
    assert torch.equal(first(one), expected[0])


def test_memory_that_is_not_aligned_is_copied() -> None:
    made, expected = layer(4, bias=False), layer(4, bias=False)
    memory = torch.empty(made.layout.nbytes + 65, dtype=torch.uint8)
    first = -memory.data_ptr() % 64 + 1
    made.fill(memory[first : first + made.layout.nbytes].copy_(expected._memory))
    token = torch.randn(1, COLUMNS)
    assert torch.equal(made(token), expected(token))


def test_other_weights_are_refused_by_name() -> None:
    made = layer(8)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="rounded weights takes no others"):
            made.load_state_dict({"weight": torch.randn(ROWS, COLUMNS), "bias": torch.zeros(ROWS)}, strict=strict)
    made.load_state_dict({"bias": torch.zeros(ROWS)})
    assert not made.bias.any()


@pytest.mark.parametrize("how", [copy.deepcopy, pickled])
def test_prepared_products_are_prepared_anew(how: Callable[[Any], Any]) -> None:
    into, gate = matrix(64, COLUMNS, 8, 1)
    _, up = matrix(64, COLUMNS, 8, 2)
    out, down = matrix(COLUMNS, 64, 8, 3)
    token = torch.randn(1, COLUMNS)
    addresses = [np.array([memory.ctypes.data]) for memory in (gate, up, down)]
    gated, row = GatedRowProduct(into, out, "silu"), RowProduct(into)
    expected = gated(*addresses, token).clone(), row(gate.ctypes.data, token).clone()
    gated, row = how(gated), how(row)
    gc.collect()
    junk = [torch.full((1 << 14,), float("nan")) for _ in range(64)]
    assert torch.equal(gated(*addresses, token), expected[0]) and torch.equal(row(gate.ctypes.data, token), expected[1])
    assert len(junk) == 64
    with pytest.raises(UnsupportedOperationError, match="addresses"):
        how(row._call)
