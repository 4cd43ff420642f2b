"""The learned predictor token by token, for an engine: compiled loops on one core, no torch.

A stream keeps what the batch form computes anew: fading sums, counts of this document, keys and values of the last tokens.
It says the same as :meth:`Transformer.scores_batch` to rounding; a test holds it to that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import numpy as np

from swapless.predict._kernels import finish_token, past_blocks, prior_blocks
from swapless.predict._stream_kernels import add_product, attend, base_logits, half_bits, read, scale_rms, step
from swapless.predict.counts import PAIR
from swapless.predict.features import BLOCKS, FADES, scalars
from swapless.predict.token_stream import TokenStream
from swapless.predict.vocabulary import UNKNOWN, letter_groups

if TYPE_CHECKING:
    from swapless.predict.transformer import Transformer

ATTENTION = ("qkv.weight", "out.weight", "up.weight", "up.bias", "down.weight", "down.bias", "distance")
BARE = ("up.bias", "down.bias", "distance")
BASE = ("base_bias", "base", "base_hidden", "base_in", "base_context", "base_out")
STEP = ("step_state", "step_bias", "step_choice", "step_direct", "step_out")
READ = ("gain", "read", "near")
BY_INPUT = ("base", "base_in", "base_context", "base_out", "step_state", "step_out", "read")
"""Stacks (L, inputs, outputs) that a stream wants output by output."""


@final
class Stream(TokenStream):
    """The learned predictor's stream.

    Parameters
    ----------
    predictor : Transformer
        Fitted. Its network is not needed any more.
    """

    def __init__(self, predictor: Transformer) -> None:
        self._memory, network = predictor.memory_, predictor.network_
        self.vocabulary = self._memory.vocabulary
        self._shape = network.shape
        weights: dict[str, Any] = {name: value.detach().numpy() for name, value in network.state_dict().items()}
        kept = ("word", "letters", "scalars.bias", *BASE, *STEP, *READ)
        self._w = {name: weights[name] for name in kept}
        for name in BY_INPUT:
            self._w[name] = half_bits(weights[name].transpose(0, 2, 1))
        for name in ("prior", "before", "faded", "scalars"):
            self._w[name] = half_bits(weights[f"{name}.weight"])
        self._w["step_bias"] = weights["step_bias"][:, 0]
        self._layers = [
            [
                weights[f"attention.{number}.{name}"] if name in BARE else half_bits(weights[f"attention.{number}.{name}"])
                for name in ATTENTION
            ]
            for number in range(self._shape.attention_layers)
        ]
        self._shift = np.einsum("gd,lde->gle", weights["shift"], weights["read"])
        self._smooth = self._memory.smooth
        self._nothing = np.zeros(len(self._smooth), np.float32)
        self._groups: dict[Any, np.ndarray] = {}
        super().__init__(predictor)

    def _forget(self) -> None:
        width = len(self._smooth)
        self._before = np.zeros(width, np.float32)
        self._faded = np.zeros((len(FADES), width), np.float32)
        self._met: dict[int, tuple[np.ndarray, list[int]]] = {}
        self._word, self._place = UNKNOWN, 0
        self._keys = [np.zeros((self._shape.window, self._shape.width), np.float32) for _ in self._layers]
        self._values = [np.zeros_like(keys) for keys in self._keys]
        self._base = np.empty((self._shape.num_moe_layers, self._shape.num_experts), np.float32)

    def growth_bytes(self, tokens: int) -> int:
        """Counts of every distinct word of the document."""
        return min(tokens, len(self._memory.vocabulary)) * self._nothing.nbytes

    def _begin(self, token: str | int) -> None:
        self._state, blocks = self._context(token, self._next(token))
        layers = self._shape.num_moe_layers
        self._fed = np.ascontiguousarray(blocks.reshape(BLOCKS, layers, -1).transpose(1, 0, 2)).reshape(layers, -1)
        self._before_token, self._ready = np.empty_like(self._state), 0
        scale_rms(self._state, self._before_token)

    def _pass(self, token: str | int, left: int) -> None:
        pair = self._next(token)
        if left < self._shape.window * self._shape.attention_layers:  # no later token looks back farther
            self._context(token, pair)

    def _next(self, token: str | int) -> int:
        """Make the token the current one; the key of its pair with the one before, -1 for none."""
        before, self._word = self._word, self._memory.vocabulary.index(token)
        return before * int(PAIR) + self._word if self._place and before > 0 and self._word > 0 else -1

    def _context(self, token: str | int, pair: int) -> tuple[np.ndarray, np.ndarray]:
        """State (D,) before the token, and its feature blocks; keys and values of the token are kept."""
        blocks, numbers = self._blocks(pair)
        x = self._text(token) + self._w["scalars.bias"]
        add_product(scalars(numbers, np.array([self._place]))[0], self._w["scalars"], x)
        add_product(blocks[0, 0] + blocks[1, 0] + blocks[2, 0], self._w["prior"], x)
        add_product(blocks[3, 0], self._w["before"], x)
        add_product(blocks[6, 0], self._w["faded"], x)
        for weights, keys, values in zip(self._layers, self._keys, self._values):
            attend(x, self._place, keys, values, *weights)
        return x, blocks

    def _step(self, moe_layer: int) -> None:
        step(self._state, moe_layer, self._ids[moe_layer], *(self._w[name] for name in STEP))

    def _read(self, count: int) -> np.ndarray:
        end = self._known + count
        if end > self._ready:  # base logits when they are first wanted: a part of them, while the model is at work
            base_logits(self._before_token, self._fed, self._ready, end, self._base, *(self._w[name] for name in BASE))
            self._ready = end
        scores = np.empty((count, self._shape.num_experts), np.float32)
        gain, weight, near = (self._w[name] for name in READ)
        read(self._state, self._ids, self._known, self._base, gain, self._shift, weight, near, scores)
        return scores

    def _finish(self) -> None:
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
