"""S3-FIFO: a small queue sifts out what is used once, a main queue keeps the rest, a ghost queue remembers who left early."""

from __future__ import annotations

from typing import NamedTuple, final

import numpy as np

from swapless.cache.policy import rules
from swapless.cache.residency import may_go
from swapless.cache.ring import empty_ring, push, unlink

_SMALL, _MAIN, _GHOST = 1, 2, 3
_MOST_USES = 3


class S3FifoState(NamedTuple):
    """Three queues a pool: small, main, ghost, with heads ``L*E + queue * pools + pool``.

    ``where`` uint8 (L*E,): 0 = nowhere, else the queue + 1. ``uses`` uint8 (L*E,): up to 3 since the key entered its queue.
    ``small_count`` and ``ghost_count`` int32 (pools,): their lengths.
    """

    before: np.ndarray
    after: np.ndarray
    where: np.ndarray
    uses: np.ndarray
    small_count: np.ndarray
    ghost_count: np.ndarray


def _on_access(state, residency, pool, key, hit, clock, phase):  # type: ignore[no-untyped-def]
    if hit and state.uses[key] < _MOST_USES:
        state.uses[key] += 1


def _on_insert(state, residency, pool, key, clock, phase):  # type: ignore[no-untyped-def]
    head = residency.slot_of_key.size + pool
    state.uses[key] = 0
    if state.where[key] == _GHOST:
        unlink(state.before, state.after, key)
        state.ghost_count[pool] -= 1
        state.where[key] = _MAIN
        push(state.before, state.after, head + state.small_count.size, key)
    else:
        state.small_count[pool] += 1
        state.where[key] = _SMALL
        push(state.before, state.after, head, key)


def _on_evict(state, residency, pool, key, clock):  # type: ignore[no-untyped-def]
    unlink(state.before, state.after, key)
    if state.where[key] == _SMALL:
        ghosts = residency.slot_of_key.size + 2 * state.small_count.size + pool
        state.small_count[pool] -= 1
        state.where[key] = _GHOST
        push(state.before, state.after, ghosts, key)
        state.ghost_count[pool] += 1
        if state.ghost_count[pool] > residency.pool_start[pool + 1] - residency.pool_start[pool]:
            oldest = state.before[ghosts]
            unlink(state.before, state.after, oldest)
            state.where[oldest] = 0
            state.ghost_count[pool] -= 1
    else:
        state.where[key] = 0


def _victim(state, residency, pool, clock):  # type: ignore[no-untyped-def]
    small = residency.slot_of_key.size + pool
    main = small + state.small_count.size
    slots = residency.pool_start[pool + 1] - residency.pool_start[pool]
    # Pinned experts are stepped over. Used ones move on; each move costs uses, so every walk ends.
    if state.small_count[pool] >= max(1, slots // 10):
        key = state.before[small]
        while key != small:
            newer = state.before[key]
            slot = residency.slot_of_key[key]
            if may_go(residency, slot, clock):
                if state.uses[key] <= 1:
                    return slot
                unlink(state.before, state.after, key)
                push(state.before, state.after, main, key)
                state.where[key] = _MAIN
                state.uses[key] = 0
                state.small_count[pool] -= 1
            key = newer
    key = state.before[main]
    while key != main:
        newer = state.before[key]
        slot = residency.slot_of_key[key]
        if may_go(residency, slot, clock):
            if state.uses[key] == 0:
                return slot
            state.uses[key] -= 1
            unlink(state.before, state.after, key)
            push(state.before, state.after, main, key)
            if newer == main:
                newer = key
        key = newer
    key = state.before[small]
    while key != small:
        slot = residency.slot_of_key[key]
        if may_go(residency, slot, clock):
            return slot
        key = state.before[key]
    return np.int32(-1)


rules(S3FifoState, on_access=_on_access, on_insert=_on_insert, on_evict=_on_evict, victim=_victim)


@final
class S3Fifo:
    """Small queue of a tenth of the slots, ghosts as many as slots. After Yang et al., SOSP 2023, with pinning."""

    name = "s3fifo"

    def state(self, num_moe_layers: int, num_experts: int, pools: int) -> S3FifoState:
        """Empty queues."""
        keys = num_moe_layers * num_experts
        return S3FifoState(
            before=empty_ring(keys, 3 * pools),
            after=empty_ring(keys, 3 * pools),
            where=np.zeros(keys, np.uint8),
            uses=np.zeros(keys, np.uint8),
            small_count=np.zeros(pools, np.int32),
            ghost_count=np.zeros(pools, np.int32),
        )
