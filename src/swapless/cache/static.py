"""Fixed popularity: the most popular experts stay for good, whatever the text does."""

from __future__ import annotations

from typing import Any, NamedTuple, final

import numpy as np

from swapless.cache.policy import rules
from swapless.cache.residency import may_go
from swapless.errors import UsageError, message


class StaticState(NamedTuple):
    """``uses`` float64 (L*E,): popularity; ``settle`` int64 (1,): demand sets of a layer that still count."""

    uses: np.ndarray
    settle: np.ndarray


def _on_access(state, residency, pool, key, hit, clock, phase):  # type: ignore[no-untyped-def]
    if residency.demand_sets[residency.layer_of_key[key]] <= state.settle[0]:
        state.uses[key] += 1.0


def _victim(state, residency, pool, clock):  # type: ignore[no-untyped-def]
    best = np.int64(-1)
    lowest = np.inf
    for slot in range(residency.pool_start[pool], residency.pool_start[pool + 1]):
        uses = state.uses[np.uint64(residency.key_of_slot[np.uint64(slot)])]
        better = may_go(residency, slot, clock) & (uses < lowest)
        lowest = uses if better else lowest
        best = np.int64(slot) if better else best
    return best


rules(StaticState, on_access=_on_access, victim=_victim)


@final
class Static:
    """Evicts the least popular: the most popular are never gone, and one slot is shared by all that are not among them.

    Parameters
    ----------
    popularity : array of shape (L, E), optional
        Uses of each expert in another trace. Left out, the first ``settle_tokens`` tokens of each MoE layer are counted.
    settle_tokens : int
        Tokens that are counted where no popularity is given.

    Raises
    ------
    UsageError
        Fewer than one token to count, or a popularity of another shape.
    """

    name = "static"

    def __init__(self, popularity: Any = None, settle_tokens: int = 1000) -> None:
        if settle_tokens < 1:
            raise UsageError(message("settle_tokens of the static policy must be at least 1.", got=settle_tokens))
        self.popularity = popularity
        self.settle_tokens = settle_tokens

    def state(self, num_moe_layers: int, num_experts: int, pools: int) -> StaticState:
        """The given popularity, or none yet."""
        uses = np.zeros((num_moe_layers, num_experts))
        if self.popularity is None:
            return StaticState(uses=uses.reshape(-1), settle=np.array([self.settle_tokens], np.int64))
        given = np.asarray(self.popularity, np.float64)
        if given.shape != uses.shape:
            raise UsageError(message("popularity has the wrong shape.", got=given.shape, allowed=f"(L, E) = {uses.shape}"))
        if not np.isfinite(given).all():
            raise UsageError(message("popularity must be finite numbers."))
        return StaticState(uses=given.reshape(-1).copy(), settle=np.zeros(1, np.int64))
