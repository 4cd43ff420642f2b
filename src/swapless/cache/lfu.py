"""Least frequently used, with counts that fade: a use one token ago weighs ``decay`` times a use now.

``decay=1`` never forgets (perfect LFU: counts of evicted experts are kept as well). Instead of fading every count at every
token, the weight of a new use grows by ``1 / decay``, which orders the counts the same way at no cost.
"""

from __future__ import annotations

from typing import NamedTuple, final

import numpy as np

from swapless.cache.policy import rules
from swapless.cache.residency import may_go
from swapless.errors import UsageError, message

_RESCALE_ABOVE = 1e200


class LfuState(NamedTuple):
    """``uses`` float64 (L*E,): faded uses; ``gain`` float64 (L,): weight of a use now; ``seen`` int64 (L,): demand sets
    already faded; ``growth`` float64 (1,): ``1 / decay``."""

    uses: np.ndarray
    gain: np.ndarray
    seen: np.ndarray
    growth: np.ndarray


def _on_access(state, residency, pool, key, hit, clock, phase):  # type: ignore[no-untyped-def]
    moe_layer = residency.layer_of_key[key]
    while state.seen[moe_layer] < residency.demand_sets[moe_layer]:
        state.seen[moe_layer] += 1
        state.gain[moe_layer] *= state.growth[0]
    if state.gain[moe_layer] > _RESCALE_ABOVE:  # all layers by one factor: a shared pool compares their counts
        factor = 1.0 / state.gain[moe_layer]
        for other in range(state.uses.size):
            state.uses[other] *= factor
        for other in range(state.gain.size):
            state.gain[other] *= factor
    state.uses[key] += state.gain[moe_layer]


def _victim(state, residency, pool, clock):  # type: ignore[no-untyped-def]
    best = np.int64(-1)
    lowest = np.inf
    for slot in range(residency.pool_start[pool], residency.pool_start[pool + 1]):
        count = state.uses[np.uint64(residency.key_of_slot[np.uint64(slot)])]
        better = may_go(residency, slot, clock) & (count < lowest)
        lowest = count if better else lowest
        best = np.int64(slot) if better else best
    return best


rules(LfuState, on_access=_on_access, victim=_victim)


@final
class Lfu:
    """Evicts the expert with the lowest faded count. Ties go to the lower slot.

    Parameters
    ----------
    decay : float
        What a use loses a token, in (0, 1]; 1 never forgets.

    Raises
    ------
    UsageError
        ``decay`` outside (0, 1].
    """

    name = "lfu"

    def __init__(self, decay: float = 0.95) -> None:
        if not 0 < decay <= 1:
            raise UsageError(message("decay of the lfu policy must lie in (0, 1].", got=decay))
        self.decay = decay

    def state(self, num_moe_layers: int, num_experts: int, pools: int) -> LfuState:
        """No uses yet."""
        return LfuState(
            uses=np.zeros(num_moe_layers * num_experts),
            gain=np.ones(num_moe_layers),
            seen=np.zeros(num_moe_layers, np.int64),
            growth=np.array([1 / self.decay]),
        )


@final
class PerfectLfu:
    """Evicts the expert with the fewest uses since the start, those before an eviction included. Ties: the lower slot."""

    name = "lfu-perfect"

    def state(self, num_moe_layers: int, num_experts: int, pools: int) -> LfuState:
        """No uses yet."""
        return Lfu(decay=1.0).state(num_moe_layers, num_experts, pools)
