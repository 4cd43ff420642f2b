"""The contract of a predictor: what it may see, what it says, and how it is fitted.

A predictor scores every expert of a MoE layer before the router has spoken. What exists at that moment is the *cut*: routing
of the finished tokens of the same document, the tokens themselves up to the current one, and the current token's routing up
to ``moe_layer - lead``. :func:`history` builds exactly that, as a trace whose last row is blank beyond the cut, and
``scores`` sees nothing else. ``scores_batch`` is the form that evaluation uses at scale; :mod:`swapless.predict.evaluate`
holds it to ``scores``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np

from swapless.errors import NotFittedError, PredictorMismatchError, UsageError, message
from swapless.notation import NO_EXPERT
from swapless.trace import Trace

if TYPE_CHECKING:
    from jaxtyping import Float32

Lead = int | Literal["token"]
"""How early a prediction is asked for: MoE layers ahead, at least 1, or ``"token"``, before the token starts."""

Progress = Callable[[str, float], None]
"""How long work reports itself: the stage's name and the share done, in [0, 1]."""

TokenKind = Literal["token", "token_id"]
"""Which column a vocabulary is made of."""


def quiet(stage: str, done: float) -> None:
    """Progress that nobody watches."""


def parse_lead(text: str, num_moe_layers: int | None = None) -> Lead:
    """A lead from ``"3"`` or ``"token"``.

    Raises
    ------
    UsageError
        Neither a positive int nor ``token``, or more than L.
    """
    word = text.strip()
    if word == "token":
        return "token"
    if not word.isascii() or not word.isdigit():
        raise UsageError(message("A lead is a count of MoE layers or 'token'.", got=repr(text), allowed="1, 2, ... or token"))
    return check_lead(int(word), num_moe_layers)


def check_lead(lead: Lead, num_moe_layers: int | None) -> Lead:
    """The lead itself.

    Raises
    ------
    UsageError
        Below 1, or larger than the number of MoE layers.
    """
    if lead == "token":
        return lead
    whole = isinstance(lead, (int, np.integer)) and not isinstance(lead, bool)
    if not whole or lead < 1 or (num_moe_layers is not None and lead > num_moe_layers):
        allowed = f"1 to {num_moe_layers} (L), or 'token'" if num_moe_layers else "at least 1, or 'token'"
        raise UsageError(message("A lead that cannot be.", got=repr(lead), allowed=allowed))
    return int(lead)


def known_layers(moe_layer: int, lead: Lead) -> int:
    """How many MoE layers of the current token are known when ``moe_layer`` is asked for: 0 to ``moe_layer - lead``.

    Examples
    --------
    >>> known_layers(5, 1), known_layers(5, 3), known_layers(1, 3), known_layers(5, "token")
    (5, 3, 0, 0)
    """
    return 0 if lead == "token" else max(0, moe_layer - lead + 1)


