"""FineMoE's expert maps: single tokens of the past, found by their text first and by their earlier layers then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self, final

import numpy as np

from swapless.errors import PredictorMismatchError, UsageError, message
from swapless.predict._kernels import multi_hot
from swapless.predict.eam import kept_rows, unit_rows
from swapless.predict.popularity import popularity
from swapless.predict.predictor import Fitted, Lead, Predictor, Progress, known_layers, quiet, token_kind
from swapless.predict.vocabulary import column, letter_groups
from swapless.trace import Trace

OVER = ("expert_ids", "gate_weights", "router_scores")
_ROWS = 2048
_BUCKETS = 512


@final
class ExpertMap(Predictor):
    """Maps (L, E) of training tokens, looked up by text where no layer of the current token is known, else by those layers.

    Parameters
    ----------
    over : {"expert_ids", "gate_weights", "router_scores"}
        What a map holds; the paper takes the router's probabilities (``router_scores``).
    capacity : int
        Maps kept; a new one replaces the one closest to it once there are so many.
    offered : int
        Training tokens, drawn at random, that are offered to the store.
    seed : int
        Of the draw.

    Notes
    -----
    The paper's semantic search compares vectors of the model's embedding layer, which no trace holds; here the letter groups
    of the token's text stand for them (equal ids, where a trace has ids only).

    References
    ----------
    .. [1] Yu et al., "Taming Latency-Memory Trade-Off in MoE-Based LLM Serving via Fine-Grained Expert Offloading", 2025,
       arXiv:2502.05370, section 4 (expert map store, semantic and trajectory search).
    """

    name = "expert_map"
    reads_tokens = True

    def __init__(self, over: str = "expert_ids", capacity: int = 1000, offered: int = 8000, seed: int = 0) -> None:
        if over not in OVER or capacity < 1 or offered < 1:
            got = f"over={over!r}, capacity={capacity}, offered={offered}"
            raise UsageError(message("expert_map cannot be made so.", got=got, allowed=f"over one of {', '.join(OVER)}"))
        self.over, self.capacity, self.offered, self.seed = over, capacity, offered, seed

    def fit(self, trace: Trace, *, progress: Progress = quiet) -> Self:
        """Fill the store."""
        kind = token_kind(trace)
        self.share_ = popularity(trace)
        rng = np.random.default_rng(self.seed)
        rows = np.sort(rng.permutation(len(trace))[: self.offered])
        offered = trace.rows(rows)
        maps = self._maps(offered).reshape(len(rows), -1)
        places = np.arange(len(rows), dtype=np.float32)[:, None]
        kept = kept_rows(np.hstack([maps, places * 1e-12]), self.capacity, progress)  # the place rides along, weightless
        chosen = np.rint(kept[:, -1] * 1e12).astype(np.int64)
        self.maps_ = maps[chosen]
        self.texts_ = _texts(offered.rows(chosen), kind)
        self.fitted_ = Fitted.of(trace, vocabulary=kind)
        return self

    def scores_batch(self, trace: Trace, lead: Lead) -> np.ndarray:
        """The row of the nearest map, scaled so that its K largest values lie within [0, 1]."""
        fitted = self.require_fitted()
        layers, experts = self.share_.shape
        scores = np.empty((len(trace), layers, experts), np.float32)
        store = self.maps_.reshape(-1, layers, experts)
        length = np.cumsum((store**2).sum(axis=2), axis=1)
        for first in range(0, len(trace), _ROWS):
            part = trace.rows(slice(first, first + _ROWS))
            maps, out = self._maps(part), scores[first : first + _ROWS]
            alike = _texts(part, fitted.vocabulary) @ self.texts_.T
            same = alike.max(axis=1) > 0
            by_text = store[alike.argmax(axis=1)]
            product = np.zeros((len(part), len(store)), np.float32)
            known = 0
            for layer in range(layers):
                if known_layers(layer, lead) == 0:
                    out[:, layer] = np.where(same[:, None], by_text[:, layer], self.share_[layer])
                    continue
                while known < known_layers(layer, lead):
                    product += maps[:, known] @ store[:, known].T
                    known += 1
                nearest = (product / np.sqrt(np.maximum(length[:, known - 1], 1e-9))).argmax(axis=1)
                out[:, layer] = store[nearest, layer]
        return np.clip(scores, 0, 1, out=scores)

    def _maps(self, trace: Trace) -> np.ndarray:
        """Maps (T, L, E) of the tokens of a trace."""
        values = getattr(trace, self.over)
        if values is None:
            raise PredictorMismatchError(message(f"expert_map over {self.over} needs a trace that has them."))
        if self.over == "router_scores":
            raised = np.exp(values.astype(np.float32) - values.max(axis=2, keepdims=True).astype(np.float32))
            return raised / raised.sum(axis=2, keepdims=True)
        maps = np.zeros((len(trace), trace.num_moe_layers, self.share_.shape[1]), np.float32)
        if self.over == "expert_ids":
            multi_hot(trace.expert_ids, maps.shape[2], maps)
        else:
            place = np.where(trace.expert_ids >= 0, trace.expert_ids, 0).astype(np.int64)
            weight = np.where(trace.expert_ids >= 0, values, 0).astype(np.float32)
            for k in range(trace.top_k):  # one place at a time: an unused one adds 0 to expert 0
                held = np.take_along_axis(maps, place[..., k : k + 1], 2)
                np.put_along_axis(maps, place[..., k : k + 1], held + weight[..., k : k + 1], 2)
        return maps

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Popularity, maps in half precision where they are counts, and texts."""
        settings = {"over": self.over, "capacity": self.capacity, "offered": self.offered, "seed": self.seed}
        return {"popularity": self.share_, "maps": self.maps_, "texts": self.texts_}, settings

    @classmethod
    def restore(cls, fitted: Fitted, arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> Self:
        """From popularity, maps and texts."""
        made = cls(**settings)
        made.fitted_, made.share_ = fitted, arrays["popularity"]
        made.maps_, made.texts_ = arrays["maps"], arrays["texts"]
        return made


def _texts(trace: Trace, kind: Any) -> np.ndarray:
    """Vectors of length 1 of the tokens' texts, float32 (T, buckets)."""
    words = column(trace, kind)
    groups = letter_groups([str(word) for word in words], _BUCKETS)
    if kind == "token_id":
        groups[:, 2:] = _BUCKETS  # the form and the whole, no part of a number
        groups[:, :2] = np.array(words, np.int64)[:, None] % _BUCKETS
    vectors = np.zeros((len(words), _BUCKETS + 1), np.float32)
    np.add.at(vectors, (np.arange(len(words))[:, None], groups), 1)
    return unit_rows(vectors[:, :_BUCKETS])
