"""The theme of a token: the vector that its router looks at, by name. All but ``paper-group`` depend on earlier tokens alone.

Every kind of mean is the same scan with other slots: a semantic group, or the document; and with or without forgetting. The
scan is one compiled loop over tokens on the CPU (on other devices the values travel there and back), the same for training,
prefill and decode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from swapless.arrays import want
from swapless.oracle._kernels import running_mean, running_mean_backward, top_mass
from swapless.oracle.config import OracleMoeConfig
from swapless.oracle.groups import extend_groups
from swapless.oracle.state import Documents, RouterState

__all__ = ["View", "mean_of_slots", "recent_mean", "theme_of"]


@dataclass(frozen=True, slots=True)
class View:
    """What a router may look at: the feed-forward's input, the attention's output before the residual, and the head-mean
    attention probabilities (computed when asked for, as float32 (B, N, S) on the CPU), with where the tokens stand."""

    hidden_BND: Tensor
    attended_BND: Tensor
    probabilities: Callable[[], Tensor]
    documents: Documents


class _RunningMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_BND: Tensor, slot: np.ndarray, decay: float, sums: Tensor, weights: Tensor) -> Tensor:
        h = h_BND.detach().float().cpu().contiguous()
        want(slot, "slot", (np.int32, np.int64), h.shape[:2])
        want(sums.numpy(), "sums", np.float64, (len(h), None, h.shape[2]))
        mean, weight_at = torch.empty_like(h), np.empty(slot.shape)
        running_mean(h.numpy(), slot, decay, sums.numpy(), weights.numpy(), mean.numpy(), weight_at)
        ctx.slot, ctx.decay, ctx.groups, ctx.weight_at, ctx.dtype = slot, decay, sums.shape[1], weight_at, h_BND.dtype
        return mean.to(h_BND.device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0].float().cpu().contiguous()
        out = torch.empty_like(grad)
        running_mean_backward(grad.numpy(), ctx.slot, ctx.decay, ctx.groups, ctx.weight_at, out.numpy())
        return out.to(grads[0].device, ctx.dtype), None, None, None, None


def mean_of_slots(h_BND: Tensor, slot: np.ndarray, state: RouterState, name: str, decay: float = 1.0) -> Tensor:
    """Mean of the tokens of each token's slot so far, float32 (B, N, D); ``state[name]`` carries sums and weights on."""
    B, _, D = h_BND.shape
    groups = max(int(slot.max()) + 1, state[f"{name}_sums"].shape[1] if f"{name}_sums" in state else 1)
    sums, weights = torch.zeros((B, groups, D), dtype=torch.float64), torch.zeros((B, groups), dtype=torch.float64)
    if f"{name}_sums" in state:
        known = state[f"{name}_sums"].shape[1]
        sums[:, :known], weights[:, :known] = state[f"{name}_sums"], state[f"{name}_weights"]
    mean = _RunningMean.apply(h_BND, slot, decay, sums, weights)
    state[f"{name}_sums"], state[f"{name}_weights"] = sums, weights
    return mean


def recent_mean(h_BND: Tensor, tokens: float, view: View, state: RouterState, name: str) -> Tensor:
    """Mean of the document that forgets over about ``tokens`` tokens, float32 (B, N, D)."""
    return mean_of_slots(h_BND, view.documents.number, state, name, _decay(tokens))


def _decay(tokens: float | None) -> float:
    return 1.0 if tokens is None else 1 - 1 / tokens


def theme_of(view: View, config: OracleMoeConfig, tau: float, state: RouterState) -> Tensor:
    """The theme of each token, float32 (B, N, D), as ``config.router`` sees it. ``state`` is brought up to date."""
    return _THEMES[config.kind.theme](view, config, tau, state)


def _token(view: View, config: OracleMoeConfig, tau: float, state: RouterState) -> Tensor:
    return view.hidden_BND.float()


def _group(view: View, config: OracleMoeConfig, tau: float, state: RouterState) -> Tensor:
    limit = tau / view.documents.rank
    slot = extend_groups(view.probabilities().numpy(), view.documents, limit, config.group_fraction, state)
    return mean_of_slots(view.hidden_BND, slot, state, "group", _decay(config.theme_tokens))


def _paper_group(view: View, config: OracleMoeConfig, tau: float, state: RouterState) -> Tensor:
    """The clique with an absolute threshold, and in a prefill the mean of the whole group: later tokens leak into it."""
    limit = np.full(view.documents.rank.shape, config.epsilon)
    slot = extend_groups(view.probabilities().numpy(), view.documents, limit, 1.0, state)
    running = mean_of_slots(view.hidden_BND, slot, state, "group")
    whole = state["group_sums"] / state["group_weights"].clamp(min=1)[..., None]
    at = torch.from_numpy(np.maximum(slot, 0))[..., None].expand(-1, -1, whole.shape[2])
    known = torch.from_numpy(slot >= 0)[..., None].to(running.device)
    return torch.where(known, whole.gather(1, at).float().to(running.device), running)


def _attended(view: View, config: OracleMoeConfig, tau: float, state: RouterState) -> Tensor:
    """Mean of the earlier tokens that hold most of a token's attention, smoothed over tokens; keeps every hidden state."""
    share = view.probabilities()
    documents = view.documents
    want(share.numpy(), "probabilities", np.float32, (*documents.rank.shape, documents.past + documents.rank.shape[1]))
    top_mass(share.numpy(), documents.grouped_from, documents.past, config.soft_mass)
    hidden = view.hidden_BND.detach().float().cpu()
    past = torch.cat([state["hidden"], hidden], dim=1) if "hidden" in state else hidden
    state["hidden"] = past
    return recent_mean((share @ past).to(view.hidden_BND.device), config.soft_tokens, view, state, "soft")


def _attention_output(view: View, config: OracleMoeConfig, tau: float, state: RouterState) -> Tensor:
    return F.layer_norm(view.attended_BND.float(), view.attended_BND.shape[-1:])


def _prefix(view: View, config: OracleMoeConfig, tau: float, state: RouterState) -> Tensor:
    return mean_of_slots(view.hidden_BND, view.documents.number, state, "prefix", _decay(config.theme_tokens))


def _nothing(view: View, config: OracleMoeConfig, tau: float, state: RouterState) -> Tensor:
    return view.hidden_BND.float()


_THEMES: dict[str, Callable[[View, OracleMoeConfig, float, RouterState], Tensor]] = {
    "token": _token,
    "group": _group,
    "paper-group": _paper_group,
    "attended": _attended,
    "attention-output": _attention_output,
    "prefix": _prefix,
    "document-hash": _nothing,
}
