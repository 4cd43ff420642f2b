"""MoE-Infinity's expert activation matrices: the request so far, matched against those of past requests."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Self, final

import numpy as np

from swapless.errors import UsageError, message
from swapless.predict._kernels import add_routing, multi_hot
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
    of flattened matrices. Without any evidence popularity speaks. The paper's factor for the distance of a layer orders reads
    of different layers and cannot change the order within one, so it is left out.

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
        self.matrices_ = kept_rows(matrices, self.capacity, progress)
        self.fitted_ = Fitted.of(trace)
        return self

    def scores_batch(self, trace: Trace, lead: Lead) -> np.ndarray:
        """K times the nearest matrices' share of each expert, at most 1."""
        self.require_fitted()
        scores = np.empty((len(trace), *self.share_.shape), np.float32)
        unit = unit_rows(self.matrices_)
        for start, end in itertools.pairwise(trace.document_offsets.tolist()):
            carried = np.zeros(self.share_.size, np.float32)
            for first in range(start, end, _ROWS):
                rows = slice(first, min(first + _ROWS, end))
                carried = self._rows(trace.expert_ids[rows], lead, unit, carried, scores[rows])
        return scores

    def _rows(self, ids: np.ndarray, lead: Lead, unit: np.ndarray, carried: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Scores of some rows into ``out``; ``carried`` is the matrix of the document before them, returned after them."""
        layers, experts = self.share_.shape
        chosen = np.zeros((len(ids), layers, experts), np.float32)
        multi_hot(ids, experts, chosen)
        whole = np.cumsum(chosen.reshape(len(ids), -1), axis=0)
        before = carried + np.vstack([np.zeros_like(whole[:1]), whole[:-1]])
        closeness = before @ unit.T
        evidence = before.sum(axis=1) > 0
        known = 0
        for layer in range(layers):
            for new in range(known, known_layers(layer, lead)):
                closeness += chosen[:, new] @ unit[:, new * experts : (new + 1) * experts].T
                evidence |= chosen[:, new].sum(axis=1) > 0
            known = max(known, known_layers(layer, lead))
            rows = self.matrices_[:, layer * experts : (layer + 1) * experts]
            if self.neighbours == 1:
                found = rows[closeness.argmax(axis=1)]
            else:
                few = min(self.neighbours, len(rows))
                found = rows[np.argpartition(-closeness, few - 1, axis=1)[:, :few]].sum(axis=1)
            total = found.sum(axis=1, keepdims=True)
            share = found * (self.require_fitted().top_k / np.maximum(total, 1))
            out[:, layer] = np.where(evidence[:, None], np.minimum(share, 1), self.share_[layer])
        return carried + whole[-1]

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


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


def kept_rows(rows: np.ndarray, capacity: int, progress: Progress) -> np.ndarray:
    """The rows left when each one beyond ``capacity`` replaces the closest one of those kept."""
    kept = rows[:capacity].copy()
    unit = unit_rows(kept)
    for number in range(capacity, len(rows)):
        new = unit_rows(rows[number : number + 1])[0]
        place = int((unit @ new).argmax())
        kept[place], unit[place] = rows[number], new
        if number % 256 == 0:
            progress("filling the store", number / len(rows))
    return kept
