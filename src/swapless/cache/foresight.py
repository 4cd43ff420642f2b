"""What is foreseen of a trace's routing, in the form that the timeline reads ahead by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from swapless.errors import UsageError, message
from swapless.trace import Trace

CLAIRVOYANT = "clairvoyant"
LEVELS = 256
"""Steps of likelihood; the lowest stands for an expert that is never read ahead."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Foresight:
    """A predictor's word on every token of one trace, and what it takes.

    Parameters
    ----------
    predictor : str
        What it is called.
    lead : int or "token"
        MoE layers between the moment of a prediction and its use, at least 1; ``"token"``: all before the token starts.
        The first ``lead`` layers are foreseen as the token begins.
    levels : uint8 ndarray of shape (T, L, E)
        How likely each expert is, made with the same lead. Only their order counts: what a level is worth the timeline
        learns as it goes. An expert at level 0 is never read ahead.
    width : int, optional
        Experts foreseen a MoE layer, by default K.
    staging_experts : int, optional
        Room for what was read ahead, by default what :func:`~swapless.cache.timeline.staging_room` finds.
    token_s : float
        Seconds a token that the predictor computes, spread evenly over the moments at which it predicts.

    Raises
    ------
    UsageError
        A lead, width, room or time that cannot be.
    """

    predictor: str
    lead: int | Literal["token"]
    levels: np.ndarray
    width: int | None = None
    staging_experts: int | None = None
    token_s: float = 0.0

    def __post_init__(self) -> None:
        least = {"lead": 1, "width": 1, "staging_experts": 0, "token_s": 0}
        for name, value in ((name, getattr(self, name)) for name in least):
            if value is not None and value != "token" and not value >= least[name]:
                raise UsageError(message(f"{name} of a foresight must be at least {least[name]}.", got=value))

    @property
    def num_moe_layers(self) -> int:
        """L."""
        return int(self.levels.shape[1])

    def lead_layers(self) -> int:
        """The lead in MoE layers; L stands for before the token."""
        return self.num_moe_layers if self.lead == "token" else self.lead

    def passes(self) -> int:
        """Moments of a token at which it predicts: before it, and after each MoE layer that another follows at the lead."""
        return 1 + max(0, self.num_moe_layers - self.lead_layers())

    def check(self, trace: Trace) -> Foresight:
        """Itself, if it is of this trace.

        Raises
        ------
        UsageError
            Levels of another shape or type.
        """
        wanted = (len(trace), trace.num_moe_layers, trace.num_experts)
        if self.levels.shape != wanted or self.levels.dtype != np.uint8:
            got, allowed = f"{self.levels.dtype} {self.levels.shape}", f"uint8 (T, L, E) = {wanted}"
            raise UsageError(message("The levels have the wrong shape or type.", got=got, allowed=allowed))
        return self


def levels_of(trace: Trace, pieces: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Levels of a whole trace, uint8 (T, L, E), from pieces of row numbers and likelihoods in [0, 1].

    Rows that no piece names, and likelihoods of 0, stand at level 0.

    Examples
    --------
    >>> from swapless.trace import TraceHeader
    >>> header = TraceHeader(model_id=None, num_experts=2, top_k=1, moe_blocks=(0,))
    >>> trace = Trace.from_arrays(header, expert_ids=[[[0]], [[1]]])
    >>> levels_of(trace, [(np.array([1]), np.array([[[0.001, 1.0]]]))]).tolist()
    [[[0, 0]], [[1, 255]]]
    """
    levels = np.zeros((len(trace), trace.num_moe_layers, trace.num_experts), np.uint8)
    for rows, scores in pieces:
        experts = min(scores.shape[2], trace.num_experts)  # a predictor may know more experts than a trace without a name has
        levels[rows, :, :experts] = np.ceil(np.clip(scores[:, :, :experts], 0, 1) * (LEVELS - 1)).astype(np.uint8)
    return levels


def clairvoyant(trace: Trace, lead: int | Literal["token"], **more: Any) -> Foresight:
    """Foresight that knows what each token will be routed to: the bound of every predictor at that lead."""
    levels = np.zeros((len(trace), trace.num_moe_layers, trace.num_experts), np.uint8)
    token, layer, place = np.nonzero(trace.expert_ids >= 0)
    levels[token, layer, trace.expert_ids[token, layer, place]] = LEVELS - 1
    return Foresight(predictor=CLAIRVOYANT, lead=lead, levels=levels, **more)
