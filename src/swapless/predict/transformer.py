"""The learned predictor: a small causal network over token identity, past routing and this token's earlier layers."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from typing import Any, Self, final

import numpy as np

from swapless.errors import TraceValueError, message
from swapless.predict.features import TokenMemory
from swapless.predict.network_scores import score_document
from swapless.predict.network_shape import NetworkShape, Weights
from swapless.predict.predictor import Fitted, Lead, Predictor, Progress, quiet, token_kind
from swapless.predict.recipe import Recipe
from swapless.predict.vocabulary import MOST_GROUPS, Vocabulary, column, letter_groups
from swapless.trace import Trace
from swapless.trace.parallel import spread

SEEN_OFTEN = 3
"""Occurrences from which a word has a vector of its own."""


@final
class Transformer(Predictor):
    """One network for every lead; see :mod:`swapless.predict.network`.

    Parameters
    ----------
    epochs, minutes, seed, ...
        As :class:`swapless.predict.recipe.Recipe` has them.
    sizes : dict, optional
        As :class:`swapless.predict.network.NetworkShape` has them: ``width``, ``hidden``, ``window``, ...
    checkpoint : path, optional
        Training writes it, and goes on from it.

    Notes
    -----
    The weights are kept in half precision, so that a saved predictor gives the same bits; it gives them on every machine.
    Training is torch's, whose sums depend on processor, version and number of threads: trained elsewhere it is another one.
    """

    name = "transformer"
    reads_tokens = True

    def __init__(self, *, sizes: Mapping[str, int] | None = None, checkpoint: Any = None, **recipe: Any) -> None:
        self.sizes, self.checkpoint, self.recipe = dict(sizes or {}), checkpoint, Recipe(**recipe)

    def fit(self, trace: Trace, *, progress: Progress = quiet) -> Self:
        """Train on whole documents; the last ones only decide when to stop."""
        import torch

        from swapless.predict.batches import Documents
        from swapless.predict.network import Network
        from swapless.predict.training import train

        kind = token_kind(trace)
        if not len(trace):
            raise TraceValueError(message("A predictor cannot learn from an empty trace.", got="0 tokens"))
        recipe = self.recipe
        trace = trace.grouped()
        progress("counting", 0.0)
        memory = TokenMemory.of(trace, Vocabulary.of(trace, kind))
        shape = NetworkShape(
            num_moe_layers=trace.num_moe_layers,
            num_experts=trace.num_experts,
            top_k=trace.top_k,
            words=1 + int((memory.single.totals >= SEEN_OFTEN).sum()),
            **self.sizes,
        )
        torch.manual_seed(recipe.seed)
        network = Network(shape, torch.from_numpy(memory.popularity))
        documents = Documents(trace, memory, words=shape.words, buckets=shape.buckets)
        digest = hashlib.sha256(np.ascontiguousarray(trace.expert_ids).tobytes()).hexdigest()
        self.course_ = train(network, documents, recipe, progress=progress, checkpoint=self.checkpoint, identity=digest)
        self.weights_ = {name: value.half().numpy() for name, value in network.state_dict().items()}
        self.fitted_ = Fitted.of(trace, vocabulary=kind)
        self.memory_, self.shape_ = memory, shape
        return self

    def scores_batch(self, trace: Trace, lead: Lead) -> np.ndarray:
        """Probabilities of the network, documents side by side."""
        fitted = self.require_fitted()
        weights = Weights(self.shape_, self.weights_, narrow=False)
        words, (text, groups) = self.memory_.vocabulary.encode(trace), self._texts(trace, fitted.vocabulary)
        scores = np.empty((len(trace), self.shape_.num_moe_layers, self.shape_.num_experts), np.float32)

        def work(rows: slice) -> np.ndarray:
            ids = trace.expert_ids[rows]
            return score_document(weights, self.memory_.inputs(ids, words[rows]), groups[text[rows]], ids, lead)

        for rows, found in spread(work, itertools.starmap(slice, itertools.pairwise(trace.document_offsets.tolist()))):
            scores[rows] = found
        return scores

    def _texts(self, trace: Trace, kind: Any) -> tuple[np.ndarray, np.ndarray]:
        """Each token's place (T,) among the letter groups (N, G) of the different texts."""
        if kind == "token_id":
            return np.zeros(len(trace), np.int64), np.full((1, MOST_GROUPS), self.shape_.buckets, np.int64)
        words = column(trace, kind)
        distinct = {word: place for place, word in enumerate(dict.fromkeys(words))}
        return np.array([distinct[word] for word in words], np.int64), letter_groups(list(distinct), self.shape_.buckets)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Counts, and weights in half precision."""
        weights = {f"network.{name}": value for name, value in self.weights_.items()}
        return {**self.memory_.arrays(), **weights}, {"network": self.shape_.settings()}

    @classmethod
    def restore(cls, fitted: Fitted, arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> Self:
        """From counts and weights."""
        made = cls()
        made.fitted_, made.shape_ = fitted, NetworkShape(**settings["network"])
        made.memory_ = TokenMemory.restored(fitted.vocabulary, arrays)
        made.weights_ = {key.removeprefix("network."): value for key, value in arrays.items() if key.startswith("network.")}
        return made
