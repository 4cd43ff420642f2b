"""The learned predictor token by token, for an engine: numpy on one core, no torch.

A stream keeps what the batch form computes anew: fading sums, counts of this document, keys and values of the last tokens.
It says the same as :meth:`Transformer.scores_batch` to rounding; a test holds it to that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from swapless.errors import UsageError, message
from swapless.predict._kernels import finish_token, past_blocks, prior_blocks
from swapless.predict.counts import PAIR
from swapless.predict.features import BLOCKS, FADES, scalars
from swapless.predict.vocabulary import UNKNOWN, letter_groups

if TYPE_CHECKING:
    from swapless.predict.transformer import Transformer


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
        self._layers = [
            {
                name: np.ascontiguousarray(self._w[f"attention.{number}.{name}"].T)
                for name in ("qkv.weight", "out.weight", "up.weight", "up.bias", "down.weight", "down.bias", "distance")
            }
            for number in range(self._shape.attention_layers)
        ]
        layers, experts, width = self._shape.num_moe_layers, self._shape.num_experts, self._shape.width
        self._shift = np.einsum("gd,lde->gle", self._w["shift"], self._w["read"])
        self._smooth = self._memory.smooth
        self._nothing = np.zeros(layers * experts, np.float32)
        self._groups: dict[Any, np.ndarray] = {}
        self._heads = (self._shape.heads, width // self._shape.heads)
        self.begin_document()

    def begin_document(self) -> None:
        """Forget the document; the next token is the first of another."""
        width = self._shape.num_moe_layers * self._shape.num_experts
        self._before = np.zeros(width, np.float32)
        self._faded = np.zeros((len(FADES), width), np.float32)
        self._met: dict[int, tuple[np.ndarray, list[int]]] = {}
        self._word, self._place, self._known = UNKNOWN, 0, 0
        self._ids = np.full((self._shape.num_moe_layers, self.fitted.top_k), -1, np.int16)
        self._keys = [np.zeros((self._shape.window, *self._heads), np.float32) for _ in self._layers]
        self._values = [np.zeros_like(keys) for keys in self._keys]
        self._open = False

    def begin_token(self, token: str | int) -> np.ndarray:
        """Take in the token that comes next; likelihood of every expert of every MoE layer before it, float32 (L, E).

        Parameters
        ----------
        token : str or int
            Its text, or its id, as the predictor's vocabulary has it.
        """
        before = self._word
        if self._open:
            self._finish()
        self._word = self._memory.vocabulary.index(token)
        pair = before * int(PAIR) + self._word if self._place and before > 0 and self._word > 0 else -1
        blocks, numbers = self._blocks(pair)
        x = self._text(token) + scalars(numbers, np.array([self._place]))[0] @ self._w["scalars"] + self._w["scalars.bias"]
        x = x + (blocks[0, 0] + blocks[1, 0] + blocks[2, 0]) @ self._w["prior"]
        x = x + blocks[3, 0] @ self._w["before"] + blocks[6, 0] @ self._w["faded"]
        for number in range(len(self._layers)):
            x = self._attend(x, number)
        layers, experts = self._shape.num_moe_layers, self._shape.num_experts
        fed = np.ascontiguousarray(blocks.reshape(BLOCKS, layers, experts).transpose(1, 0, 2)).reshape(layers, 1, -1)
        hidden = fed @ self._w["base_in"] + self._w["base_hidden"] + (_rms(x) @ self._w["base_context"])[:, None]
        base = fed @ self._w["base"] + _silu(hidden) @ self._w["base_out"]
        self._base = base[:, 0] + self._w["base_bias"]
        self._state, self._known, self._open = x, 0, True
        self._ids[:] = -1
        return self._read()

    def observe(self, moe_layer: int, expert_ids: np.ndarray) -> np.ndarray:
        """Take in the choices of a MoE layer of the current token; likelihoods of all later layers, float32 (L - l - 1, E).

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
        chosen = ids[ids >= 0]
        weights = self._w
        inner = _rms(self._state) @ weights["step_state"][moe_layer] + weights["step_bias"][moe_layer, 0]
        inner += weights["step_choice"][moe_layer, chosen].sum(axis=0)
        self._state = self._state + weights["step_direct"][moe_layer, chosen].sum(axis=0)
        self._state += _silu(inner) @ weights["step_out"][moe_layer]
        return self._read()

    def _read(self) -> np.ndarray:
        """Likelihoods of the layers from the first unknown one on."""
        known, layers, experts = self._known, self._shape.num_moe_layers, self._shape.num_experts
        gaps = layers - known
        x = _rms(self._state) * self._w["gain"][:gaps]
        logits = (x[:, None] @ self._w["read"][known:])[:, 0] + self._base[known:]
        logits += self._shift[np.arange(gaps), np.arange(known, layers)]
        for gap in range(min(self._shape.near, gaps)):
            near = self._w["near"][gap, known + gap]
            for back in range(min(self._shape.near, known)):
                chosen = self._ids[known - 1 - back]
                logits[gap] += near[back * experts + chosen[chosen >= 0]].sum(axis=0)
        scores: np.ndarray = 1 / (1 + np.exp(-logits))
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

    def _attend(self, x: np.ndarray, number: int) -> np.ndarray:
        weights, keys, values = self._layers[number], self._keys[number], self._values[number]
        window = self._shape.window
        query, key, value = (_rms(x) @ weights["qkv.weight"]).reshape(3, *self._heads)
        keys[self._place % window], values[self._place % window] = key, value
        count = min(self._place + 1, window)
        back = np.arange(count)
        rows = (self._place - back) % window
        logits = np.einsum("whd,hd->wh", keys[rows], query) / np.sqrt(np.float32(self._heads[1])) + weights["distance"][:count]
        raised = np.exp(logits - logits.max(axis=0))
        mixed = np.einsum("wh,whd->hd", raised / raised.sum(axis=0), values[rows])
        x = x + mixed.reshape(-1) @ weights["out.weight"]
        inner = _silu(_rms(x) @ weights["up.weight"] + weights["up.bias"])
        return np.asarray(x + inner @ weights["down.weight"] + weights["down.bias"])


def _rms(x: np.ndarray) -> np.ndarray:
    return np.asarray(x / np.sqrt(np.mean(x * x) + np.finfo(np.float32).eps))


def _silu(x: np.ndarray) -> np.ndarray:
    return np.asarray(x / (1 + np.exp(-x)))
