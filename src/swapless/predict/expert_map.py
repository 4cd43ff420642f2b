"""FineMoE's expert maps: single tokens of the past, found by their text first and by their earlier layers then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self, final

import numpy as np

from swapless.arrays import want, want_ids
from swapless.errors import PredictorMismatchError, UsageError, message
from swapless.predict._kernels import multi_hot
from swapless.predict._nearest import lengths, map_places, softmax, text_places
from swapless.predict.eam import kept_places
from swapless.predict.popularity import popularity
from swapless.predict.predictor import Fitted, Lead, Predictor, Progress, known_layers, quiet, token_kind
from swapless.predict.vocabulary import column, letter_groups
from swapless.trace import Trace

OVER = ("expert_ids", "gate_weights", "router_scores")
_ROWS = 2048
BUCKETS = 512
"""Of letter groups, or of ids."""


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
        maps = self._maps(offered)
        chosen = kept_places(maps.reshape(len(rows), -1), self.capacity, progress)
        self.maps_ = maps[chosen]
        self.texts_ = _texts(column(offered.rows(chosen), kind), kind)
        self.fitted_ = Fitted.of(trace, vocabulary=kind)
        return self

    def scores_batch(self, trace: Trace, lead: Lead) -> np.ndarray:
        """The row of the nearest map, at most 1 an expert; the earlier one of two maps that are as close."""
        fitted = self.require_fitted()
        layers, experts = self.share_.shape
        scores = np.empty((len(trace), layers, experts), np.float32)
        known = np.array([known_layers(layer, lead) for layer in range(layers)])
        store = self.maps_.reshape(-1, layers, experts)
        by_key = np.ascontiguousarray(store.reshape(len(store), -1).T, np.float32)
        squares = np.cumsum((by_key.astype(np.float64) ** 2).reshape(layers, experts, -1).cumsum(axis=1)[:, -1], axis=0)
        by_text = self._by_text(trace, fitted.vocabulary)
        for first in range(0, len(trace), _ROWS):
            rows = slice(first, min(first + _ROWS, len(trace)))
            places = np.empty((rows.stop - first, layers), np.int64)
            map_places(self._maps(trace.rows(rows)), known, by_key, squares, places)
            places[:, known == 0] = by_text[rows, None]
            found = store[places, np.arange(layers)]
            scores[rows] = np.where(places[..., None] >= 0, np.clip(found, 0, 1), self.share_)
        return scores

    def _by_text(self, trace: Trace, kind: Any) -> np.ndarray:
        """The map of the nearest text for each token, int64 (T,), -1 where no text has anything of it."""
        words, texts = column(trace, kind), np.ascontiguousarray(self.texts_.T)
        distinct = {word: place for place, word in enumerate(dict.fromkeys(words))}
        places = np.empty(len(distinct), np.int64)
        text_places(_texts(list(distinct), kind), texts, lengths(self.texts_), places)
        return places[[distinct[word] for word in words]]

    def _maps(self, trace: Trace) -> np.ndarray:
        """Maps (T, L, E) of the tokens of a trace."""
        values = getattr(trace, self.over)
        if values is None:
            raise PredictorMismatchError(message(f"expert_map over {self.over} needs a trace that has them."))
        layers, experts = self.share_.shape
        want_ids(want(trace.expert_ids, "expert_ids", np.int16, (None, layers, None)), experts)
        if self.over == "router_scores":
            shares = np.empty(values.shape, np.float32)
            softmax(values.astype(np.float32), shares)
            return shares
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
        """Popularity, maps (one byte a place where they are 0 and 1), and letter groups of texts."""
        settings = {"over": self.over, "capacity": self.capacity, "offered": self.offered, "seed": self.seed}
        maps = self.maps_.astype(np.uint8) if self.over == "expert_ids" else self.maps_
        return {"popularity": self.share_, "maps": maps, "texts": self.texts_}, settings

    @classmethod
    def restore(cls, fitted: Fitted, arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> Self:
        """From popularity, maps and texts."""
        made = cls(**settings)
        made.fitted_, made.share_ = fitted, arrays["popularity"]
        made.maps_, made.texts_ = arrays["maps"].astype(np.float32), arrays["texts"]
        return made


def _texts(words: list[Any], kind: Any) -> np.ndarray:
    """How often each letter group stands in each text, uint8 (len(words), buckets)."""
    groups = letter_groups([str(word) for word in words], BUCKETS)
    if kind == "token_id":
        groups[:, 2:] = BUCKETS  # the form and the whole, no part of a number
        groups[:, :2] = np.array(words, np.int64)[:, None] % BUCKETS
    counts = np.zeros((len(words), BUCKETS + 1), np.uint8)
    np.add.at(counts, (np.arange(len(words))[:, None], groups), 1)
    return np.ascontiguousarray(counts[:, :BUCKETS])
