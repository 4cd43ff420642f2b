"""The router: from a token's theme to its K experts, by a learned gate, the fitted space, or a hash. One class, all by name."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swapless.arrays import want, want_ids
from swapless.errors import NotFittedError, message
from swapless.oracle._kernels import choose
from swapless.oracle.config import OracleMoeConfig
from swapless.oracle.space import FittedSpace, OracleSpace
from swapless.oracle.state import RouterState
from swapless.oracle.theme import View, recent_mean, theme_of

__all__ = ["OracleMoeRouter", "Routing"]


_BALANCE_STEP = 0.01
"""How much of a region's mean squared radius its bias moves a step, at twice its share of the load."""


class Routing(NamedTuple):
    """``scores`` (T, E) before the choice, ``weights`` (T, K) and ``ids`` (T, K) of the chosen experts; T runs over B x N."""

    scores: Tensor
    weights: Tensor
    ids: Tensor


class OracleMoeRouter(nn.Module):
    """Chooses the experts of one MoE layer.

    Parameters
    ----------
    config : OracleMoeConfig
        ``router`` decides what is looked at and how it is chosen.
    moe_layer : int
        Its number among the MoE layers.

    Attributes
    ----------
    tau : Tensor
        Relative threshold of the groups, NaN until fitted.
    stay : Tensor
        Bonus that the experts of the token before have, found in training so that the change budget is kept; else 0.
    load : Tensor
        Running share of each expert in training, for balance.
    """

    tau: Tensor
    stay: Tensor
    load: Tensor

    def __init__(self, config: OracleMoeConfig, moe_layer: int) -> None:
        super().__init__()
        self.config = config
        self.moe_layer = moe_layer
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.num_experts
        self.remembers = config.router == "theme-gate" and config.memory_tokens > 0
        choice = config.kind.choice
        if choice == "gate":
            width = config.hidden_size * (2 if self.remembers else 1)
            self.weight = nn.Parameter(torch.zeros(config.num_experts, width))
            self.bias = nn.Parameter(torch.zeros(config.num_experts))
        elif choice == "centroids":
            self.space = OracleSpace(config.hidden_size, config.space_rank, config.num_experts)
        if choice != "hash":
            self.register_buffer("load", torch.full((config.num_experts,), 1 / config.num_experts))
            self.register_buffer("stay", torch.zeros(()))
        if config.kind.theme == "group":
            self.register_buffer("tau", torch.tensor(torch.nan))

    @property
    def needs_fit(self) -> bool:
        """Whether this kind of router is fitted to data before it works."""
        return hasattr(self, "space") or hasattr(self, "tau")

    @property
    def fitted(self) -> bool:
        """Whether it has all that it needs."""
        return not (hasattr(self, "tau") and bool(self.tau.isnan())) and not (hasattr(self, "space") and not self.space.fitted)

    @torch.no_grad()
    def put(self, tau: float, fitted: FittedSpace) -> None:
        """Take over a fit: the space itself, or for a gate its nearest-centroid rule as first weights.

        Distances to centroids differ by a linear function of the theme, so that a linear gate can begin as the oracle and learn
        on from there.
        """
        if hasattr(self, "tau"):
            self.tau.fill_(tau)
        if hasattr(self, "space"):
            self.space.put(fitted)
            return
        projection, offset, centroids, bias = (torch.from_numpy(array) for array in fitted[:4])
        scale = 1 / max(fitted.distance**2, 1e-12)
        self.weight.zero_()
        self.weight[:, : self.config.hidden_size] = 2 * scale * centroids @ projection.T
        self.bias.copy_(-scale * (2 * centroids @ offset + centroids.square().sum(dim=1) + bias))

    def forward(self, view: View, state: RouterState) -> Routing:
        """Choose for the tokens of one call; ``state`` is brought up to date.

        Raises
        ------
        NotFittedError
            The groups or the space were never fitted.
        """
        if not self.fitted:
            raise NotFittedError(
                message(
                    f"The router {self.config.router!r} has no fitted space.",
                    where=f"MoE layer {self.moe_layer}",
                    step="Fit it after the warm-up: swapless oracle fit, or train with swapless oracle train.",
                )
            )
        scores_BNE = self._scores(view, state)
        ids_BNK = self._choose(scores_BNE, view.documents.restart, state)
        ids_BNK = ids_BNK.to(scores_BNE.device)
        weights_BNK = self._weights(scores_BNE, ids_BNK).to(view.hidden_BND.dtype)
        return Routing(scores_BNE.flatten(0, 1), weights_BNK.flatten(0, 1), ids_BNK.flatten(0, 1))

    def _scores(self, view: View, state: RouterState) -> Tensor:
        choice = self.config.kind.choice
        if choice == "hash":
            expert = torch.from_numpy((view.documents.hashed + 7919 * self.moe_layer) * 2654435761 // 65536 % self.num_experts)
            return F.one_hot(expert, self.num_experts).float().to(view.hidden_BND.device)
        tau = float(self.tau) if hasattr(self, "tau") else float("nan")
        if choice == "centroids":
            with torch.no_grad():
                return self.space.scores(theme_of(view, self.config, tau, state))
        theme = theme_of(view, self.config, tau, state)
        if self.remembers:
            theme = torch.cat([theme, recent_mean(view.hidden_BND, self.config.memory_tokens, view, state, "recent")], dim=-1)
        return F.linear(theme, self.weight.float(), self.bias.float())

    def _choose(self, scores_BNE: Tensor, restart: np.ndarray, state: RouterState) -> Tensor:
        scores = scores_BNE.detach().float().cpu().numpy()
        B, N, _ = scores.shape
        previous = state["chosen"].numpy().copy() if "chosen" in state else np.full((B, self.top_k), -1, np.int64)
        # A cache may be of another model, and the loop trusts what it holds.
        want(scores, "scores", np.float32, (B, N, self.num_experts))
        want(restart, "restart", np.int64, (B, N))
        want_ids(want(previous, "experts of the token before", np.int64, (B, self.top_k)), self.num_experts)
        ids = np.empty((B, N, self.top_k), np.int64)
        choose(scores, restart, float(self.stay) if hasattr(self, "stay") else 0.0, previous, ids)
        state["chosen"] = torch.from_numpy(previous)
        return torch.from_numpy(ids)

    def _weights(self, scores_BNE: Tensor, ids_BNK: Tensor) -> Tensor:
        """Weights of value 1 (K = 1) that pass their gradient on to the gate, or a softmax over the chosen (K > 1)."""
        if self.top_k > 1:
            return scores_BNE.gather(-1, ids_BNK).softmax(dim=-1)
        if not scores_BNE.requires_grad:
            return torch.ones_like(ids_BNK, dtype=scores_BNE.dtype)
        chosen = scores_BNE.log_softmax(dim=-1).gather(-1, ids_BNK)
        return (chosen - chosen.detach()).exp()

    @torch.no_grad()
    def observe(self, ids_TK: Tensor, restart_T: Tensor) -> None:
        """After a training step: follow the load, and move ``stay`` towards the change budget. Changes the buffers.

        Regions of a space also grow or shrink a little, so that no expert is left out as the model moves on from its fit.
        """
        if not hasattr(self, "stay"):
            return
        real = restart_T >= 0
        counts = torch.bincount(ids_TK[real].flatten(), minlength=self.num_experts)
        self.load.lerp_((counts / counts.sum().clamp(min=1)).to(self.load), 0.05)
        unit = 1.0
        if hasattr(self, "space"):
            unit = float(self.space.spread)
            self.space.bias.add_((self.num_experts * self.load - 1).clamp(-1, 1), alpha=_BALANCE_STEP * unit)
        if self.config.change_budget is not None:
            spent = float(changes(ids_TK, restart_T))
            budget = self.config.change_budget
            self.stay.add_(unit * min(0.05, max(-0.05, 0.05 * (spent - budget) / budget))).clamp_(min=0)


def changes(ids_TK: Tensor, restart_T: Tensor) -> Tensor:
    """Experts a token that the token before it did not use, mean over tokens that have one before them in their document."""
    follows = restart_T[1:] == 0
    new = (ids_TK[1:, :, None] != ids_TK[:-1, None, :]).all(dim=2).sum(dim=1)
    return new[follows].float().mean() if bool(follows.any()) else new.new_zeros((), dtype=torch.float32)
