"""The arithmetic of experts, operation for operation what transformers' eager experts do, so that every bit agrees.

An expert's tokens are gathered in the order of eager (by place among the K, then by token), computed in one product, and
added to the output. Which expert is computed when is free; the additions must come in ascending expert id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from swapless.runtime.families import ACCUMULATE_IN
from swapless.runtime.pool import SlotPool

_ALIGNMENT = 64


class Experts(Protocol):
    """Computes some experts of a MoE layer at once, from what lies in blocks of the pool."""

    def __call__(
        self, module: Any, moe_layer: int, blocks: Sequence[int], hidden: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Outputs (N, D) of each expert for its gathered tokens (N, D), before the gate weights."""
        ...


class Routed(Protocol):
    """The tokens of one block, by expert."""

    def gather(self, expert: int) -> torch.Tensor:
        """Hidden states of the expert's tokens, (N, D)."""
        ...

    def add(self, out_TD: torch.Tensor, outputs: Mapping[int, torch.Tensor]) -> None:
        """Add experts' outputs (N, D), times their gate weights, to the rows of ``out_TD`` they belong to, by ascending id."""
        ...


def routed(hidden_TD: torch.Tensor, ids: np.ndarray, weights_TK: torch.Tensor) -> Routed:
    """The tokens of one block by expert; ``ids`` int64 (T, K) are the chosen experts."""
    if len(ids) == 1:
        experts = ids[0].tolist()
        if len(set(experts)) == len(experts):
            return _OneToken(hidden_TD, experts, weights_TK)
    return _ManyTokens(hidden_TD, ids, weights_TK)


class _OneToken:
    """Decode of a single sequence: the same values as the general case, without gathering and scattering a single row."""

    def __init__(self, hidden_TD: torch.Tensor, experts: list[int], weights_TK: torch.Tensor) -> None:
        # A product on less aligned memory differs in the last bits from the freshly gathered row that eager uses.
        aligned = hidden_TD.is_contiguous() and hidden_TD.data_ptr() % _ALIGNMENT == 0
        self._hidden_TD = hidden_TD if aligned else hidden_TD.clone(memory_format=torch.contiguous_format)
        self._place = {expert: place for place, expert in enumerate(experts)}
        self._weights_K1 = weights_TK.view(-1, 1)

    def gather(self, expert: int) -> torch.Tensor:
        return self._hidden_TD

    def add(self, out_TD: torch.Tensor, outputs: Mapping[int, torch.Tensor]) -> None:
        experts = sorted(outputs)
        y_ND = torch.cat([outputs[expert] for expert in experts])
        places = torch.from_numpy(np.array([self._place[expert] for expert in experts]))
        weighted = y_ND * self._weights_K1.index_select(0, places)
        for row in weighted.to(out_TD.dtype).split(1):
            out_TD.add_(row)


class _ManyTokens:
    """The general case."""

    def __init__(self, hidden_TD: torch.Tensor, ids: np.ndarray, weights_TK: torch.Tensor) -> None:
        self._hidden_TD = hidden_TD
        self._weights_TK = weights_TK
        flat = ids.T.reshape(-1)  # place-major: the order in which eager gathers
        order = np.argsort(flat, kind="stable")
        experts, first = np.unique(flat[order], return_index=True)
        place, token = (torch.from_numpy(index) for index in np.divmod(order, len(ids)))
        ends = np.append(first[1:], len(flat))
        self._rows = {
            int(expert): (token[begin:end], place[begin:end]) for expert, begin, end in zip(experts, first, ends, strict=True)
        }

    def gather(self, expert: int) -> torch.Tensor:
        return self._hidden_TD[self._rows[expert][0]]

    def add(self, out_TD: torch.Tensor, outputs: Mapping[int, torch.Tensor]) -> None:
        for expert in sorted(outputs):
            token, place = self._rows[expert]
            weighted = outputs[expert] * self._weights_TK[token, place, None]
            out_TD.index_add_(0, token, weighted.to(out_TD.dtype))


def accumulator(module: Any, hidden_TD: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    """Zeros of shape (T, D), in the type in which the module's eager forward adds up."""
    kinds = {"float32": torch.float32, "gate weights": weights_TK.dtype}
    return torch.zeros_like(hidden_TD, dtype=kinds.get(ACCUMULATE_IN.get(type(module).__name__, ""), hidden_TD.dtype))


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


class PlainExperts:
    """Computes experts from their parameters as they lie in the pool.

    Parameters
    ----------
    pool : SlotPool
        Where the parameters are.
    """

    def __init__(self, pool: SlotPool) -> None:
        self._pool = pool

    def __call__(
        self, module: Any, moe_layer: int, blocks: Sequence[int], hidden: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Outputs (N, D) of the experts in ``blocks`` of the pool for their gathered tokens (N, D), before the gate weights."""
        parameters = (self._pool.parameters(moe_layer, block) for block in blocks)
        return [expert_output(module, weights, tokens) for weights, tokens in zip(parameters, hidden, strict=True)]


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool) -> torch.Tensor:
    y = x @ weight if transposed else F.linear(x, weight)
    return y if bias is None else y + bias
