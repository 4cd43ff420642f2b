"""Least recently used, as one linked list a pool: constant work a request whatever the capacity."""

from __future__ import annotations

from typing import NamedTuple, final

import numpy as np

from swapless.cache.policy import rules
from swapless.cache.residency import may_go
from swapless.cache.ring import empty_ring, push, renew, unlink


class LruState(NamedTuple):
    """One ring a pool, with head ``L*E + pool``."""

    before: np.ndarray
    after: np.ndarray


def _on_access(state, residency, pool, key, hit, clock, phase):  # type: ignore[no-untyped-def]
    if hit:
        renew(state.before, state.after, residency.slot_of_key.size + pool, key)


def _on_insert(state, residency, pool, key, clock, phase):  # type: ignore[no-untyped-def]
    push(state.before, state.after, residency.slot_of_key.size + pool, key)


def _on_evict(state, residency, pool, key, clock):  # type: ignore[no-untyped-def]
    unlink(state.before, state.after, key)


def _victim(state, residency, pool, clock):  # type: ignore[no-untyped-def]
    head = residency.slot_of_key.size + pool
    key = state.before[head]
    while key != head:
        slot = residency.slot_of_key[key]
        if may_go(residency, slot, clock):
            return slot
        key = state.before[key]
    return np.int32(-1)


rules(LruState, on_access=_on_access, on_insert=_on_insert, on_evict=_on_evict, victim=_victim)


@final
class Lru:
    """Evicts the expert used longest ago. Within one demand set, the later in its list is the more recent."""

    name = "lru"

    def state(self, num_moe_layers: int, num_experts: int, pools: int) -> LruState:
        """Empty rings."""
        keys = num_moe_layers * num_experts
        return LruState(empty_ring(keys, pools), empty_ring(keys, pools))
