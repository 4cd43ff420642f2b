"""Which experts come next: the contract of predictors, one predictor a file, and the evaluation that keeps them to the cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from swapless.errors import UsageError, message
from swapless.registry import Registry

if TYPE_CHECKING:
    from swapless.predict.predictor import Predictor

PREDICTORS = Registry(
    "predictor",
    "swapless.predictors",
    {
        "eam": "swapless.predict.eam:Eam",
        "expert_map": "swapless.predict.expert_map:ExpertMap",
        "linear": "swapless.predict.linear:Linear",
        "paper": "swapless.predict.paper:Paper",
        "popularity": "swapless.predict.popularity:Popularity",
        "previous_token": "swapless.predict.previous_token:PreviousToken",
        "token_prior": "swapless.predict.token_prior:TokenPrior",
        "transformer": "swapless.predict.transformer:Transformer",
    },
)

__all__ = ["PREDICTORS", "make_predictor"]


def make_predictor(kind: str, **options: Any) -> Predictor:
    """An unfitted predictor of a registered kind.

    Raises
    ------
    UnknownNameError
        No such kind; the message lists the known ones.
    UsageError
        An option that it does not take, or a value that cannot be.
    """
    found = PREDICTORS.get(kind)
    try:
        made: Predictor = found(**options)
    except TypeError as error:
        raise UsageError(message(f"The predictor {kind!r} cannot be made so.", got=str(error))) from error
    return made
