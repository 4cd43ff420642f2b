"""Which of two policies to follow, LRU or the one that values experts: what each would have hit says it, in ghosts of a cache.

The real cache tells of the policy that is followed. Of the other a *ghost* does, a list of what it would hold: that of LRU is a
ring of keys, always kept, at little cost; that of the values is kept only while LRU is followed. Hits of the values less those
of LRU are added up. The values are followed once they are ``needed`` hits ahead of where they were worst, and given up once
they are 16 + 6 L hits behind where they were best, or 32 + L behind where following them began: that bounds what they can cost.
Each time that they are given up doubles what they must be ahead the next time, so routing that turns against them again and
again does so but a few times; what they gain makes it cheaper again.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from swapless.cache._next_use import predict
from swapless.cache.compiled import compiled_apart
from swapless.cache.ring import empty_ring, push, unlink

LEAST = 48
"""Hits ahead at which the values are first followed."""
_MOST = 1 << 40
# The MoE layers of a token are right or wrong together, so what is chance grows with their number L.
_LOST, _LOST_A_LAYER = 16, 6
_SPENT, _SPENT_A_LAYER = 32, 1


def new_rivals(keys: int, pools: int) -> dict[str, np.ndarray]:
    """Empty ghosts, and LRU followed: a part of the policy's state."""
    return {
        "ring_before": empty_ring(keys, pools),
        "ring_after": empty_ring(keys, pools),
        "recent": np.zeros(keys, np.uint8),
        "recent_held": np.zeros(pools, np.int64),
        "valued": np.zeros(keys, np.uint8),
        "valued_held": np.zeros(pools, np.int64),
        "asked_at": np.full(keys, -1, np.int64),
        "followed": np.zeros(1, np.uint8),
        "ahead": np.zeros(1, np.int64),
        "gained": np.zeros(1, np.int64),
        "needed": np.full(1, LEAST, np.int64),
    }


@compiled_apart
def compare(state: Any, residency: Any, moe_layer: int, experts: Any, decode: bool) -> None:
    """Judge a demand set by both, before the cache serves it, and bring the ghosts up to date."""
    pool, base = np.int64(residency.pool_of_layer[moe_layer]), moe_layer * state.value.shape[1]
    room = np.int64(residency.pool_start[pool + 1]) - np.int64(residency.pool_start[pool])
    if decode:
        change = np.int64(0)
        for i in range(len(experts)):
            key = base + experts[i]
            ours = residency.slot_of_key[key] >= 0 if state.followed[0] else state.valued[key] > 0
            change += np.int64(ours) - np.int64(state.recent[key])
        _decide(state, residency, change)
    head = state.recent.size + pool
    for i in range(len(experts)):
        key = base + experts[i]
        state.asked_at[key] = residency.clock[0]
        if state.recent[key]:
            unlink(state.ring_before, state.ring_after, key)
        elif not decode and state.recent_held[pool] >= room:
            continue  # prefill takes only what is free
        else:
            state.recent[key] = 1
            state.recent_held[pool] += 1
        push(state.ring_before, state.ring_after, head, key)
    while state.recent_held[pool] > room:
        oldest = state.ring_before[head]
        unlink(state.ring_before, state.ring_after, oldest)
        state.recent[oldest] = 0
        state.recent_held[pool] -= 1
    if not state.followed[0]:
        for i in range(len(experts)):
            key = base + experts[i]
            if state.valued[key] == 0 and room > 0:
                if state.valued_held[pool] >= room and not (decode and _give_up_one(state, residency, pool)):
                    continue
                state.valued[key] = 1
                state.valued_held[pool] += 1


@compiled_apart
def _decide(state: Any, residency: Any, change: int) -> None:
    if not state.followed[0]:
        state.ahead[0] = max(0, state.ahead[0] + change)
        if state.ahead[0] >= state.needed[0]:
            state.followed[0] = 1
            state.ahead[0] = state.gained[0] = 0
        return
    state.ahead[0] = min(0, state.ahead[0] + change)
    state.gained[0] += change
    layers = len(residency.pool_of_layer)
    lost, spent = -_LOST - _LOST_A_LAYER * layers, -_SPENT - _SPENT_A_LAYER * layers
    if state.ahead[0] <= lost or state.gained[0] <= spent:
        state.followed[0] = 0
        state.ahead[0] = 0
        state.needed[0] = min(2 * state.needed[0], _MOST)
        state.valued_held[:] = 0
        for key in range(state.valued.size):
            state.valued[key] = residency.slot_of_key[key] >= 0
            state.valued_held[residency.pool_of_layer[residency.layer_of_key[key]]] += np.int64(state.valued[key])
    elif state.gained[0] >= state.needed[0]:
        state.needed[0] = max(LEAST, state.needed[0] // 2)


@compiled_apart
def _give_up_one(state: Any, residency: Any, pool: int) -> bool:
    """Drop the expert of least value from the ghost of the values, none of those just asked for; whether there was one."""
    lowest, worst = np.float32(np.inf), np.int64(-1)
    num_experts = state.value.shape[1]
    for moe_layer in range(len(residency.pool_of_layer)):
        if residency.pool_of_layer[moe_layer] == pool:
            if state.valued_at[moe_layer] < 0:
                predict(state, moe_layer)
                state.valued_at[moe_layer] = 0
            for expert in range(num_experts):
                key = moe_layer * num_experts + expert
                if state.valued[key] and state.asked_at[key] != residency.clock[0] and state.value[moe_layer, expert] < lowest:
                    lowest = state.value[moe_layer, expert]
                    worst = key
    if worst < 0:
        return False
    state.valued[worst] = 0
    state.valued_held[pool] -= 1
    return True
