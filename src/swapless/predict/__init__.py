"""Which experts come next: the contract of predictors, one predictor a file, and the evaluation that keeps them to the cut.

A predictor of one's own needs ``Predictor``, ``Fitted``, ``Lead``, ``known_layers`` and ``quiet`` from here; see
``docs/add-a-predictor.md``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from swapless.errors import UsageError, message
from swapless.registry import Registry, exported

if TYPE_CHECKING:
    from swapless.predict.predictor import Fitted as Fitted
    from swapless.predict.predictor import Lead as Lead
    from swapless.predict.predictor import Predictor as Predictor
    from swapless.predict.predictor import known_layers as known_layers
    from swapless.predict.predictor import quiet as quiet
    from swapless.predict.saved import load_predictor as load_predictor
    from swapless.predict.saved import save_predictor as save_predictor

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

_LAZY = {  # they bring the compiler along
    "Fitted": "swapless.predict.predictor",
    "Lead": "swapless.predict.predictor",
    "Predictor": "swapless.predict.predictor",
    "known_layers": "swapless.predict.predictor",
    "load_predictor": "swapless.predict.saved",
    "quiet": "swapless.predict.predictor",
    "save_predictor": "swapless.predict.saved",
}
__all__ = ["PREDICTORS", "make_predictor", *sorted(_LAZY)]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    return exported(__name__, _LAZY, name)


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
