"""ARC: recency and frequency share the slots, and ghosts of both decide who gets more."""

from __future__ import annotations

from typing import NamedTuple, final

import numpy as np

from swapless.cache.policy import rules
from swapless.cache.residency import may_go
from swapless.cache.ring import empty_ring, push, unlink

_ONCE, _OFTEN, _GHOST_ONCE, _GHOST_OFTEN = 0, 1, 2, 3
_NOWHERE = 4


class ArcState(NamedTuple):
    """Four lists a pool: used once, used often, and the ghosts of both; heads ``L*E + list * pools + pool``.

    ``where`` uint8 (L*E,): the key's list, 4 = none. ``lengths`` int32 (4, pools). ``target`` float64 (pools,): slots
    wanted for the first list. ``returned`` uint8 (pools,): the last miss was a ghost of the second.
    """

    before: np.ndarray
    after: np.ndarray
    where: np.ndarray
    lengths: np.ndarray
    target: np.ndarray
    returned: np.ndarray


def _on_access(state, residency, pool, key, hit, clock, phase):  # type: ignore[no-untyped-def]
    slots = residency.pool_start[pool + 1] - residency.pool_start[pool]
    if hit:
        unlink(state.before, state.after, key)
        push(state.before, state.after, residency.slot_of_key.size + state.target.size + pool, key)
        state.lengths[state.where[key], pool] -= 1
        state.lengths[_OFTEN, pool] += 1
        state.where[key] = _OFTEN
        return
    once, often = state.lengths[_GHOST_ONCE, pool], state.lengths[_GHOST_OFTEN, pool]
    state.returned[pool] = state.where[key] == _GHOST_OFTEN
    if state.where[key] == _GHOST_ONCE:
        state.target[pool] = min(float(slots), state.target[pool] + max(1.0, often / once))
    elif state.where[key] == _GHOST_OFTEN:
        state.target[pool] = max(0.0, state.target[pool] - max(1.0, once / often))


def _on_insert(state, residency, pool, key, clock, phase):  # type: ignore[no-untyped-def]
    slots = residency.pool_start[pool + 1] - residency.pool_start[pool]
    pools = state.target.size
    heads = residency.slot_of_key.size + pool
    to = _ONCE
    if state.where[key] != _NOWHERE:
        unlink(state.before, state.after, key)
        state.lengths[state.where[key], pool] -= 1
        to = _OFTEN
    push(state.before, state.after, heads + to * pools, key)
    state.where[key] = to
    state.lengths[to, pool] += 1
    for ghosts in range(_GHOST_ONCE, _GHOST_OFTEN + 1):
        while state.lengths[ghosts, pool] > 0:
            total = state.lengths[_ONCE, pool] + state.lengths[_GHOST_ONCE, pool]
            limit = slots
            if ghosts == _GHOST_OFTEN:
                total += state.lengths[_OFTEN, pool] + state.lengths[_GHOST_OFTEN, pool]
                limit = 2 * slots
            if total <= limit:
                break
            oldest = state.before[heads + ghosts * pools]
            unlink(state.before, state.after, oldest)
            state.where[oldest] = _NOWHERE
            state.lengths[ghosts, pool] -= 1


def _on_evict(state, residency, pool, key, clock):  # type: ignore[no-untyped-def]
    unlink(state.before, state.after, key)
    state.lengths[state.where[key], pool] -= 1
    state.where[key] += 2
    state.lengths[state.where[key], pool] += 1
    push(state.before, state.after, residency.slot_of_key.size + state.where[key] * state.target.size + pool, key)


def _victim(state, residency, pool, clock):  # type: ignore[no-untyped-def]
    once = state.lengths[_ONCE, pool]
    from_once = once > state.target[pool] or (state.returned[pool] != 0 and once == state.target[pool])
    for attempt in range(2):
        chosen = _ONCE if from_once == (attempt == 0) else _OFTEN
        head = residency.slot_of_key.size + chosen * state.target.size + pool
        key = state.before[head]
        while key != head:
            slot = residency.slot_of_key[key]
            if may_go(residency, slot, clock):
                return slot
            key = state.before[key]
    return np.int32(-1)


rules(ArcState, on_access=_on_access, on_insert=_on_insert, on_evict=_on_evict, victim=_victim)


@final
class Arc:
    """After Megiddo and Modha, FAST 2003. Departs: pinned experts are stepped over, and the ghosts are cut after insertion."""

    name = "arc"

    def state(self, num_moe_layers: int, num_experts: int, pools: int) -> ArcState:
        """Empty lists, no slots wanted for the first."""
        keys = num_moe_layers * num_experts
        return ArcState(
            before=empty_ring(keys, 4 * pools),
            after=empty_ring(keys, 4 * pools),
            where=np.full(keys, _NOWHERE, np.uint8),
            lengths=np.zeros((4, pools), np.int32),
            target=np.zeros(pools),
            returned=np.zeros(pools, np.uint8),
        )
