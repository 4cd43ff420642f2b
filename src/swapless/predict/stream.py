"""The learned predictor token by token, for an engine: compiled loops on one core, no torch.

A stream keeps what the batch form computes anew: fading sums, counts of this document, keys and values of the last tokens.
It says the same bits as :meth:`Transformer.scores_batch`; a test holds it to that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import numpy as np

from swapless.predict._kernels import finish_token, past_blocks, prior_blocks
from swapless.predict._network_kernels import add_product, add_text, attend, base_logits, read, scale_rms, step
from swapless.predict.counts import PAIR
from swapless.predict.features import BLOCKS, FADES, scalars
from swapless.predict.network_scores import rings
from swapless.predict.network_shape import Weights
from swapless.predict.token_stream import TokenStream
from swapless.predict.vocabulary import UNKNOWN, letter_groups

if TYPE_CHECKING:
    from swapless.predict.transformer import Transformer


@final
class Stream(TokenStream):
    """The learned predictor's stream.

    Parameters
    ----------
    predictor : Transformer
        Fitted.
    """

    def __init__(self, predictor: Transformer) -> None:
        self._memory, self._shape = predictor.memory_, predictor.shape_
        self.vocabulary = self._memory.vocabulary
        self._w = Weights(self._shape, predictor.weights_, narrow=True)
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
        self._rings = [rings(self._w) for _ in self._w.attention]
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
        x, linear = self._text(token), self._w.linear
        add_product(scalars(numbers, np.array([self._place]))[0], linear["scalars"], x)
        add_product(blocks[0, 0] + blocks[1, 0] + blocks[2, 0], linear["prior"], x)
        add_product(blocks[3, 0], linear["before"], x)
        add_product(blocks[6, 0], linear["faded"], x)
        for weights, (keys, values) in zip(self._w.attention, self._rings):
            attend(x, self._place, keys, values, *weights)
        return x, blocks

    def _step(self, moe_layer: int) -> None:
        step(self._state, moe_layer, self._ids[moe_layer], *self._w.step)

    def _read(self, count: int) -> np.ndarray:
        end = self._known + count
        if end > self._ready:  # base logits when they are first wanted: a part of them, while the model is at work
            base_logits(self._before_token, self._fed, self._ready, end, self._base, *self._w.base)
            self._ready = end
        scores = np.empty((count, self._shape.num_experts), np.float32)
        read(self._state, self._ids, self._known, self._known, self._base, *self._w.read, scores)
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
        """Vector (D,) of the token itself, and the bias of what is added to it."""
        word = self._word if self._word < self._shape.words else UNKNOWN
        x = self._w.bias.copy()
        add_text(self._w.word[word], self._w.letters, self._groups_of(token), x)
        return x

    def _groups_of(self, token: str | int) -> np.ndarray:
        if self._memory.vocabulary.kind == "token_id":
            return np.zeros(0, np.int64)
        if token not in self._groups:
            self._groups[token] = letter_groups([str(token)], self._shape.buckets)[0]
        return self._groups[token]
