"""Predictors that follow a running model: the contract that an engine calls, and the kinds that meet it.

``scores_batch`` sees whole documents; an engine has one token, whose MoE layers are routed one after the other. A stream says
after each of them, and before the first, what the later ones will want, and keeps what it needs of the past.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING, Self, final

import numpy as np

from swapless.arrays import want, want_ids
from swapless.errors import UsageError, message
from swapless.notation import NO_EXPERT
from swapless.registry import Registry

if TYPE_CHECKING:
    from swapless.predict.predictor import Predictor
    from swapless.predict.vocabulary import Vocabulary

STREAMS = Registry(
    "stream",
    "swapless.streams",
    {
        "linear": "swapless.predict.plain_streams:LinearStream",
        "popularity": "swapless.predict.plain_streams:PopularityStream",
        "previous_token": "swapless.predict.plain_streams:PreviousTokenStream",
        "token_prior": "swapless.predict.plain_streams:TokenPriorStream",
        "transformer": "swapless.predict.stream:Stream",
    },
)
"""By the name of the predictor."""


class TokenStream(ABC):
    """Predictions while a model runs, one document at a time.

    Parameters
    ----------
    predictor : Predictor
        Fitted.

    Attributes
    ----------
    fitted : Fitted
        What the predictor was fitted for.
    vocabulary : Vocabulary or None
        Of its tokens, if it reads any.

    Notes
    -----
    Order of calls: :meth:`begin_document`; for each token :meth:`begin_token`, then :meth:`observe` for MoE layer 0, 1, ...
    Layers that are not observed count as unknown from there on. Tokens whose routing is known already go through
    :meth:`take_in` instead.
    """

    vocabulary: Vocabulary | None = None

    def __init__(self, predictor: Predictor) -> None:
        self.fitted = predictor.require_fitted()
        self.begin_document()

    @final
    def sibling(self) -> Self:
        """Another stream of the same predictor, for a document beside this one; it shares the weights."""
        other = copy(self)
        other.begin_document()
        return other

    @final
    def begin_document(self) -> None:
        """Forget the document; the next token is the first of another."""
        self._ids = np.full((self.fitted.num_moe_layers, self.fitted.top_k), NO_EXPERT, np.int16)
        self._known, self._open = 0, False
        self._forget()

    @final
    def begin_token(self, token: str | int, ahead: int | None = None) -> np.ndarray:
        """Take in the token that comes next; likelihood of every expert of every MoE layer before it, float32 (L, E).

        Parameters
        ----------
        token : str or int
            Its text, or its id, as the predictor's vocabulary has it.
        ahead : int, optional
            Only so many layers, the next ones.
        """
        self._close()
        self._begin(token)
        self._open = True
        return self._read(self._count(ahead))

    @final
    def observe(self, moe_layer: int, expert_ids: np.ndarray, ahead: int | None = None) -> np.ndarray:
        """Take in the choices of a MoE layer of the current token; likelihoods of later layers, (L - l - 1, E).

        Raises
        ------
        UsageError
            Not the next MoE layer of a token that has begun, more than K ids, or one out of range.
        """
        if not self._open or moe_layer != self._known or moe_layer >= self.fitted.num_moe_layers:
            what = "A stream takes the MoE layers of a token in order."
            raise UsageError(message(what, got=f"moe_layer {moe_layer}", allowed=f"{self._known}, after begin_token"))
        ids = np.asarray(expert_ids).reshape(-1)
        experts = self.fitted.num_experts
        if (
            len(ids) > self.fitted.top_k
            or ids.dtype.kind not in "iu"
            or not all(-1 <= expert < experts for expert in ids.tolist())
        ):
            allowed = f"at most {self.fitted.top_k} from 0 to {experts - 1}, or -1"
            raise UsageError(message("A stream was given ids that cannot be.", got=ids.tolist(), allowed=allowed))
        self._ids[moe_layer, : len(ids)] = ids
        self._known += 1
        if self._known == self.fitted.num_moe_layers:
            return np.zeros((0, self.fitted.num_experts), np.float32)
        self._step(moe_layer)
        return self._read(self._count(ahead))

    @final
    def take_in(self, tokens: Sequence[str | int], expert_ids: np.ndarray) -> None:
        """Finished tokens of the document and their routing, int16 (T, L, K): as if each had been followed, and quicker.

        Raises
        ------
        UsageError
            Ids of another shape, or out of range.
        """
        wanted = (len(tokens), self.fitted.num_moe_layers, self.fitted.top_k)
        want_ids(want(expert_ids, "expert_ids", np.int16, wanted), self.fitted.num_experts)
        self._close()
        for number, (token, ids) in enumerate(zip(tokens, expert_ids)):
            self._pass(token, len(tokens) - number)
            self._ids[:] = ids
            self._finish()

    def growth_bytes(self, tokens: int) -> int:
        """What a document of so many tokens may add to what is held now."""
        return 0

    def _close(self) -> None:
        """The current token becomes past."""
        if self._open:
            self._finish()
        self._ids[:] = NO_EXPERT
        self._known, self._open = 0, False

    def _count(self, ahead: int | None) -> int:
        left = self.fitted.num_moe_layers - self._known
        return left if ahead is None else min(ahead, left)

    @abstractmethod
    def _forget(self) -> None:
        """Make the state of an empty document: new arrays, since siblings share the old ones."""

    @abstractmethod
    def _begin(self, token: str | int) -> None:
        """A token begins."""

    def _pass(self, token: str | int, left: int) -> None:
        """A token begins of which nothing will be asked; ``left`` tokens, this one included, are taken in now."""
        self._begin(token)

    @abstractmethod
    def _step(self, moe_layer: int) -> None:
        """``self._ids[moe_layer]`` is known now, and more layers follow."""

    @abstractmethod
    def _read(self, count: int) -> np.ndarray:
        """Likelihoods (count, E) of the MoE layers from the first unknown one on, ``self._known``."""

    @abstractmethod
    def _finish(self) -> None:
        """The current token becomes past; its routing is ``self._ids`` (L, K), -1 where it is unknown."""


def open_stream(predictor: Predictor) -> TokenStream:
    """The stream of a fitted predictor.

    Raises
    ------
    UsageError
        A kind that cannot follow a running model; the message names those that can.
    """
    if not predictor.causal or predictor.name not in STREAMS.names():
        what = f"A predictor of the kind {predictor.name!r} cannot follow a running model token by token."
        step = "Train one of these on the same trace: swapless predict train --kind NAME."
        raise UsageError(message(what, allowed=", ".join(STREAMS.names()), step=step))
    found: TokenStream = STREAMS.get(predictor.name)(predictor)
    return found
