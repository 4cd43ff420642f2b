"""What the token itself was routed to in training, whatever stands around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self, final

import numpy as np

from swapless.predict.counts import CountTable
from swapless.predict.popularity import popularity
from swapless.predict.predictor import Fitted, Lead, Predictor, Progress, quiet, token_kind
from swapless.predict.vocabulary import Vocabulary
from swapless.trace import Trace

SMOOTHING = 1.0
"""Popularity counts as so many occurrences of every token."""


@final
class TokenPrior(Predictor):
    """Smoothed share of a token's training occurrences that chose each expert; popularity for a token never seen."""

    name = "token_prior"
    reads_tokens = True

    def fit(self, trace: Trace, *, progress: Progress = quiet) -> Self:
        """Count by text, or by id where the trace has no texts."""
        kind = token_kind(trace)
        self.share_ = popularity(trace)
        self.vocabulary_ = Vocabulary.of(trace, kind)
        self.table_ = CountTable.of(self.vocabulary_.encode(trace), trace.expert_ids, trace.num_experts)
        self.fitted_ = Fitted.of(trace, vocabulary=kind)
        return self

    def scores_batch(self, trace: Trace, lead: Lead) -> np.ndarray:
        """The shares of each token."""
        self.require_fitted()
        totals, counts = self.table_.take(self.table_.find(self.vocabulary_.encode(trace)))
        counts += np.float32(SMOOTHING) * self.share_.reshape(-1)
        counts /= (totals + np.float32(SMOOTHING))[:, None]
        return counts.reshape(-1, *self.share_.shape)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Vocabulary, popularity and counts."""
        return {**self.vocabulary_.arrays(), "popularity": self.share_, **self.table_.arrays("single")}, {}

    @classmethod
    def restore(cls, fitted: Fitted, arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> Self:
        """From vocabulary, popularity and counts."""
        made = cls()
        made.fitted_, made.share_ = fitted, arrays["popularity"]
        made.vocabulary_ = Vocabulary.restored(fitted.vocabulary or "token", arrays)
        made.table_ = CountTable.restored("single", arrays, made.share_.size)
        return made
