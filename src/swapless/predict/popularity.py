"""The same experts for every token: those used most in training. The floor that every other predictor must clear."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self, final

import numpy as np

from swapless.errors import TraceValueError, message
from swapless.predict.predictor import Fitted, Lead, Predictor, Progress, quiet
from swapless.trace import Trace


def popularity(trace: Trace) -> np.ndarray:
    """Share of the tokens that chose each expert, float32 (L, E).

    Raises
    ------
    TraceValueError
        A trace without tokens.
    """
    if not len(trace):
        raise TraceValueError(message("A predictor cannot learn from an empty trace.", got="0 tokens"))
    layers, experts = trace.num_moe_layers, trace.num_experts
    share = np.empty((layers, experts), np.float32)
    for layer in range(layers):
        ids = trace.expert_ids[:, layer]
        share[layer] = np.bincount(ids[ids >= 0], minlength=experts)[:experts] / len(trace)
    return share


@final
class Popularity(Predictor):
    """Each expert's share of the training tokens."""

    name = "popularity"

    def fit(self, trace: Trace, *, progress: Progress = quiet) -> Self:
        """Count."""
        self.share_ = popularity(trace)
        self.fitted_ = Fitted.of(trace)
        return self

    def scores_batch(self, trace: Trace, lead: Lead) -> np.ndarray:
        """The shares, whatever the token."""
        self.require_fitted()
        return np.broadcast_to(self.share_, (len(trace), *self.share_.shape))

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The shares."""
        return {"popularity": self.share_}, {}

    @classmethod
    def restore(cls, fitted: Fitted, arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> Self:
        """From the shares."""
        made = cls()
        made.fitted_, made.share_ = fitted, arrays["popularity"]
        return made
