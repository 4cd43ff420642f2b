"""Least recently used, as one linked list a pool: constant work a request whatever the capacity."""

from __future__ import annotations

from typing import NamedTuple, final

import numpy as np

from swapless.cache.policy import rules
from swapless.cache.residency import may_go


class LruState(NamedTuple):
    """``before`` and ``after`` int32 (L*E + pools,): neighbours in the ring of a pool, whose head is ``L*E + pool``.

    ``after[head]`` is the most recent key, ``before[head]`` the least recent. A key outside the ring points to itself.
    """

    before: np.ndarray
    after: np.ndarray


def _on_access(state, residency, pool, key, hit, clock, phase):  # type: ignore[no-untyped-def]
    if hit:
        b, a = state.before[key], state.after[key]
        state.after[b] = a
        state.before[a] = b
        head = residency.slot_of_key.size + pool
        newest = state.after[head]
        state.before[key] = head
        state.after[key] = newest
        state.before[newest] = key
        state.after[head] = key


def _on_insert(state, residency, pool, key, clock, phase):  # type: ignore[no-untyped-def]
    head = residency.slot_of_key.size + pool
    newest = state.after[head]
    state.before[key] = head
    state.after[key] = newest
    state.before[newest] = key
    state.after[head] = key


def _on_evict(state, residency, pool, key, clock):  # type: ignore[no-untyped-def]
    b, a = state.before[key], state.after[key]
    state.after[b] = a
    state.before[a] = b
    state.before[key] = key
    state.after[key] = key


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
    """Evicts the expert used longest ago. Within one demand set, experts used by more tokens count as more recent."""

    name = "lru"

    def state(self, num_moe_layers: int, num_experts: int, pools: int) -> LruState:
        """Empty rings."""
        everyone = np.arange(num_moe_layers * num_experts + pools, dtype=np.int32)
        return LruState(everyone.copy(), everyone)
