"""All deeper layers' experts from the first MoE layer's choice, which under theme routing says where the text is.

The paper predicts them from the first layer's embeddings. A predictor here sees routing alone, so this one counts, for each MoE
layer, which expert went with which choice of the first layer and which expert of the token before. That needs no training, and
on the tokens where the experts stay it is at least as good as "the same again".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self, final

import numpy as np

from swapless.errors import TraceValueError, message
from swapless.predict.predictor import Fitted, Lead, Predictor, Progress, known_layers, quiet
from swapless.trace import Trace

__all__ = ["FirstLayer"]


@final
class FirstLayer(Predictor):
    """Share of each expert, given the first MoE layer's expert and the same layer's expert of the token before.

    Where the first layer is not known yet, that of the token before stands for it. With K > 1 the shares of all pairs are
    averaged.

    Parameters
    ----------
    prior : float
        Observations that the share given the token before alone is worth, where a pair was rarely seen.

    References
    ----------
    .. [1] Zhou et al., "Oracle-MoE", ICML 2025, PMLR 267, section 5.4.
    """

    name = "first_layer"

    def __init__(self, prior: float = 1.0) -> None:
        self.prior = prior

    def fit(self, trace: Trace, *, progress: Progress = quiet) -> Self:
        """Count triples (first layer's expert, expert before, expert), a MoE layer at a time."""
        if not len(trace):
            raise TraceValueError(message("A predictor cannot learn from an empty trace.", got="0 tokens"))
        E, L = trace.num_experts, trace.num_moe_layers
        ids, before = _places(trace)
        counts = np.zeros((L, E + 1, E + 1, E), np.int64)
        for layer in range(L):
            # The first layer itself is never known when it is asked for.
            first = before[:, 0] if layer == 0 else ids[:, 0]
            for a in first.T:
                for b in before[:, layer].T:
                    for chosen in ids[:, layer].T:
                        real = chosen < E
                        np.add.at(counts[layer], (a[real], b[real], chosen[real]), 1)
            progress("counting", (layer + 1) / L)
        self.counts_ = counts
        self.fitted_ = Fitted.of(trace)
        return self

    def scores_batch(self, trace: Trace, lead: Lead) -> np.ndarray:
        """The shares, times K and at most 1."""
        self.require_fitted()
        ids, before = _places(trace, self.counts_.shape[3])
        K = ids.shape[2]
        scores = np.empty((len(trace), *self.counts_.shape[::3]), np.float32)
        for layer, counts in enumerate(self.counts_):
            share = _shares(counts, self.prior)
            first = ids[:, 0] if known_layers(layer, lead) else before[:, 0]
            pairs = [share[a, b] for a in first.T for b in before[:, layer].T]
            scores[:, layer] = np.minimum(1.0, K * np.mean(pairs, axis=0))
        return scores

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The counts and the prior."""
        return {"counts": self.counts_}, {"prior": self.prior}

    @classmethod
    def restore(cls, fitted: Fitted, arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> Self:
        """From counts and prior."""
        made = cls(settings["prior"])
        made.fitted_, made.counts_ = fitted, arrays["counts"]
        return made


def _places(trace: Trace, experts: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Experts of each token and of the one before it in its document, int64 (T, L, K); E stands for none."""
    E = trace.num_experts if experts is None else experts
    ids = np.where(trace.expert_ids < 0, E, trace.expert_ids).astype(np.int64)
    before = np.full_like(ids, E)
    before[1:] = ids[:-1]
    before[trace.document_offsets[:-1]] = E
    return ids, before


def _shares(counts: np.ndarray, prior: float) -> np.ndarray:
    """Shares (A, B, E) of counts (A, B, E): backed by those given B alone, and these by the shares of all."""
    overall = (counts.sum(axis=(0, 1)) + 1) / (counts.sum() + counts.shape[2])
    by_before = counts.sum(axis=0) + prior * overall
    by_before /= by_before.sum(axis=-1, keepdims=True)
    backed = counts + prior * by_before
    return (backed / backed.sum(axis=-1, keepdims=True)).astype(np.float32)
