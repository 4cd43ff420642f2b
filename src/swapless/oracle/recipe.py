"""All that decides a training run besides corpus and machine."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from swapless.errors import UsageError, message
from swapless.oracle.config import OracleMoeConfig, of_size

__all__ = ["Recipe"]

_ROUTER_VALUES = (
    "group_fraction",
    "epsilon",
    "space_rank",
    "centre",
    "theme_tokens",
    "memory_tokens",
    "change_budget",
    "sticky_weight",
    "soft_mass",
    "soft_tokens",
)
"""What the router after the fork alone looks at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One run. Twins differ in ``router`` (and ``changes``) alone and see the same tokens in the same order.

    Parameters
    ----------
    size, router : str
        A configuration of the package, and the router it gets after the warm-up.
    changes : dict
        Values that override the configuration's.
    steps : int
        Optimiser steps in all.
    warmup : str
        What is trained before the fork: ``"dense"`` (each expert begins as a copy of the feed-forward) or ``"switch"`` (a
        learned gate, the paper's way).
    warmup_steps : int
        Steps before the fork.
    rows, window_tokens : int
        Shape of a batch, over all processes.
    joined_share : float
        Share of the rows that are made of three texts of different domains.
    peak_lr, adamw_lr_share, gate_lr_share : float
        Peak of Muon's rate (hidden matrices), and AdamW's share of it, for embeddings and vectors, and for gates.
    rising_steps : int
        Over which the learning rate rises; then it falls to ``final_lr_share`` of its peak along a cosine.
    fit_batches : int
        Batches that the spaces are fitted to.
    precision : str
        Of the products in training: ``"bf16"`` (mixed, weights stay in float32) or ``"no"``.
    expert_map : str
        With a ``"switch"`` warm-up: ``"match"`` gives each region the expert that its tokens used most, ``"same"`` leaves them.

    Raises
    ------
    UsageError
        A warm-up that is neither, or longer than the run, or shares outside [0, 1].
    """

    size: str = "tiny"
    router: str = "oracle"
    changes: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    steps: int = 1200
    warmup: str = "dense"
    warmup_steps: int = 300
    rows: int = 4
    window_tokens: int = 512
    joined_share: float = 0.25
    domain_power: float = 0.5
    peak_lr: float = 0.02
    adamw_lr_share: float = 0.2
    gate_lr_share: float = 0.02
    final_lr_share: float = 0.05
    rising_steps: int = 100
    weight_decay: float = 0.1
    balance: float = 0.05
    max_grad_norm: float = 1.0
    fit_batches: int = 24
    precision: str = "bf16"
    expert_map: str = "match"

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        choices = {"warmup": ("dense", "switch"), "expert_map": ("match", "same"), "precision": ("bf16", "no")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UsageError(message(f"{name} of a recipe.", got=getattr(self, name), allowed=" or ".join(allowed)))
        if not 0 < self.warmup_steps <= self.steps:
            raise UsageError(
                message(
                    "A router is fitted after the warm-up.",
                    got=f"warmup_steps {self.warmup_steps}",
                    allowed=f"1 to {self.steps}",
                )
            )
        if not 0 <= self.joined_share <= 1:
            raise UsageError(message("joined_share is a share.", got=self.joined_share, allowed="0 to 1"))

    def config(self, **tokens: Any) -> OracleMoeConfig:
        """The model after the fork; ``tokens`` are the tokenizer's numbers."""
        return of_size(self.size, router=self.router, **self.changes | tokens)

    def warmup_config(self, **tokens: Any) -> OracleMoeConfig:
        """The model before the fork."""
        return of_size(self.size, router=self._warmup_router, **self._warmup_changes | tokens)

    @property
    def _warmup_router(self) -> str:
        return "dense" if "dense" in (self.router, self.warmup) else "switch"

    @property
    def _warmup_changes(self) -> dict[str, Any]:
        left_out = {*_ROUTER_VALUES, *(("moe_blocks", "num_experts") if self._warmup_router == "dense" else ())}
        return {name: value for name, value in self.changes.items() if name not in left_out}

    @property
    def warmup_key(self) -> str:
        """Runs of the same key have the same warm-up, bit for bit, and may share it."""
        gate = ("balance", "gate_lr_share") if self._warmup_router == "dense" else ()
        after = ("router", "fit_batches", "expert_map", *gate)
        same = {name: value for name, value in asdict(self).items() if name not in after}
        same |= {"warmup": self._warmup_router, "changes": self._warmup_changes}
        return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:12]

    def learning_rate(self, step: int) -> float:
        """Rate of the step after ``step`` finished ones."""
        rising = min(1.0, (step + 1) / self.rising_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))
        return self.peak_lr * rising * (self.final_lr_share + (1 - self.final_lr_share) * cosine)