def history(document: Trace, row: int, known: int) -> Trace:
    """What exists when ``known`` MoE layers of the token at ``row`` have been routed.

    Parameters
    ----------
    document : Trace
        Rows of one document, in order.
    row : int
        The current token.
    known : int
        MoE layers of it that are known, 0 to L.

    Returns
    -------
    Trace
        Rows 0 to ``row``; in the last one the layers from ``known`` on hold no expert, no weight and no score.
    """
    past = document.rows(slice(0, row + 1))
    blanks: dict[str, Any] = {}
    for name, blank in (("expert_ids", NO_EXPERT), ("gate_weights", 0), ("router_scores", 0)):
        values = getattr(past, name)
        if values is not None:
            values = values.copy()
            values[row, known:] = blank
            blanks[name] = values
    return replace(past, **blanks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """What a predictor was fitted for; written at the head of its file.

    Parameters
    ----------
    model_id : str or None
        Model of the trace.
    num_experts, top_k, num_moe_layers : int
        E, K and L.
    vocabulary : {"token", "token_id"} or None
        The column of tokens that it reads, if it reads any.
    leads : tuple
        Leads it was fitted at; empty if it serves every lead alike.
    """

    model_id: str | None
    num_experts: int
    top_k: int
    num_moe_layers: int
    vocabulary: TokenKind | None = None
    leads: tuple[Lead, ...] = ()

    @classmethod
    def of(cls, trace: Trace, **more: Any) -> Fitted:
        """The shape of a trace's model."""
        return cls(
            model_id=trace.header.model_id,
            num_experts=trace.num_experts,
            top_k=trace.top_k,
            num_moe_layers=trace.num_moe_layers,
            **more,
        )

    def check(self, trace: Trace, *, other_model: bool = False) -> str | None:
        """Whether ``trace`` is of the same model; a sentence of warning where that cannot be told from its header.

        ``other_model`` lets another name pass, with a sentence too: a model and its fine-tuned kin have the same shape.

        Raises
        ------
        PredictorMismatchError
            Another model or shape, or no tokens where the predictor reads them.
        """
        header = trace.header
        step = "Use a predictor of the trace's model, or train one: swapless predict train."
        kin = f"{step} To try it all the same: predict eval --other-model."
        for name, ours, theirs in (
            ("MoE layers", self.num_moe_layers, trace.num_moe_layers),
            ("experts a token", self.top_k, trace.top_k),
        ):
            if ours != theirs:
                what = f"The trace has another number of {name} than the predictor's model."
                raise PredictorMismatchError(message(what, got=theirs, allowed=ours, step=step))
        named = header.model_id is not None and self.model_id is not None
        other = named and header.model_id != self.model_id
        if other and not other_model:
            what = "The predictor was fitted for another model."
            raise PredictorMismatchError(message(what, got=header.model_id, allowed=self.model_id, step=kin))
        wrong = header.num_experts != self.num_experts if named else int(trace.expert_ids.max()) >= self.num_experts
        if wrong:
            what = "The trace has other experts than the predictor's model."
            got = header.num_experts if named else int(trace.expert_ids.max())
            allowed = self.num_experts if named else f"ids below {self.num_experts}"
            raise PredictorMismatchError(message(what, got=got, allowed=allowed, step=step))
        if self.vocabulary is not None and not has_tokens(trace, self.vocabulary):
            what = f"The predictor reads tokens ({self.vocabulary}), and the trace has none."
            raise PredictorMismatchError(message(what, step="Record the trace with them, or use a predictor that needs none."))
        if other:
            return f"The predictor was fitted for {self.model_id}, and is tried on {header.model_id}; shapes agree."
        if named:
            return None
        side, taken = ("trace", self.model_id) if self.model_id else ("predictor", header.model_id)
        return f"The {side} names no model; shapes agree, and it is taken for {taken or 'the same one'}."


class Predictor(ABC):
    """Base of all predictors; a subclass is final.

    Attributes
    ----------
    name : str
        The registered name.
    causal : bool
        Whether it keeps to the cut; one that does not is for comparison only.
    reads_tokens : bool
        Whether it needs a column of tokens.
    fitted_ : Fitted
        Set by :meth:`fit`.
    """

    name: ClassVar[str]
    causal: ClassVar[bool] = True
    reads_tokens: ClassVar[bool] = False
    fitted_: Fitted

    @abstractmethod
    def fit(self, trace: Trace, *, progress: Progress = quiet) -> Self:
        """Learn from the whole documents of ``trace``; returns the predictor itself.

        Raises
        ------
        TraceValueError
            Nothing to learn from.
        PredictorMismatchError
            No tokens where the predictor reads them.
        """

    @abstractmethod
    def scores_batch(self, trace: Trace, lead: Lead) -> Float32[np.ndarray, "T L E"]:
        """Likelihood of every expert, in [0, 1], for every token and MoE layer of whole documents, each in one piece.

        A causal predictor computes row t, layer l from what :func:`history` would hand it and nothing else.
        """

    @abstractmethod
    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Arrays and settings that :meth:`restore` needs."""

    @classmethod
    @abstractmethod
    def restore(cls, fitted: Fitted, arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> Self:
        """The fitted predictor that :meth:`state` described."""

    def scores(self, seen: Trace, moe_layer: int, lead: Lead) -> Float32[np.ndarray, " E"]:
        """Likelihood of every expert of one MoE layer for the last token of ``seen``.

        Parameters
        ----------
        seen : Trace
            What :func:`history` built.
        moe_layer : int
            Layer asked for.
        lead : int or "token"
            At most what ``seen`` was cut for.
        """
        return self.scores_batch(seen, lead)[-1, moe_layer]

    def require_fitted(self) -> Fitted:
        """What it was fitted for.

        Raises
        ------
        NotFittedError
            Before :meth:`fit`.
        """
        if not hasattr(self, "fitted_"):
            raise NotFittedError(message(f"The predictor {self.name!r} is not fitted.", step="Call fit, or load a saved one."))
        return self.fitted_


def token_kind(trace: Trace) -> TokenKind:
    """The column of tokens to learn from: texts where there are any, else ids.

    Raises
    ------
    PredictorMismatchError
        Neither.
    """
    for kind in _KINDS:
        if has_tokens(trace, kind):
            return kind
    what = "This predictor reads tokens, and the trace has neither texts nor ids of them."
    raise PredictorMismatchError(message(what, step="Record the trace with them, or choose a predictor that needs none."))


_KINDS: tuple[TokenKind, ...] = ("token", "token_id")


def has_tokens(trace: Trace, kind: TokenKind) -> bool:
    """Whether the column ``kind`` says anything: one that is all null, all empty texts or all -1 does not."""
    said = trace.tokens if kind == "token" else trace.token_id
    if said is None:
        return False
    if not len(trace):  # nothing at all, which is said in other words
        return True
    return any(said) if kind == "token" else bool((np.asarray(said) >= 0).any())
