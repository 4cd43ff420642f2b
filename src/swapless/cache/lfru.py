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
    best = np.int32(-1)
    fewest, longest = np.inf, 1.0
    for slot in range(residency.pool_start[pool], residency.pool_start[pool + 1]):
        if may_go(residency, slot, clock):
            key = residency.key_of_slot[slot]
            age = np.float64(residency.demand_sets[residency.layer_of_key[key]] - state.last[key] + 1)
            # uses / age < fewest / longest without dividing: exact, since both are whole numbers.
            if state.uses[key] * longest < fewest * age:
                fewest, longest = state.uses[key], age
                best = np.int32(slot)
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
