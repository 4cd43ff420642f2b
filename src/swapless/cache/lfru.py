"""Least frequently and recently used: uses so far over the tokens since the last one."""

from __future__ import annotations

from typing import NamedTuple, final

import numpy as np

from swapless.cache.policy import rules
from swapless.cache.residency import may_go


class LfruState(NamedTuple):
    """``uses`` float64 (L*E,); ``last`` int64 (L*E,): the demand set of the key's layer that used it last."""

    uses: np.ndarray
    last: np.ndarray


def _on_access(state, residency, pool, key, hit, clock, phase):  # type: ignore[no-untyped-def]
    state.uses[key] += 1.0
    state.last[key] = residency.demand_sets[residency.layer_of_key[key]]


def _victim(state, residency, pool, clock):  # type: ignore[no-untyped-def]
    best = np.int64(-1)
    fewest, longest = np.inf, 1.0
    for slot in range(residency.pool_start[pool], residency.pool_start[pool + 1]):
        key = np.uint64(residency.key_of_slot[np.uint64(slot)])
        now = residency.demand_sets[np.uint64(residency.layer_of_key[key])]
        uses, age = state.uses[key], np.float64(now - state.last[key] + 1)
        # uses / age < fewest / longest without dividing: exact, since both are whole numbers.
        better = may_go(residency, slot, clock) & (uses * longest < fewest * age)
        fewest = uses if better else fewest
        longest = age if better else longest
        best = np.int64(slot) if better else best
    return best


rules(LfruState, on_access=_on_access, victim=_victim)


@final
class Lfru:
    """Evicts the lowest uses / (tokens since the last use + 1); uses of evicted experts are kept. Ties: the lower slot."""

    name = "lfru"

    def state(self, num_moe_layers: int, num_experts: int, pools: int) -> LfruState:
        """No uses yet."""
        keys = num_moe_layers * num_experts
        return LfruState(uses=np.zeros(keys), last=np.zeros(keys, np.int64))
