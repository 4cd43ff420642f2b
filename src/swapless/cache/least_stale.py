"""Least stale: evict first what this forward pass has gone past, because its next use is a whole pass away."""

from __future__ import annotations

from typing import NamedTuple, final

import numpy as np

from swapless.cache.policy import rules
from swapless.cache.residency import may_go

_AHEAD = 1 << 61  # more than any clock


class LeastStaleState(NamedTuple):
    """``last`` int64 (L*E,): the clock of the key's last use."""

    last: np.ndarray


def _on_access(state, residency, pool, key, hit, clock, phase):  # type: ignore[no-untyped-def]
    state.last[key] = clock


def _victim(state, residency, pool, clock):  # type: ignore[no-untyped-def]
    best = np.int64(-1)
    # Uses are put on one scale on which all layers still to come lie behind those gone past.
    oldest = np.int64(2 * _AHEAD)
    for slot in range(residency.pool_start[pool], residency.pool_start[pool + 1]):
        key = np.uint64(residency.key_of_slot[np.uint64(slot)])
        ahead = np.int64(residency.layer_of_key[key] > residency.asking[0])
        last = state.last[key] + ahead * _AHEAD
        better = may_go(residency, slot, clock) & (last < oldest)
        oldest = last if better else oldest
        best = np.int64(slot) if better else best
    return best


rules(LeastStaleState, on_access=_on_access, victim=_victim)


@final
class LeastStale:
    """Evicts among the MoE layers up to the present one first, then among those still to come; the oldest use first in both.

    With one pool a layer this is LRU, ties going to the lower slot.
    """

    name = "least_stale"

    def state(self, num_moe_layers: int, num_experts: int, pools: int) -> LeastStaleState:
        """No uses yet."""
        return LeastStaleState(last=np.zeros(num_moe_layers * num_experts, np.int64))
