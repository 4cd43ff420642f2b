"""An experts forward for training on a CPU: tokens sorted by expert once, one product an expert, gradients written in place.

Autograd's own slicing of stacked weights would fill a zero gradient of the whole stack for every expert.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from swapless.oracle.autocast import product_dtype
from swapless.runtime.door import ALL_EXPERTS_FUNCTIONS

__all__ = ["SORTED", "register_sorted_experts", "sorted_experts_forward"]

SORTED = "sorted_mm"
"""Name of the implementation in transformers' registry of experts functions."""

_ROWS = 64
"""Each expert's rows are rounded up to a multiple of this."""


class _GroupedLinear(torch.autograd.Function):
    """Rows sorted by expert times each expert's matrix: one product an expert, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x_SI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, ends: list[int]) -> Tensor:
        ctx.save_for_backward(x_SI, weight_EOI)
        ctx.ends, ctx.biased = ends, bias_EO is not None
        out_SO = x_SI.new_empty(x_SI.shape[0], weight_EOI.shape[1])
        start = 0
        for expert, end in enumerate(ends):
            if bias_EO is None:
                torch.mm(x_SI[start:end], weight_EOI[expert].t(), out=out_SO[start:end])
            else:
                torch.addmm(bias_EO[expert], x_SI[start:end], weight_EOI[expert].t(), out=out_SO[start:end])
            start = end
        return out_SO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_SO,) = (grad.contiguous() for grad in grads)
        x_SI, weight_EOI = ctx.saved_tensors
        grad_x_SI, grad_weight_EOI = torch.empty_like(x_SI), torch.empty_like(weight_EOI)
        grad_bias_EO = weight_EOI.new_empty(weight_EOI.shape[:2]) if ctx.biased else None
        start = 0
        for expert, end in enumerate(ctx.ends):
            torch.mm(grad_SO[start:end], weight_EOI[expert], out=grad_x_SI[start:end])
            torch.mm(grad_SO[start:end].t(), x_SI[start:end], out=grad_weight_EOI[expert])
            if grad_bias_EO is not None:
                grad_bias_EO[expert] = grad_SO[start:end].sum(dim=0)
            start = end
        return grad_x_SI, grad_weight_EOI, grad_bias_EO, None


class _Dispatch(torch.autograd.Function):
    """Copy each token's row to the place of each of its K choices; the gradient gathers, where autograd would scatter."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_S: Tensor, back_TK: Tensor) -> Tensor:
        ctx.save_for_backward(back_TK)
        ctx.T = x_TD.shape[0]
        return x_TD.index_select(0, token_S)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (back_TK,) = ctx.saved_tensors
        return grads[0].index_select(0, back_TK).view(ctx.T, -1, grads[0].shape[1]).sum(dim=1), None, None


class _Collect(torch.autograd.Function):
    """Undo the sorting of rows; rows that no token has get no gradient."""

    @staticmethod
    def forward(ctx: Any, y_SD: Tensor, back_TK: Tensor) -> Tensor:
        ctx.save_for_backward(back_TK)
        ctx.rows = y_SD.shape[0]
        return y_SD.index_select(0, back_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].new_zeros(ctx.rows, grads[0].shape[1]).index_copy_(0, ctx.saved_tensors[0], grads[0]), None


class _Places(NamedTuple):
    """``token_S`` the token of each sorted row, ``back_TK`` the row of each choice, ``ends`` where each expert's rows end."""

    token_S: Tensor
    back_TK: Tensor
    ends: list[int]


def _places(ids_TK: Tensor, num_experts: int) -> _Places:
    """Rows by expert, each expert's number rounded up.

    oneDNN compiles a product for every new shape, which takes longer than the product: few shapes, then. The rows that fill up
    hold some token's values; nothing reads what becomes of them, and they get no gradient.
    """
    ids = ids_TK.reshape(-1)
    order = torch.argsort(ids, stable=True)
    counts = torch.bincount(ids, minlength=num_experts)
    rounded = (counts + _ROWS - 1) // _ROWS * _ROWS
    shift = (rounded.cumsum(0) - rounded) - (counts.cumsum(0) - counts)
    rows = torch.arange(len(ids), device=ids.device) + shift[ids[order]]
    ends: list[int] = rounded.cumsum(0).tolist()
    token = torch.zeros(ends[-1], dtype=torch.long, device=ids.device)
    token[rows] = order // ids_TK.shape[1]
    back = torch.empty_like(order)
    back[order] = rows
    return _Places(token, back, ends)


def sorted_experts_forward(self: nn.Module, hidden_TD: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The same sum as transformers' eager experts, in another order of additions; experts with gates and biases, or without."""
    module: Any = self
    T, K = top_k_index.shape
    dtype = product_dtype(hidden_TD)

    def cast(name: str) -> Tensor:
        return getattr(module, name).to(dtype)

    places = _places(top_k_index, module.num_experts)
    x_SD = _Dispatch.apply(hidden_TD.to(dtype), places.token_S, places.back_TK)
    gated = getattr(module, "has_gate", True)
    into = "gate_up_proj" if gated else "up_proj"
    biased = getattr(module, "has_bias", False)
    inner_S = _GroupedLinear.apply(x_SD, cast(into), cast(f"{into}_bias") if biased else None, places.ends)
    if gated:
        gate_SF, up_SF = inner_S.chunk(2, dim=-1)
        inner_SF = module.act_fn(gate_SF) * up_SF
    else:
        inner_SF = module.act_fn(inner_S)
    y_SD = _GroupedLinear.apply(inner_SF, cast("down_proj"), cast("down_proj_bias") if biased else None, places.ends)
    y_TKD = _Collect.apply(y_SD, places.back_TK).view(T, K, -1)
    return (y_TKD * top_k_weights.unsqueeze(-1)).sum(dim=1)


def register_sorted_experts() -> None:
    """Make ``experts_implementation="sorted_mm"`` known to transformers. Safe to call twice."""
    ALL_EXPERTS_FUNCTIONS.register(SORTED, sorted_experts_forward)
