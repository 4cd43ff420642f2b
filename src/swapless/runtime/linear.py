"""A linear layer in 8 or 4 bits, in place of torch's where a packed store holds non-expert weights so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch

from swapless.runtime.kernels import as_inputs, product
from swapless.runtime.kernels_row import RowProduct
from swapless.store.matrix import MatrixLayout
from swapless.store.quantize import dequantize

_VALUES_BYTES = 16 << 20
"""Many tokens are taken so many at once that their float32 inputs and outputs stay within this."""

SCRATCH_BYTES = 2 * _VALUES_BYTES
"""What a layer holds beside its weights while it computes, about."""


class QuantizedLinear(torch.nn.Module):
    """``x @ weight.T + bias`` with rounded weights and inputs and float32 sums; the output has the type of the input.

    Parameters
    ----------
    layout : MatrixLayout
        Of the weights; their bytes come later, by :meth:`fill`.
    bias : Parameter, optional
        Kept as it is, and loaded under the name that it has in torch's layer.
    """

    bias: torch.nn.Parameter | None

    def __init__(self, layout: MatrixLayout, bias: torch.nn.Parameter | None) -> None:
        super().__init__()
        self.layout = layout
        self.in_features, self.out_features = layout.columns, layout.rows
        self.register_parameter("bias", bias)
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._one_token = RowProduct(layout)

    def fill(self, memory: torch.Tensor) -> None:
        """Take the weights' bytes, uint8 of ``layout.nbytes``, aligned to 64. The layer keeps them."""
        assert len(memory) == self.layout.nbytes and memory.data_ptr() % 64 == 0
        self._memory = memory

    @property
    def weight(self) -> torch.Tensor:
        """The weights as float32 (outputs, inputs), made anew at each call, for code that looks at them."""
        return torch.from_numpy(dequantize(self._memory.numpy(), self.layout))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs (..., columns) to outputs (..., rows)."""
        flat = x.reshape(-1, self.in_features)
        y = self._one_token(self._memory.data_ptr(), flat).to(x.dtype) if len(flat) == 1 else self._many_tokens(flat)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def _many_tokens(self, flat: torch.Tensor) -> torch.Tensor:
        address = [self._memory.data_ptr()]
        at_once = max(1, _VALUES_BYTES // (4 * (self.layout.padded_rows + self.layout.padded_columns)))
        parts = [product(self.layout, address, as_inputs([part], self.layout)).to(flat.dtype) for part in flat.split(at_once)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def quantize_linears(model: torch.nn.Module, layouts: Mapping[str, MatrixLayout]) -> None:
    """Put a :class:`QuantizedLinear` in the place of every linear layer that ``layouts`` names by its path."""
    for path, layout in layouts.items():
        parent, _, name = path.rpartition(".")
        old: Any = model.get_submodule(path)
        setattr(model.get_submodule(parent), name, QuantizedLinear(layout, old.bias))


def quantized_linear(model: torch.nn.Module, path: str) -> QuantizedLinear:
    """The layer at ``path``."""
    return cast(QuantizedLinear, model.get_submodule(path))
