"""From ``--prefetch`` to what the timeline reads ahead by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swapless.cache.foresight import Foresight
    from swapless.cli.out import ProgressCall
    from swapless.trace import Trace


class Prefetch:
    """What ``--prefetch`` names, read before the trace is.

    Parameters
    ----------
    name : str
        A predictor's file, or ``clairvoyant``.
    lead : str
        As ``--lead`` has it.
    token_s : float
        What the predictor computes a token.

    Raises
    ------
    PredictorError, UsageError
        No such file, or no such lead.
    """

    def __init__(self, name: str, lead: str, token_s: float) -> None:
        from swapless.cache.foresight import CLAIRVOYANT
        from swapless.predict.predictor import parse_lead
        from swapless.predict.saved import load_predictor

        self.predictor = None if name == CLAIRVOYANT else load_predictor(Path(name))
        self.lead = parse_lead(lead)
        self.token_s = token_s

    def of(self, trace: Trace, progress: ProgressCall, note: Callable[[str], None]) -> Foresight:
        """Its word on every row of ``trace``.

        Raises
        ------
        PredictorError, UsageError
            A predictor of another model, one that looks beyond the cut, or a lead beyond the model's MoE layers.
        """
        from swapless.cache.foresight import Foresight, clairvoyant, levels_of
        from swapless.predict.evaluate import scores_of
        from swapless.predict.predictor import check_lead

        more: dict[str, Any] = {"lead": check_lead(self.lead, trace.num_moe_layers), "token_s": self.token_s}
        if self.predictor is None:
            return clairvoyant(trace, **more)
        levels = levels_of(trace, scores_of(self.predictor, trace, self.lead, progress=progress, warn=note))
        return Foresight(predictor=self.predictor.name, levels=levels, **more)
