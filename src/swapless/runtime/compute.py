"""The arithmetic of experts, operation for operation what transformers' eager experts do, so that every bit agrees.

An expert's tokens are gathered in the order of eager (by place among the K, then by token), computed in one product, and
added to the output. Which expert is computed when is free; the additions must come in ascending expert id.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F


class Rows(NamedTuple):
    """Tokens of one expert: ``token`` and ``place`` int64 (n,), where it stands among the K."""

    token: torch.Tensor
    place: torch.Tensor


def rows_by_expert(ids_TK: np.ndarray, num_experts: int) -> dict[int, Rows]:
    """Rows of every expert that ``ids_TK`` names; ids outside [0, E) stand for none."""
    tokens = len(ids_TK)
    flat = ids_TK.T.reshape(-1)  # place-major: the order in which eager gathers
    order = np.argsort(flat, kind="stable")
    sorted_ids = flat[order]
    experts, first = np.unique(sorted_ids, return_index=True)
    ends = np.append(first[1:], len(flat))
    place, token = np.divmod(order, tokens)
    return {
        int(expert): Rows(torch.from_numpy(token[begin:end]), torch.from_numpy(place[begin:end]))
        for expert, begin, end in zip(experts, first, ends, strict=True)
        if 0 <= expert < num_experts
    }


def expert_output(module: Any, weights: dict[str, torch.Tensor], hidden_ND: torch.Tensor) -> torch.Tensor:
    """What one expert makes of its gathered tokens, before the gate weight: (N, D).

    ``module`` is the experts module of the model, which owns activation, gate and flags but no weights.
    """
    gated = getattr(module, "has_gate", True)
    into, out = ("gate_up_proj" if gated else "up_proj"), "down_proj"
    transposed, bias = module.is_transposed, module.has_bias
    h = _linear(hidden_ND, weights[into], weights[f"{into}_bias"] if bias else None, transposed)
    h = module._apply_gate(h) if gated else module.act_fn(h)
    h = _linear(h, weights[out], weights[f"{out}_bias"] if bias else None, transposed)
    return module.post_expert_norm(h) if getattr(module, "has_post_expert_norm", False) else h


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool) -> torch.Tensor:
    y = x @ weight if transposed else F.linear(x, weight)
    return y if bias is None else y + bias


def add_weighted(out_TD: torch.Tensor, y_ND: torch.Tensor, weights_TK: torch.Tensor, rows: Rows) -> None:
    """Add an expert's output, times its gate weights, to the rows it belongs to."""
    weighted = y_ND * weights_TK[rows.token, rows.place, None]
    out_TD.index_add_(0, rows.token, weighted.to(out_TD.dtype))
