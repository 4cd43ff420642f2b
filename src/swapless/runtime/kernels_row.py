"""Products of one token, all prepared that is the same every time: of a decode step's small ones that is half the time."""

from __future__ import annotations

from typing import NoReturn

import numpy as np
import torch

from swapless.errors import UnsupportedOperationError
from swapless.runtime.kernels import ACTIVATIONS, as_rows, perform, ready
from swapless.runtime.kernels_call import (
    DOWN,
    FLOATS,
    GATE,
    INNER,
    INPUT,
    OUTPUT,
    ROUNDED,
    TOKENS,
    TOKENS_IN_ALL,
    UP,
    experts_of,
    new_call,
    rounded_bytes,
)
from swapless.store.matrix import MatrixLayout


def _scratch(layout: MatrixLayout) -> torch.Tensor:
    """Memory for one token's rounded inputs; a model is made where torch gives none by itself."""
    return torch.empty(rounded_bytes(layout), dtype=torch.uint8, device="cpu")


class _Call:
    """A call of some experts for one token, whose rounded inputs lie in ``rounded`` and are found by the experts' ``field``."""

    def __init__(
        self, out: MatrixLayout, into: MatrixLayout | None, activation: int, experts: int, rounded: torch.Tensor, field: int
    ) -> None:
        ready()
        self._out, self._experts, self._rounded = out, experts, rounded
        self.first = new_call(out, into, activation, experts)
        self.first[TOKENS_IN_ALL // 8] = 1
        self.first[ROUNDED // 8] = rounded.data_ptr()
        lines = experts_of(self.first)
        lines[:, TOKENS // 8] = 1
        lines[:, field // 8] = rounded.data_ptr()
        self._now = self.first.copy()
        self._address = self._now.ctypes.data
        self._lines = experts_of(self._now)
        self._starts = 4 * out.padded_rows * np.arange(experts)

    def __reduce__(self) -> NoReturn:
        raise UnsupportedOperationError("A prepared call holds addresses of its own memory: prepare another one.")

    def begin(self) -> np.ndarray:
        """Forget the last time; the lines of the experts, for the addresses of their matrices."""
        self._now[:] = self.first
        return self._lines

    def outputs(self, rows: torch.Tensor) -> torch.Tensor:
        """Compute, from the token's ``rows``: float32 (experts, rows of ``out``)."""
        output = torch.empty(self._experts, self._out.padded_rows, dtype=torch.float32, device="cpu")
        self._lines[:, OUTPUT // 8] = self._starts + output.data_ptr()
        self._now[FLOATS // 8] = rows.data_ptr()
        perform(self._address)
        return output if self._out.padded_rows == self._out.rows else output[:, : self._out.rows]


class RowProduct:
    """A matrix in ``layout`` times one token. A copy is prepared anew: the addresses in it are those of its own memory."""

    def __init__(self, layout: MatrixLayout) -> None:
        self._layout = layout
        self._call = _Call(layout, None, 0, 1, _scratch(layout), INNER)

    def __reduce__(self) -> tuple[type[RowProduct], tuple[MatrixLayout]]:
        return RowProduct, (self._layout,)

    def __call__(self, matrix: int, token: torch.Tensor) -> torch.Tensor:
        """``token`` (1, columns) of any floating type to float32 (1, rows), as :func:`~.kernels.product` has it.

        ``matrix`` is the address of its memory, at a multiple of 64.
        """
        self._call.begin()[0, DOWN // 8] = matrix
        return self._call.outputs(as_rows(token, self._layout))


class GatedRowProduct:
    """Experts in two layouts times one token that all of them share. A copy is prepared anew.

    Parameters
    ----------
    into, out : MatrixLayout
        Of gate and up, and of down.
    activation : str
        A key of ``ACTIVATIONS``.
    """

    def __init__(self, into: MatrixLayout, out: MatrixLayout, activation: str) -> None:
        self._into, self._out, self._activation = into, out, ACTIVATIONS[activation]
        self._given = into, out, activation
        self._rounded = _scratch(into)
        self._calls: dict[int, tuple[_Call, torch.Tensor]] = {}

    def __reduce__(self) -> tuple[type[GatedRowProduct], tuple[MatrixLayout, MatrixLayout, str]]:
        return GatedRowProduct, self._given

    def __call__(self, gates: np.ndarray, ups: np.ndarray, downs: np.ndarray, token: torch.Tensor) -> torch.Tensor:
        """``token`` (1, columns) of any floating type to float32 (experts, rows), as :func:`~.kernels.gated_product` has it.

        The others are addresses, int64 (experts,), at multiples of 64.
        """
        count = len(gates)
        call, _ = self._calls.get(count) or self._prepare(count)
        lines = call.begin()
        lines[:, GATE // 8], lines[:, UP // 8], lines[:, DOWN // 8] = gates, ups, downs
        return call.outputs(as_rows(token, self._into))

    def _prepare(self, experts: int) -> tuple[_Call, torch.Tensor]:
        call = _Call(self._out, self._into, self._activation, experts, self._rounded, INPUT)
        inner = torch.zeros(
            experts, rounded_bytes(self._out), dtype=torch.uint8, device="cpu"
        )  # of a padded block, nothing else is written
        experts_of(call.first)[:, INNER // 8] = inner.data_ptr() + inner.stride(0) * np.arange(experts)
        self._calls[experts] = call, inner
        return call, inner
