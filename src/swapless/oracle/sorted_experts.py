"""An experts forward for training on a CPU: tokens sorted by expert once, one product an expert, gradients written in place.

Autograd's own slicing of stacked weights would fill a zero gradient of the whole stack for every expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from swapless.runtime.door import ALL_EXPERTS_FUNCTIONS

__all__ = ["SORTED", "register_sorted_experts", "sorted_experts_forward"]

SORTED = "sorted_mm"
"""Name of the implementation in transformers' registry of experts functions."""


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
    def forward(ctx: Any, x_TD: Tensor, order_S: Tensor, back_S: Tensor) -> Tensor:
        ctx.save_for_backward(back_S)
        ctx.T = x_TD.shape[0]
        return x_TD.index_select(0, order_S // (order_S.shape[0] // ctx.T))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (back_S,) = ctx.saved_tensors
        return grads[0].index_select(0, back_S).view(ctx.T, -1, grads[0].shape[1]).sum(dim=1), None, None


class _Collect(torch.autograd.Function):
    """Undo the sorting of rows; the gradient is the sorting itself."""

    @staticmethod
    def forward(ctx: Any, y_SD: Tensor, order_S: Tensor, back_S: Tensor) -> Tensor:
        ctx.save_for_backward(order_S)
        return y_SD.index_select(0, back_S)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None


def sorted_experts_forward(self: nn.Module, hidden_TD: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The same sum as transformers' eager experts, in another order of additions; experts with gates and biases, or without."""
    module: Any = self
    T, K = top_k_index.shape
    kind = hidden_TD.device.type
    # Autocast does not reach into a custom autograd function: what it would have cast is cast here.
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_TD.dtype

    def cast(name: str) -> Tensor:
        return getattr(module, name).to(dtype)

    order_S = torch.argsort(top_k_index.reshape(-1), stable=True)
    ends = torch.bincount(top_k_index.reshape(-1), minlength=module.num_experts).cumsum(0).tolist()
    back_S = torch.empty_like(order_S)
    back_S[order_S] = torch.arange(T * K, device=order_S.device)
    x_SD = _Dispatch.apply(hidden_TD.to(dtype), order_S, back_S)
    gated = getattr(module, "has_gate", True)
    into = "gate_up_proj" if gated else "up_proj"
    biased = getattr(module, "has_bias", False)
    inner_S = _GroupedLinear.apply(x_SD, cast(into), cast(f"{into}_bias") if biased else None, ends)
    if gated:
        gate_SF, up_SF = inner_S.chunk(2, dim=-1)
        inner_SF = module.act_fn(gate_SF) * up_SF
    else:
        inner_SF = module.act_fn(inner_S)
    y_SD = _GroupedLinear.apply(inner_SF, cast("down_proj"), cast("down_proj_bias") if biased else None, ends)
    y_TKD = _Collect.apply(y_SD, order_S, back_S).view(T, K, -1)
    return (y_TKD * top_k_weights.unsqueeze(-1)).sum(dim=1)


def register_sorted_experts() -> None:
    """Make ``experts_implementation="sorted_mm"`` known to transformers. Safe to call twice."""
    ALL_EXPERTS_FUNCTIONS.register(SORTED, sorted_experts_forward)
