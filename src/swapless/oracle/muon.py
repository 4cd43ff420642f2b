"""Muon, for matrices and stacks of them: torch's own takes one matrix a parameter, and experts are a stack.

At a few million tokens it is worth more than any other choice in the recipe: docs/log.md has the comparison with AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Muon", "Split", "orthogonalised", "split_parameters"]

_QUINTIC = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5


def orthogonalised(update: Tensor) -> Tensor:
    """Each matrix (..., R, C) with its singular values pulled to about one: five Newton-Schulz rounds, in bfloat16.

    References
    ----------
    .. [1] Keller Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024; the coefficients are theirs.
    """
    a, b, c = _QUINTIC
    x = update.flatten(0, -3) if update.ndim > 2 else update.unsqueeze(0)
    tall = x.shape[-2] > x.shape[-1]
    x = (x.mT if tall else x).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(update.dtype).reshape(update.shape)


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal, as the step of each matrix.

    Parameters
    ----------
    params : iterable of parameters or groups
        Of shape (..., R, C); leading axes are a stack of matrices, each with a step of its own.
    lr : float
        Size of a step: about the spectral norm of what is added, times sqrt(R / C) where R > C.
    weight_decay : float
        Decoupled, times ``lr``.
    momentum : float
        Of the running gradient; looked ahead by one step (Nesterov).
    """

    def __init__(self, params: Iterable[Any], *, lr: float, weight_decay: float = 0.0, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step. ``closure`` is not used: torch's signature."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                running = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalised(parameter.grad.lerp(running, group["momentum"]))
                rows, columns = parameter.shape[-2:]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


class Split(NamedTuple):
    """Parameters by how they are trained: ``hidden`` matrices (Muon's), ``tables`` (embeddings, output head), ``gates`` of
    routers, and ``vectors`` with stacks of them (norms, biases)."""

    hidden: list[nn.Parameter]
    tables: list[nn.Parameter]
    gates: list[nn.Parameter]
    vectors: list[nn.Parameter]


def split_parameters(model: nn.Module) -> Split:
    """Every parameter of a model in its part."""
    split = Split([], [], [], [])
    for name, parameter in model.named_parameters():
        if ".router." in name:
            split.gates.append(parameter)
        elif parameter.ndim < 2 or name.endswith("_bias"):
            split.vectors.append(parameter)
        elif "embed_" in name or "lm_head" in name:
            split.tables.append(parameter)
        else:
            split.hidden.append(parameter)
    return split
