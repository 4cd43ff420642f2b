"""One logistic regression a MoE layer: the plainest learned predictor, and the bar for every other."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Self, final

import numpy as np

from swapless.errors import PredictorMismatchError, message
from swapless.predict.features import TokenMemory
from swapless.predict.popularity import popularity
from swapless.predict.predictor import Fitted, Lead, Predictor, Progress, check_lead, known_layers, quiet, token_kind
from swapless.predict.vocabulary import Vocabulary
from swapless.trace import Trace

FED_BLOCKS = (0, 3, 5)
"""Of the shared features: the token's own prior, the choices of the token before, the fading sum at 0.85."""


@final
class Linear(Predictor):
    """Reads the token's prior, the last token's experts, a fading sum, and the two latest known layers of this token.

    Parameters
    ----------
    leads : sequence of leads
        One set of weights each. A lead in between is served by the next larger one, which sees less.
    epochs, batch_tokens, learning_rate, seed : number
        Of its training by Adam.
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
        import torch
        from torch.nn import functional as F

        from swapless.predict.batches import Documents

        kind = token_kind(trace)
        popularity(trace)
        trace = trace.grouped()
        layers, experts = trace.num_moe_layers, trace.num_experts
        leads = [lead for lead in self.leads if lead == "token" or lead <= layers]
        memory = TokenMemory.of(trace, Vocabulary.of(trace, kind), most_pairs=0)
        documents = Documents(trace, memory, words=1, buckets=1)
        start = torch.zeros(len(leads), layers, (len(FED_BLOCKS) + 2) * experts, experts)
        start[:, :, :experts] = 1.8 * torch.eye(experts)
        bias = torch.logit(torch.from_numpy(memory.popularity).clamp(1e-4, 1 - 1e-4)).repeat(len(leads), 1, 1)[:, :, None]
        parameters = [start.requires_grad_(), bias.clone().requires_grad_()]
        optimizer = torch.optim.Adam(parameters, lr=self.learning_rate, betas=(0.9, 0.99), fused=True)
        plans = [
            documents.plan(range(documents.count), self.batch_tokens, np.random.default_rng([self.seed, epoch]))
            for epoch in range(self.epochs)
        ]
        total = sum(len(plan) for plan in plans)
        for step, pieces in enumerate(itertools.chain(*plans)):
            batch = documents.batch(pieces, own=True)
            rows = batch.blocks.shape[1]
            parts = batch.blocks.view(layers, rows, -1, experts)
            fed = parts[:, :, list(FED_BLOCKS)].reshape(layers, rows, -1)
            loss = torch.zeros(())
            for place, lead in enumerate(leads):
                own = _own_layers(batch.chosen.numpy(), lead, 0)
                seen = torch.cat([fed, torch.from_numpy(own)], 2)
                logits = torch.baddbmm(parameters[1][place], seen, parameters[0][place])
                loss = loss + F.binary_cross_entropy_with_logits(logits, batch.chosen, reduction="sum") / rows
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * (1 - step / total)
            optimizer.step()
            progress(f"linear, epoch {step * self.epochs // total + 1} of {self.epochs}", (step + 1) / total)
        self.weight_, self.bias_ = (value.detach().half().float().numpy() for value in parameters)
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
        for start, end in itertools.pairwise(trace.document_offsets.tolist()):
            inputs = self.memory_.inputs(trace.expert_ids[start:end], words[start:end])
            own = _own_layers(inputs.chosen, self.fitted_.leads[place], 1)
            fed = np.concatenate([*inputs.blocks[list(FED_BLOCKS)], own[..., :experts], own[..., experts:]], axis=2)
            logits = fed.transpose(1, 0, 2) @ self.weight_[place] + self.bias_[place]
            scores[start:end] = 1 / (1 + np.exp(-logits.transpose(1, 0, 2)))
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


def _own_layers(chosen: np.ndarray, lead: Lead, axis: int) -> np.ndarray:
    """Choices of the current token at ``moe_layer - lead`` and the layer below, along the last axis; zeros beyond the cut.

    ``chosen`` (..., E) has its MoE layers on ``axis``.
    """
    rows = np.moveaxis(chosen, axis, 0)
    own = np.zeros((*rows.shape[:-1], 2 * rows.shape[-1]), np.float32)
    for layer in range(len(rows)):
        known = known_layers(layer, lead)
        for back in (1, 2):
            if known >= back:
                own[layer, ..., (back - 1) * rows.shape[-1] : back * rows.shape[-1]] = rows[known - back]
    return np.moveaxis(own, 0, axis)
