"""A saved predictor drives reads ahead: it follows each document token by token and says what the next MoE layers will want."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from swapless.notation import NO_EXPERT, Phase
from swapless.predict.token_stream import TokenStream
from swapless.runtime.ahead import Foreseen
from swapless.runtime.routing import Step

LAYERS_AHEAD = 2
"""MoE layers asked for at a time: the link is idle for a part of one block's time, so reads for later ones would not begin."""

WORTH = 0.5
"""Read ahead what is likelier needed than not: a wasted read takes about as much time as a useful one saves."""


class _Call(NamedTuple):
    """A forward call under way: its step, routing so far (B*S, L, K), and sequences as (document, rows)."""

    step: Step
    ids: np.ndarray
    sequences: list[tuple[int, np.ndarray]]


class _Followed:
    """One sequence: how far its document has come, and tokens that its stream has not taken in yet."""

    def __init__(self, stream: TokenStream) -> None:
        self.stream = stream
        self.document, self.place = -1, 0
        self.tokens: list[str | int] = []
        self.routing: list[np.ndarray] = []
        self.begun = False

    def expect(self, document: int, position: int) -> None:
        """A forward call continues the document here; another one, or a call that was cut off before, means to begin anew."""
        if self.begun or (self.document, self.place) != (document, position):
            self.stream.begin_document()
            self.tokens, self.routing, self.begun = [], [], False
            self.document, self.place = document, position

    def catch_up(self) -> None:
        """Let the stream take in what it has not followed."""
        if self.tokens:
            self.stream.take_in(self.tokens, np.stack(self.routing))
            self.tokens, self.routing = [], []


class PredictedLookahead:
    """Foresees with the stream of a fitted predictor; each sequence of a batch is followed by a stream of its own.

    While nobody asks, routing is only kept: the stream takes it in when it is asked again.

    Parameters
    ----------
    stream : TokenStream
        Of the predictor.
    token : callable of int
        From a token id to what the predictor's vocabulary calls it; -1 stands for a token that is not known.
    """

    def __init__(self, stream: TokenStream, token: Callable[[int], str | int]) -> None:
        self._followed = [_Followed(stream)]
        self._token = token
        self._shape = stream.fitted
        self._call: _Call | None = None

    def begin(self, step: Step) -> None:
        """See which documents the call continues, and where."""
        shape = (len(step.document), self._shape.num_moe_layers, self._shape.top_k)
        documents = np.unique(step.document[step.valid]).tolist()
        sequences = [(document, np.flatnonzero(step.valid & (step.document == document))) for document in documents]
        self._call = _Call(step, np.full(shape, NO_EXPERT, np.int16), sequences)
        while len(self._followed) < len(sequences):
            self._followed.append(_Followed(self._followed[0].stream.sibling()))
        for followed, (document, rows) in zip(self._followed, sequences):
            followed.expect(document, int(step.position[rows[0]]))

    def seen(self, moe_layer: int, ids_TK: torch.Tensor) -> None:
        """Keep the routing; after the last MoE layer it is that of finished tokens."""
        call = self._call
        if call is None or tuple(ids_TK.shape) != call.ids.shape[::2]:
            self._call = None  # a block that runs on other rows than the model cannot be followed
            return
        ids = ids_TK.numpy()
        call.ids[:, moe_layer] = np.where(ids < self._shape.num_experts, ids, NO_EXPERT)
        if moe_layer + 1 < self._shape.num_moe_layers:
            return
        for followed, (_, rows) in zip(self._followed, call.sequences):
            followed.place += len(rows)
            if followed.begun:
                followed.stream.observe(moe_layer, call.ids[rows[0], moe_layer])
                followed.begun = False
            else:
                followed.tokens += self._tokens(call.step, rows)
                followed.routing += list(call.ids[rows])
            if call.step.phase is Phase.PREFILL:
                followed.catch_up()

    def foresee(self, moe_layer: int, hidden_TD: torch.Tensor | None) -> Sequence[Foreseen]:
        """Experts of the next layers, likeliest first; those likelier needed than not are worth a read."""
        call = self._call
        if call is None or any(len(rows) > 1 for _, rows in call.sequences):
            return []  # drafts: several tokens of a sequence at once are only followed
        unneeded: np.ndarray | float = 1.0
        for followed, (_, rows) in zip(self._followed, call.sequences):
            stream = followed.stream
            if moe_layer < 0:
                followed.catch_up()
                (token,) = self._tokens(call.step, rows)
                followed.begun = True
                needed = stream.begin_token(token, LAYERS_AHEAD)
            elif followed.begun:
                needed = stream.observe(moe_layer, call.ids[rows[0], moe_layer], LAYERS_AHEAD)
            else:
                return []
            unneeded = unneeded * (1 - needed)
        width = min(self._shape.top_k * len(call.sequences), self._shape.num_experts)
        found = []
        for gap, row in enumerate(np.asarray(unneeded)):
            order = np.argsort(row, kind="stable")[:width]
            found.append(Foreseen(moe_layer + 1 + gap, order.tolist(), int((row[order] <= 1 - WORTH).sum())))
        return found

    def _tokens(self, step: Step, rows: np.ndarray) -> list[str | int]:
        ids = np.full(len(rows), -1) if step.token_id is None else step.token_id[rows]
        return [self._token(number) for number in ids.tolist()]
