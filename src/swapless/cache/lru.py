"""Least recently used, as one linked list a pool: constant work a request whatever the capacity."""

from __future__ import annotations

from typing import Any, NamedTuple, final

import numpy as np

from swapless.cache.compiled import compiled
from swapless.cache.policy import rules
from swapless.cache.residency import may_go
from swapless.cache.ring import empty_ring, renew


class LruState(NamedTuple):
    """One ring of slots a pool, with head ``L*E + pool``; a slot joins at its first use and stays, for what is evicted makes
    room at once for what comes: one move to the front serves hit and miss alike."""

    before: np.ndarray
    after: np.ndarray


def _on_access(state, residency, pool, key, hit, clock, phase):  # type: ignore[no-untyped-def]
    if hit:
        _renewed(state, residency, pool, key)


def _on_insert(state, residency, pool, key, clock, phase):  # type: ignore[no-untyped-def]
    _renewed(state, residency, pool, key)


@compiled
def _renewed(state: Any, residency: Any, pool: Any, key: Any) -> None:
    head = np.uint64(residency.slot_of_key.size) + np.uint64(pool)
    renew(state.before, state.after, head, np.uint64(residency.slot_of_key[key]))


def _victim(state, residency, pool, clock):  # type: ignore[no-untyped-def]
    head = np.uint64(residency.slot_of_key.size) + np.uint64(pool)
    slot = np.uint64(state.before[head])
    # No slot is free now, so each in the ring holds an expert.
    while slot != head:
        if may_go(residency, slot, clock):
            return np.int64(slot)
        slot = np.uint64(state.before[slot])
    return np.int64(-1)


rules(LruState, on_access=_on_access, on_insert=_on_insert, victim=_victim)


@final
class Lru:
    """Evicts the expert used longest ago. Within one demand set, the later in its list is the more recent."""

    name = "lru"

    def state(self, num_moe_layers: int, num_experts: int, pools: int) -> LruState:
        """Empty rings."""
        keys = num_moe_layers * num_experts
        return LruState(empty_ring(keys, pools), empty_ring(keys, pools))
