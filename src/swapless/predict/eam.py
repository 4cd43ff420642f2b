"""MoE-Infinity's expert activation matrices: the request so far, matched against those of past requests."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Self, final

import numpy as np

from swapless.arrays import want, want_ids
from swapless.errors import UsageError, message
from swapless.predict._kernels import add_routing
from swapless.predict._nearest import keep, lengths, matrix_scores
from swapless.predict.popularity import popularity
from swapless.predict.predictor import Fitted, Lead, Predictor, Progress, known_layers, quiet
from swapless.trace import Trace

_ROWS = 256


@final
class Eam(Predictor):
    """Activation matrices (L, E) of training documents; the nearest ones to the document so far say what comes.

    Parameters
    ----------
    neighbours : int
        How many matrices are summed; the paper takes the closest.
    capacity : int
        Matrices kept. A new one replaces the one closest to it once there are so many.

    Notes
    -----
    The document so far is the sum over its finished tokens and the known layers of the current one; closeness is the cosine
    of flattened matrices, and of two that are as close the earlier one comes first. Without any evidence popularity speaks. The
    paper's factor for the distance of a layer orders reads of different layers and cannot change the order within one, so it is
    left out.

    References
    ----------
    .. [1] Xue et al., "MoE-Infinity", 2024, arXiv:2401.14361, section 5 (EAM, EAMC, PredictEAM).
    """

    name = "eam"

    def __init__(self, neighbours: int = 1, capacity: int = 1000) -> None:
        if neighbours < 1 or capacity < neighbours:
            got = f"neighbours={neighbours}, capacity={capacity}"
            raise UsageError(message("eam needs 1 <= neighbours <= capacity.", got=got))
        self.neighbours, self.capacity = neighbours, capacity

    def fit(self, trace: Trace, *, progress: Progress = quiet) -> Self:
        """Keep one matrix a document."""
        self.share_ = popularity(trace)
        trace = trace.grouped()
        offsets = trace.document_offsets
        matrices = np.zeros((len(offsets) - 1, self.share_.size), np.float32)
        add_routing(matrices, np.repeat(np.arange(len(matrices)), np.diff(offsets)), trace.expert_ids, trace.num_experts)
        self.matrices_ = matrices[kept_places(matrices, self.capacity, progress)]
        self.fitted_ = Fitted.of(trace)
        return self

    def scores_batch(self, trace: Trace, lead: Lead) -> np.ndarray:
        """K times the nearest matrices' share of each expert, at most 1."""
        top_k = self.require_fitted().top_k
        layers, experts = self.share_.shape
        scores = np.empty((len(trace), layers, experts), np.float32)
        by_key, length = np.ascontiguousarray(self.matrices_.T), lengths(self.matrices_)
        known = np.array([known_layers(layer, lead) for layer in range(layers)])
        want_ids(want(trace.expert_ids, "expert_ids", np.int16, (None, layers, None)), experts)
        for start, end in itertools.pairwise(trace.document_offsets.tolist()):
            stored = (by_key, length, self.matrices_)
            matrix_scores(trace.expert_ids[start:end], known, *stored, self.share_, self.neighbours, top_k, scores[start:end])
        return scores

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Popularity and matrices."""
        settings = {"neighbours": self.neighbours, "capacity": self.capacity}
        return {"popularity": self.share_, "matrices": self.matrices_}, settings

    @classmethod
    def restore(cls, fitted: Fitted, arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> Self:
        """From popularity and matrices."""
        made = cls(**settings)
        made.fitted_, made.share_, made.matrices_ = fitted, arrays["popularity"], arrays["matrices"]
        return made


def kept_places(rows: np.ndarray, capacity: int, progress: Progress) -> np.ndarray:
    """The rows that are left, int64, when each one beyond ``capacity`` replaces the nearest one of those kept."""
    kept = np.arange(min(capacity, len(rows)))
    by_key, length = np.ascontiguousarray(rows[:capacity].T, np.float32), lengths(rows[:capacity])
    for first in range(capacity, len(rows), _ROWS):
        keep(rows, first, min(first + _ROWS, len(rows)), by_key, length, kept)
        progress("filling the store", first / len(rows))
    return kept
