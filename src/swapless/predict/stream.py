"""The learned predictor token by token, for an engine: compiled loops on one core, no torch.

A stream keeps what the batch form computes anew: fading sums, counts of this document, keys and values of the last tokens.
It says the same as :meth:`Transformer.scores_batch` to rounding; a test holds it to that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from swapless.errors import UsageError, message
from swapless.predict._kernels import finish_token, past_blocks, prior_blocks
from swapless.predict._stream_kernels import add_product, attend, base_logits, read, step
from swapless.predict.counts import PAIR
from swapless.predict.features import BLOCKS, FADES, scalars
from swapless.predict.vocabulary import UNKNOWN, letter_groups

if TYPE_CHECKING:
    from swapless.predict.transformer import Transformer


ATTENTION = ("qkv.weight", "out.weight", "up.weight", "up.bias", "down.weight", "down.bias", "distance")
BASE = ("base_bias", "base", "base_hidden", "base_in", "base_context", "base_out")
STEP = ("step_state", "step_bias", "step_choice", "step_direct", "step_out")


class Stream:
    """Predictions while a model runs.

    Parameters
    ----------
    predictor : Transformer
        Fitted.

    Notes
    -----
    Order of calls: :meth:`begin_document`; for each token :meth:`begin_token`, then :meth:`observe` for MoE layer 0, 1, ...
    Layers that are not observed count as unknown from there on.
    """

    def __init__(self, predictor: Transformer) -> None:
        self.fitted = predictor.require_fitted()
        self._memory, network = predictor.memory_, predictor.network_
        self._shape = network.shape
        self._w: dict[str, Any] = {name: value.detach().numpy() for name, value in network.state_dict().items()}
        for name in ("prior", "before", "faded", "scalars"):
            self._w[name] = np.ascontiguousarray(self._w[f"{name}.weight"].T)
        self._w["step_bias"] = self._w["step_bias"][:, 0]
        self._layers = [
            [np.ascontiguousarray(self._w[f"attention.{number}.{name}"].T) for name in ATTENTION]
            for number in range(self._shape.attention_layers)
        ]
        layers, experts = self._shape.num_moe_layers, self._shape.num_experts
        self._shift = np.einsum("gd,lde->gle", self._w["shift"], self._w["read"])
        self._smooth = self._memory.smooth
        self._nothing = np.zeros(layers * experts, np.float32)
        self._groups: dict[Any, np.ndarray] = {}
        self._base = np.empty((layers, experts), np.float32)
        self.begin_document()

    def begin_document(self) -> None:
        """Forget the document; the next token is the first of another."""
        width = self._shape.num_moe_layers * self._shape.num_experts
        self._before = np.zeros(width, np.float32)
        self._faded = np.zeros((len(FADES), width), np.float32)
        self._met: dict[int, tuple[np.ndarray, list[int]]] = {}
        self._word, self._place, self._known = UNKNOWN, 0, 0
        self._ids = np.full((self._shape.num_moe_layers, self.fitted.top_k), -1, np.int16)
        self._keys = [np.zeros((self._shape.window, self._shape.width), np.float32) for _ in self._layers]
        self._values = [np.zeros_like(keys) for keys in self._keys]
        self._open = False

    def begin_token(self, token: str | int, ahead: int | None = None) -> np.ndarray:
        """Take in the token that comes next; likelihood of every expert of every MoE layer before it, float32 (L, E).

        Parameters
        ----------
        token : str or int
            Its text, or its id, as the predictor's vocabulary has it.
        ahead : int, optional
            Only so many layers, the next ones.
        """
        before = self._word
        if self._open:
            self._finish()
        self._word = self._memory.vocabulary.index(token)
        pair = before * int(PAIR) + self._word if self._place and before > 0 and self._word > 0 else -1
        blocks, numbers = self._blocks(pair)
        x = self._text(token) + self._w["scalars.bias"]
        add_product(scalars(numbers, np.array([self._place]))[0], self._w["scalars"], x)
        add_product(blocks[0, 0] + blocks[1, 0] + blocks[2, 0], self._w["prior"], x)
        add_product(blocks[3, 0], self._w["before"], x)
        add_product(blocks[6, 0], self._w["faded"], x)
        for weights, keys, values in zip(self._layers, self._keys, self._values):
            attend(x, self._place, keys, values, *weights)
        parts = blocks.reshape(BLOCKS, self._shape.num_moe_layers, self._shape.num_experts)
        base_logits(x, parts, self._base, *(self._w[name] for name in BASE))
        self._state, self._known, self._open = x, 0, True
        self._ids[:] = -1
        return self._read(ahead)

    def observe(self, moe_layer: int, expert_ids: np.ndarray, ahead: int | None = None) -> np.ndarray:
        """Take in the choices of a MoE layer of the current token; likelihoods of later layers, (L - l - 1, E).

        Raises
        ------
        UsageError
            Not the next MoE layer of a token that has begun.
        """
        if not self._open or moe_layer != self._known or moe_layer >= self._shape.num_moe_layers:
            what = "A stream takes the MoE layers of a token in order."
            raise UsageError(message(what, got=f"moe_layer {moe_layer}", allowed=f"{self._known}, after begin_token"))
        ids = np.asarray(expert_ids, np.int16).reshape(-1)
        self._ids[moe_layer, : len(ids)] = ids
        self._known += 1
        if self._known == self._shape.num_moe_layers:
            return np.zeros((0, self._shape.num_experts), np.float32)
        inner = (self._w[name][moe_layer] for name in STEP)
        step(self._state, self._ids[moe_layer], *inner)
        return self._read(ahead)

    def _read(self, ahead: int | None) -> np.ndarray:
        """Likelihoods of the first ``ahead`` layers from the first unknown one on."""
        left = self._shape.num_moe_layers - self._known
        scores = np.empty((left if ahead is None else min(ahead, left), self._shape.num_experts), np.float32)
        weights = self._w
        shown = (weights["gain"], self._shift, weights["read"], weights["near"])
        read(self._state, self._ids, self._known, self._base, *shown, scores)
        return scores

    def _finish(self) -> None:
        """The current token becomes past."""
        met, seen = self._met.setdefault(self._word, (np.zeros_like(self._nothing), [0]))
        finish_token(self._ids, self._shape.num_experts, FADES, self._before, self._faded, met)
        seen[0] += 1
        self._place += 1

    def _blocks(self, pair: int) -> tuple[np.ndarray, np.ndarray]:
        """Feature blocks (BLOCKS, 1, L*E) of the current token, and how often word, pair and word in the document were met."""
        blocks = np.empty((BLOCKS, 1, len(self._smooth)), np.float32)
        found = []
        for table, key in ((self._memory.single, self._word), (self._memory.pair, pair)):
            row = int(table.find(np.array([key]))[0])
            found.append((np.float32(table.totals[row]), table.counts[row].astype(np.float32)) if row >= 0 else None)
        (total, counts), (pair_total, pair_counts) = (one or (np.float32(0), self._nothing) for one in found)
        met, seen = self._met.get(self._word, (self._nothing, [0])) if self._word > 0 else (self._nothing, [0])
        prior_blocks(self._smooth, total, counts, pair_total, pair_counts, np.float32(seen[0]), met, blocks, 0)
        past_blocks(self._smooth, self._before, self._faded, blocks, 0)
        return blocks, np.array([[total], [pair_total], [seen[0]]], np.float32)

    def _text(self, token: str | int) -> np.ndarray:
        """Vector (D,) of the token itself."""
        word = self._word if self._word < self._shape.words else UNKNOWN
        vector = self._w["word"][word]
        if self._memory.vocabulary.kind == "token_id":
            return np.asarray(vector)
        if token not in self._groups:
            groups = letter_groups([str(token)], self._shape.buckets)[0]
            self._groups[token] = groups[groups < self._shape.buckets]
        groups = self._groups[token]
        return np.asarray(vector + self._w["letters"][groups].sum(axis=0) / np.sqrt(np.float32(max(1, len(groups)))))
