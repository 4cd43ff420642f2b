"""The last product and its cross-entropy together, a few tokens at a time: a batch's logits are never in memory at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from swapless.oracle.autocast import product_dtype

__all__ = ["next_token_loss"]

_LOGITS_AT_ONCE = 1 << 20
"""Four megabytes of float32: they stay in the processor's cache between their passes."""


class _NextTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, next_T: Tensor, dtype: torch.dtype) -> Tensor:
        h, w = hidden_TD.to(dtype), weight_VD.to(dtype)
        T, rows = len(next_T), max(1, _LOGITS_AT_ONCE // len(w))
        grad_h, grad_w = torch.empty_like(h), torch.zeros(w.shape, dtype=torch.float32, device=w.device)
        total = torch.zeros((), device=h.device)
        for begin in range(0, T, rows):
            part, expected = h[begin : begin + rows], next_T[begin : begin + rows, None]
            grad = (part @ w.t()).float().softmax(dim=-1)
            total -= grad.gather(1, expected).clamp(min=torch.finfo(torch.float32).tiny).log().sum()
            grad.scatter_add_(1, expected, grad.new_full((1, 1), -1.0).expand_as(expected))
            grad = grad.div_(T).to(dtype)
            grad_h[begin : begin + rows] = grad @ w
            grad_w += grad.t() @ part
        ctx.save_for_backward(grad_h.to(hidden_TD.dtype), grad_w.to(weight_VD.dtype))
        return total / T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_h, grad_w = ctx.saved_tensors
        return grads[0] * grad_h, grads[0] * grad_w, None, None


def next_token_loss(hidden_TD: Tensor, weight_VD: Tensor, next_T: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the tokens ``next_T`` (T,), from hidden states and the output matrix.

    Products run in autocast's type where it is on. Both gradients are made on the way, for training alone.
    """
    loss: Tensor = _NextTokenLoss.apply(hidden_TD, weight_VD, next_T, product_dtype(hidden_TD))
    return loss
