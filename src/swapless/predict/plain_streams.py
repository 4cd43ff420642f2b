"""Streams of the predictors that need no network: a table, a fading sum, one regression a MoE layer."""

from __future__ import annotations

from typing import final

import numpy as np

from swapless.predict._kernels import finish_token, past_blocks, prior_blocks
from swapless.predict._linear_kernels import add_linear
from swapless.predict._network_kernels import sigmoid_all
from swapless.predict.features import BLOCKS, FADES
from swapless.predict.linear import Linear
from swapless.predict.popularity import Popularity
from swapless.predict.predictor import known_layers
from swapless.predict.previous_token import PreviousToken
from swapless.predict.token_prior import SMOOTHING, TokenPrior
from swapless.predict.token_stream import TokenStream


@final
class PopularityStream(TokenStream):
    """The shares, whatever the token."""

    def __init__(self, predictor: Popularity) -> None:
        self._share = predictor.share_
        super().__init__(predictor)

    def _forget(self) -> None:
        """There is no past."""

    def _begin(self, token: str | int) -> None:
        """A token changes nothing."""

    def _step(self, moe_layer: int) -> None:
        """Nor does its routing."""

    def _read(self, count: int) -> np.ndarray:
        return self._share[self._known : self._known + count]

    def _finish(self) -> None:
        """Nor does the past."""


@final
class TokenPriorStream(TokenStream):
    """The token's row of the table."""

    def __init__(self, predictor: TokenPrior) -> None:
        self.vocabulary = predictor.vocabulary_
        self._share, self._table = predictor.share_, predictor.table_
        super().__init__(predictor)

    def _forget(self) -> None:
        self._scores = self._share

    def _begin(self, token: str | int) -> None:
        assert self.vocabulary is not None
        totals, counts = self._table.take(self._table.find(np.array([self.vocabulary.index(token)])))
        smooth = np.float32(SMOOTHING)
        self._scores = (counts[0].reshape(self._share.shape) + smooth * self._share) / (totals[0] + smooth)

    def _step(self, moe_layer: int) -> None:
        """The token's own routing changes nothing."""

    def _read(self, count: int) -> np.ndarray:
        return self._scores[self._known : self._known + count]

    def _finish(self) -> None:
        """The past does not matter."""


@final
class PreviousTokenStream(TokenStream):
    """The fading sum of the finished tokens."""

    def __init__(self, predictor: PreviousToken) -> None:
        self._share, self._fade = predictor.share_, np.array([predictor.fade], np.float32)
        super().__init__(predictor)

    def _forget(self) -> None:
        self._before, self._unused = np.zeros((2, self._share.size), np.float32)
        self._sums = np.zeros((1, self._share.size), np.float32)
        self._left = np.float32(1)

    def _begin(self, token: str | int) -> None:
        """Any token is followed by what the last ones chose."""

    def _step(self, moe_layer: int) -> None:
        """The current token's own routing counts from the next one on."""

    def _read(self, count: int) -> np.ndarray:
        rows = slice(self._known, self._known + count)
        return self._sums.reshape(self._share.shape)[rows] + self._left * self._share[rows]

    def _finish(self) -> None:
        finish_token(self._ids, self.fitted.num_experts, self._fade, self._before, self._sums, self._unused)
        self._left *= self._fade[0]


@final
class LinearStream(TokenStream):
    """The part of the logits that is known before the token, and the rows of the weights that its known layers choose."""

    def __init__(self, predictor: Linear) -> None:
        self._predictor, self._memory = predictor, predictor.memory_
        self.vocabulary = self._memory.vocabulary
        self._smooth = self._memory.smooth
        self._nothing = np.zeros(len(self._smooth), np.float32)
        super().__init__(predictor)

    def _forget(self) -> None:
        self._before, self._unused = np.zeros((2, len(self._smooth)), np.float32)
        self._faded = np.zeros((len(FADES), len(self._smooth)), np.float32)
        self._blocks = np.empty((BLOCKS, 1, len(self._smooth)), np.float32)

    def _begin(self, token: str | int) -> None:
        table, none = self._memory.single, np.float32(0)
        totals, counts = table.take(table.find(np.array([self._memory.vocabulary.index(token)])))
        nothing = self._nothing
        prior_blocks(self._smooth, totals[0], counts[0], none, nothing, none, nothing, self._blocks, 0)
        past_blocks(self._smooth, self._before, self._faded, self._blocks, 0)

    def _step(self, moe_layer: int) -> None:
        """The choices are looked at where they are read."""

    def _read(self, count: int) -> np.ndarray:
        shape, leads = self.fitted, self.fitted.leads
        blocks = self._blocks.reshape(BLOCKS, 1, shape.num_moe_layers, shape.num_experts)
        scores = np.zeros((count, shape.num_experts), np.float32)
        for gap, layer in enumerate(range(self._known, self._known + count)):
            place = self._predictor.place_of(gap + 1)
            if place is None:  # farther ahead than it was fitted for: it says nothing
                break
            scores[gap] = self._predictor.bias_[place, layer, 0]
            known = known_layers(layer, leads[place])
            add_linear(blocks, 0, layer, self._ids, known, self._predictor.weight_[place, layer], scores[gap])
            sigmoid_all(scores[gap])
        return scores

    def _finish(self) -> None:
        finish_token(self._ids, self.fitted.num_experts, FADES, self._before, self._faded, self._unused)
