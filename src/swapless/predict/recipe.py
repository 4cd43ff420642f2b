"""How the learned predictor is trained: a checkpoint of another recipe is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from swapless.errors import UsageError, message


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Settings of a training.

    Parameters
    ----------
    epochs : int
        Passes over the training documents; the learning rate falls to nearly zero at the end of the last.
    minutes : float
        Above 0: choose ``epochs`` so that training takes about this long, by the speed of the first steps.
    batch_tokens : int
        Tokens a step.
    learning_rate, weight_decay, dropout : float
        Of AdamW, at the top of the cycle, and of hidden units.
    unknown : float
        Share of the tokens shown as if never seen.
    held_out : float
        Share of the documents, the last ones, that only early stopping sees.
    patience : int
        Epochs without a better recall on them before training stops.
    seed : int
        Of all randomness.

    Raises
    ------
    UsageError
        A value that cannot be.
    """

    epochs: int = 12
    minutes: float = 0.0
    batch_tokens: int = 1024
    learning_rate: float = 2e-3
    weight_decay: float = 0.2
    dropout: float = 0.3
    unknown: float = 0.1
    held_out: float = 0.04
    patience: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        whole = ("epochs", "batch_tokens", "patience")
        for item in fields(self):
            value = getattr(self, item.name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            least = 1 if item.name in whole else 0
            most = 1 if item.name in ("dropout", "unknown", "held_out") else math.inf
            exact = item.name not in (*whole, "seed") or isinstance(value, int)
            if not number or not exact or not least <= value <= most or (most == 1 and value == 1):
                allowed = f"{'an int of ' if item.name in (*whole, 'seed') else ''}at least {least}"
                allowed += ", below 1" if most == 1 else ""
                raise UsageError(message(f"{item.name} of a training cannot be.", got=repr(value), allowed=allowed))
