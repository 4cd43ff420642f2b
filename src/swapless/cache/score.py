"""Mean router score of all experts, losers too: an expert that often comes close will be chosen soon."""

from __future__ import annotations

from typing import NamedTuple, final

import numpy as np

from swapless.cache.policy import rules
from swapless.cache.residency import may_go
from swapless.errors import UsageError, message


class ScoreState(NamedTuple):
    """``mean`` float64 (L*E,): faded mean of the router's output; ``decay`` float64 (1,)."""

    mean: np.ndarray
    decay: np.ndarray


def _on_scores(state, residency, moe_layer, scores):  # type: ignore[no-untyped-def]
    base = moe_layer * len(scores)
    for expert in range(len(scores)):
        mean = state.mean[base + expert]
        state.mean[base + expert] = state.decay[0] * mean + (1.0 - state.decay[0]) * scores[expert]


def _victim(state, residency, pool, clock):  # type: ignore[no-untyped-def]
    best = np.int32(-1)
    lowest = np.inf
    for slot in range(residency.pool_start[pool], residency.pool_start[pool + 1]):
        if may_go(residency, slot, clock):
            mean = state.mean[residency.key_of_slot[slot]]
            if mean < lowest or best < 0:
                lowest = mean
                best = np.int32(slot)
    return best


rules(ScoreState, on_scores=_on_scores, victim=_victim)


@final
class Score:
    """Evicts the lowest mean score. After SMoE (arXiv 2508.18983); departs: the mean fades instead of ending after n tokens.

    Parameters
    ----------
    decay : float
        What a score loses a token, in (0, 1).

    Raises
    ------
    UsageError
        ``decay`` outside (0, 1).
    """

    name = "score"
    needs_scores = True

    def __init__(self, decay: float = 0.9) -> None:
        if not 0 < decay < 1:
            raise UsageError(message("decay of the score policy must lie in (0, 1).", got=decay))
        self.decay = decay

    def state(self, num_moe_layers: int, num_experts: int, pools: int) -> ScoreState:
        """All means zero."""
        return ScoreState(mean=np.zeros(num_moe_layers * num_experts), decay=np.array([self.decay]))
