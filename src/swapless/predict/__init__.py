"""Which experts come next: the contract of predictors, one predictor a file, and the evaluation that keeps them to the cut."""

from __future__ import annotations

from swapless.registry import Registry

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

__all__ = ["PREDICTORS"]
