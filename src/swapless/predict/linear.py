"""One logistic regression a MoE layer: the plainest learned predictor, and the bar for every other."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Self, final

import numpy as np

from swapless.errors import PredictorMismatchError, message
from swapless.predict._linear_kernels import FED_BLOCKS, OWN_LAYERS, linear_scores, logits_of, train_layer
from swapless.predict.batches import Documents
from swapless.predict.features import TokenMemory
from swapless.predict.popularity import popularity
from swapless.predict.predictor import Fitted, Lead, Predictor, Progress, check_lead, known_layers, quiet, token_kind
from swapless.predict.vocabulary import Vocabulary
from swapless.trace import Trace
from swapless.trace.parallel import spread


@final
class Linear(Predictor):
    """Reads the token's prior, the last token's experts, a fading sum, and the two latest known layers of this token.

    Parameters
    ----------
    leads : sequence of leads
        One set of weights each. A lead in between is served by the next larger one, which sees less.
    epochs, batch_tokens, learning_rate, seed : number
        Of its training by Adam.

    Notes
    -----
    MoE layers and leads have nothing in common, so they are trained side by side, and the number of threads does not show.
    """

    name = "linear"
    reads_tokens = True

    def __init__(
        self,
        leads: Sequence[Lead] = (1, 3, "token"),
        epochs: int = 3,
        batch_tokens: int = 512,
        learning_rate: float = 0.01,
        seed: int = 0,
    ) -> None:
        self.leads = tuple(check_lead(lead, None) for lead in leads)
        self.epochs, self.batch_tokens, self.learning_rate, self.seed = epochs, batch_tokens, learning_rate, seed

    def fit(self, trace: Trace, *, progress: Progress = quiet) -> Self:
        """Train all leads at once; a training document's own counts are left out of its priors."""
        kind = token_kind(trace)
        popularity(trace)
        trace = trace.grouped()
        layers, experts = trace.num_moe_layers, trace.num_experts
        leads = [lead for lead in self.leads if lead == "token" or lead <= layers]
        memory = TokenMemory.of(trace, Vocabulary.of(trace, kind), most_pairs=0)
        documents = Documents(trace, memory, words=1, buckets=1)
        parameters = np.zeros((len(leads), layers, (len(FED_BLOCKS) + OWN_LAYERS) * experts + 1, experts), np.float32)
        parameters[:, :, :experts] = np.float32(1.8) * np.eye(experts, dtype=np.float32)
        for place in range(len(leads)):
            logits_of(memory.popularity, parameters[place, :, -1])
        mean, square, kept = np.zeros_like(parameters), np.zeros_like(parameters), np.ones(2, np.float32)
        plans = [
            documents.plan(range(documents.count), self.batch_tokens, np.random.default_rng([self.seed, epoch]))
            for epoch in range(self.epochs)
        ]
        total = sum(len(plan) for plan in plans)
        for step, pieces in enumerate(itertools.chain(*plans)):
            inputs, _ = documents.inputs(pieces, own=True)
            rate, kept = self.learning_rate * (1 - step / total), kept * np.array((0.9, 0.99), np.float32)

            def work(layer: int, inputs: Any = inputs, rate: float = rate, kept: np.ndarray = kept) -> None:
                for place, lead in enumerate(leads):
                    own = (array[place, layer] for array in (parameters, mean, square))
                    train_layer(inputs.blocks, inputs.chosen, layer, known_layers(layer, lead), *own, rate, kept)

            for _ in spread(work, range(layers)):
                pass
            progress(f"linear, epoch {step * self.epochs // total + 1} of {self.epochs}", (step + 1) / total)
        parameters = parameters.astype(np.float16).astype(np.float32)
        self.weight_, self.bias_ = np.ascontiguousarray(parameters[:, :, :-1]), np.ascontiguousarray(parameters[:, :, -1:])
        self.memory_ = memory
        self.fitted_ = Fitted.of(trace, vocabulary=kind, leads=tuple(leads))
        return self

    def scores_batch(self, trace: Trace, lead: Lead) -> np.ndarray:
        """Probabilities."""
        place = self.place_of(lead)
        if place is None:
            what = "The predictor was not fitted for so long a lead."
            raise PredictorMismatchError(message(what, got=lead, allowed=self.fitted_.leads))
        layers, experts = self.memory_.popularity.shape
        words = self.memory_.vocabulary.encode(trace)
        scores = np.empty((len(trace), layers, experts), np.float32)
        known = np.array([known_layers(layer, self.fitted_.leads[place]) for layer in range(layers)])
        weights = (known, self.weight_[place], self.bias_[place, :, 0])
        for start, end in itertools.pairwise(trace.document_offsets.tolist()):
            ids = trace.expert_ids[start:end]
            linear_scores(self.memory_.inputs(ids, words[start:end]).blocks, ids, *weights, scores[start:end])
        return scores

    def place_of(self, lead: Lead) -> int | None:
        """Weights for a lead, those of the smallest fitted lead that sees no more; None if it was fitted for none so long."""
        far = float("inf")
        least = far if lead == "token" else lead
        reach = [far if own == "token" else own for own in self.require_fitted().leads]
        return min((pair for pair in zip(reach, range(len(reach))) if pair[0] >= least), default=(far, None))[1]

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Counts, and weights in half precision."""
        weights = {"weight": self.weight_.astype(np.float16), "bias": self.bias_.astype(np.float16)}
        return {**self.memory_.arrays(), **weights}, {}

    @classmethod
    def restore(cls, fitted: Fitted, arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> Self:
        """From counts and weights."""
        made = cls(leads=fitted.leads)
        made.fitted_, made.memory_ = fitted, TokenMemory.restored(fitted.vocabulary, arrays)
        made.weight_, made.bias_ = (np.asarray(arrays[name], np.float32) for name in ("weight", "bias"))
        return made
