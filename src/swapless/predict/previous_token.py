"""The experts of the token before, once more; a fading sum of older ones breaks the ties."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Self, final

import numpy as np

from swapless.predict._kernels import document_past
from swapless.predict.popularity import popularity
from swapless.predict.predictor import Fitted, Lead, Predictor, Progress, quiet
from swapless.trace import Trace


@final
class PreviousToken(Predictor):
    """Fading sum of the document's finished tokens, the last one weighing most; popularity at the start.

    Parameters
    ----------
    fade : float
        Weight of a token over that of its successor; below 1/2 the last token's experts always come first.
    """

    name = "previous_token"

    def __init__(self, fade: float = 0.4) -> None:
        self.fade = fade

    def fit(self, trace: Trace, *, progress: Progress = quiet) -> Self:
        """Count popularity, for the first tokens."""
        self.share_ = popularity(trace)
        self.fitted_ = Fitted.of(trace)
        return self

    def scores_batch(self, trace: Trace, lead: Lead) -> np.ndarray:
        """The fading sums, with what a short past leaves open filled by popularity."""
        self.require_fitted()
        layers, experts = self.share_.shape
        scores = np.empty((len(trace), layers * experts), np.float32)
        offsets, fade = trace.document_offsets, np.array([self.fade], np.float32)
        for start, end in itertools.pairwise(offsets.tolist()):
            before = np.zeros((end - start, layers * experts), np.float32)
            document_past(trace.expert_ids[start:end], experts, fade, before, scores[None, start:end])
            left = np.cumprod(np.concatenate([np.ones(1, np.float32), np.repeat(fade, end - start - 1)]))
            scores[start:end] += left[:, None] * self.share_.reshape(-1)
        return scores.reshape(-1, layers, experts)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Popularity and the fade."""
        return {"popularity": self.share_}, {"fade": self.fade}

    @classmethod
    def restore(cls, fitted: Fitted, arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> Self:
        """From popularity and the fade."""
        made = cls(settings["fade"])
        made.fitted_, made.share_ = fitted, arrays["popularity"]
        return made
