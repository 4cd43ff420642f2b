"""A linear layer in 8 or 4 bits, in place of torch's where a packed store holds non-expert weights so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch

from swapless.runtime.kernels import as_inputs, product
from swapless.runtime.kernels_row import RowProduct
from swapless.runtime.plain import check_plain, output_type
from swapless.runtime.turns import Turn
from swapless.store.matrix import MatrixLayout
from swapless.store.quantize import dequantize

_VALUES_BYTES = 16 << 20
"""Many tokens are taken so many at once that their float32 inputs and outputs stay within this."""

SCRATCH_BYTES = 2 * _VALUES_BYTES
"""What a layer holds beside its weights while it computes, about."""

_ALONE = Turn()
"""The turn of layers that belong to no loaded model."""


class QuantizedLinear(torch.nn.Module):
    """``x @ weight.T + bias`` with rounded weights and inputs and float32 sums, in the type of the input or of autocast.

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
        self._turn = _ALONE

    def take_turns(self, turn: Turn) -> None:
        """Compute only while the calling thread has ``turn``, since there is one scratch memory for all."""
        self._turn = turn

    def fill(self, memory: torch.Tensor) -> None:
        """Take the weights' bytes, uint8 of ``layout.nbytes``; they are copied where they do not begin at a multiple of 64."""
        assert len(memory) == self.layout.nbytes
        self._memory = _aligned(memory)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._memory = _aligned(self._memory)  # a copy may lie anywhere

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        *_, errors = args
        if f"{prefix}weight" in state_dict:  # without this, it would be left out in silence where strict=False
            errors.append(f"{prefix}weight: a layer with rounded weights takes no others; pack the checkpoint that has them.")
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def weight(self) -> torch.Tensor:
        """The weights as float32 (outputs, inputs), made anew at each call, for code that looks at them."""
        return torch.from_numpy(dequantize(self._memory.numpy(), self.layout))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs (..., columns) to outputs (..., rows)."""
        check_plain("rounded layers", x)
        flat = x.reshape(-1, self.in_features)
        with self._turn.lock:
            y = (
                self._one_token(self._memory.data_ptr(), flat).to(output_type(x.dtype))
                if len(flat) == 1
                else self._many_tokens(flat)
            )
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def _many_tokens(self, flat: torch.Tensor) -> torch.Tensor:
        address = [self._memory.data_ptr()]
        at_once = max(1, _VALUES_BYTES // (4 * (self.layout.padded_rows + self.layout.padded_columns)))
        dtype = output_type(flat.dtype)
        parts = [product(self.layout, address, as_inputs([part], self.layout)).to(dtype) for part in flat.split(at_once)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _aligned(memory: torch.Tensor) -> torch.Tensor:
    """``memory``, or a copy of it, uint8, that begins at a multiple of 64: kernels read it by such lines."""
    if memory.data_ptr() % 64 == 0:
        return memory
    whole = torch.empty(len(memory) + 64, dtype=torch.uint8, device="cpu")
    first = -whole.data_ptr() % 64
    return whole[first : first + len(memory)].copy_(memory)


def quantize_linears(model: torch.nn.Module, layouts: Mapping[str, MatrixLayout]) -> None:
    """Put a :class:`QuantizedLinear` in the place of every linear layer that ``layouts`` names by its path."""
    for path, layout in layouts.items():
        parent, _, name = path.rpartition(".")
        old: Any = model.get_submodule(path)
        setattr(model.get_submodule(parent), name, QuantizedLinear(layout, old.bias))


def quantized_linear(model: torch.nn.Module, path: str) -> QuantizedLinear:
    """The layer at ``path``."""
    return cast(QuantizedLinear, model.get_submodule(path))
