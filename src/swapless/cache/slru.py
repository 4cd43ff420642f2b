"""Segmented LRU: what was used twice is protected from what was used once."""

from __future__ import annotations

from typing import NamedTuple, final

import numpy as np

from swapless.cache.policy import rules
from swapless.cache.residency import may_go
from swapless.cache.ring import empty_ring, push, unlink
from swapless.errors import UsageError, message


class SlruState(NamedTuple):
    """Two rings a pool, heads ``L*E + pool`` (probation) and ``L*E + pools + pool`` (protected).

    ``protected`` uint8 (L*E,): the key is in the second, which holds ``protected_count`` int32 (pools,) of ``share`` (1,).
    """

    before: np.ndarray
    after: np.ndarray
    protected: np.ndarray
    protected_count: np.ndarray
    share: np.ndarray


def _on_access(state, residency, pool, key, hit, clock, phase):  # type: ignore[no-untyped-def]
    if hit:
        probation = residency.slot_of_key.size + pool
        head = probation + state.protected_count.size
        unlink(state.before, state.after, key)
        push(state.before, state.after, head, key)
        if not state.protected[key]:
            state.protected[key] = 1
            state.protected_count[pool] += 1
            slots = residency.pool_start[pool + 1] - residency.pool_start[pool]
            if state.protected_count[pool] > state.share[0] * slots:
                oldest = state.before[head]
                unlink(state.before, state.after, oldest)
                push(state.before, state.after, probation, oldest)
                state.protected[oldest] = 0
                state.protected_count[pool] -= 1


def _on_insert(state, residency, pool, key, clock, phase):  # type: ignore[no-untyped-def]
    push(state.before, state.after, residency.slot_of_key.size + pool, key)


def _on_evict(state, residency, pool, key, clock):  # type: ignore[no-untyped-def]
    unlink(state.before, state.after, key)
    state.protected_count[pool] -= state.protected[key]
    state.protected[key] = 0


def _victim(state, residency, pool, clock):  # type: ignore[no-untyped-def]
    for segment in range(2):
        head = residency.slot_of_key.size + segment * state.protected_count.size + pool
        key = state.before[head]
        while key != head:
            slot = residency.slot_of_key[key]
            if may_go(residency, slot, clock):
                return slot
            key = state.before[key]
    return np.int32(-1)


rules(SlruState, on_access=_on_access, on_insert=_on_insert, on_evict=_on_evict, victim=_victim)


@final
class Slru:
    """New experts enter on probation and are protected from their second use on; the oldest on probation goes first.

    Parameters
    ----------
    protected_share : float
        Largest part of the slots that may be protected, in (0, 1).

    Raises
    ------
    UsageError
        ``protected_share`` outside (0, 1).
    """

    name = "slru"

    def __init__(self, protected_share: float = 0.8) -> None:
        if not 0 < protected_share < 1:
            raise UsageError(message("protected_share of the slru policy must lie in (0, 1).", got=protected_share))
        self.protected_share = protected_share

    def state(self, num_moe_layers: int, num_experts: int, pools: int) -> SlruState:
        """Empty rings."""
        keys = num_moe_layers * num_experts
        return SlruState(
            before=empty_ring(keys, 2 * pools),
            after=empty_ring(keys, 2 * pools),
            protected=np.zeros(keys, np.uint8),
            protected_count=np.zeros(pools, np.int32),
            share=np.array([self.protected_share]),
        )
