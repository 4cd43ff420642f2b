"""The learned predictor: a small causal network over token identity, past routing and this token's earlier layers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self, final

import numpy as np

from swapless.errors import TraceValueError, message
from swapless.predict.features import TokenMemory
from swapless.predict.predictor import Fitted, Lead, Predictor, Progress, quiet, token_kind
from swapless.predict.recipe import Recipe
from swapless.predict.vocabulary import Vocabulary
from swapless.trace import Trace

if TYPE_CHECKING:
    from swapless.predict.network import Network

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
    The weights are kept in half precision, so that a saved predictor gives the same bits.
    """

    name = "transformer"
    reads_tokens = True

    def __init__(self, *, sizes: Mapping[str, int] | None = None, checkpoint: Any = None, **recipe: Any) -> None:
        self.sizes, self.checkpoint, self.recipe = dict(sizes or {}), checkpoint, Recipe(**recipe)

    def fit(self, trace: Trace, *, progress: Progress = quiet) -> Self:
        """Train on whole documents; the last ones only decide when to stop."""
        import torch

        from swapless.predict.batches import Documents
        from swapless.predict.network import Network, NetworkShape
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
        with torch.no_grad():
            for value in network.parameters():
                value.copy_(value.half().float())
        self.fitted_ = Fitted.of(trace, vocabulary=kind)
        self.memory_, self.network_ = memory, network.eval()
        return self

    def scores_batch(self, trace: Trace, lead: Lead) -> np.ndarray:
        """Probabilities of the network, document after document."""
        from swapless.predict.batches import Documents
        from swapless.predict.training import logits_of

        self.require_fitted()
        shape = self.network_.shape
        documents = Documents(trace, self.memory_, words=shape.words, buckets=shape.buckets)
        scores = np.empty((len(trace), shape.num_moe_layers, shape.num_experts), np.float32)
        row = 0
        for pieces in documents.plan(range(documents.count), 1024, None):
            (logits,) = logits_of(self.network_, documents.batch(pieces, own=False), (lead,))
            found = logits.sigmoid().permute(1, 0, 2).numpy()
            scores[row : row + len(found)] = found
            row += len(found)
        return scores

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Counts, and weights in half precision."""
        weights = {f"network.{name}": value.half().numpy() for name, value in self.network_.state_dict().items()}
        return {**self.memory_.arrays(), **weights}, {"network": self.network_.shape.settings()}

    @classmethod
    def restore(cls, fitted: Fitted, arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> Self:
        """From counts and weights."""
        made = cls()
        made.fitted_ = fitted
        made.memory_ = TokenMemory.restored(fitted.vocabulary, arrays)
        made.network_ = _network(arrays, settings, made.memory_)
        return made


def _network(arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any], memory: TokenMemory) -> Network:
    import torch

    from swapless.predict.network import Network, NetworkShape

    network = Network(NetworkShape(**settings["network"]), torch.from_numpy(memory.popularity))
    weights = {key.removeprefix("network."): value for key, value in arrays.items() if key.startswith("network.")}
    network.load_state_dict({name: torch.from_numpy(np.array(value)).float() for name, value in weights.items()})
    return network.eval()
