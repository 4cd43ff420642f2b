"""The optima: what no policy can beat, because they know every later request. For replay only.

``belady`` evicts the expert whose next use is farthest away and always inserts what missed (an engine that must have the
expert in a slot). ``belady_bypass`` may also leave a miss outside, read once and forgotten: it keeps, of what may go and what
missed, the experts needed soonest; between two needed at once, the one needed again sooner, because a hit pins its slot and
only an expert that goes on being needed makes use of it. Both are exact for the request model of the replay that feeds them:
uses of one demand set share a time when it is judged at once, and each has its own when requests come one at a time. The proof
is a test against brute force. Under a floor the choice is restricted to what may go, which is a bound no longer.
"""

from __future__ import annotations

from typing import Any, NamedTuple, final

import numpy as np

from swapless.cache.compiled import compiled
from swapless.cache.policy import rules
from swapless.cache.residency import may_go
from swapless.errors import UnsupportedOperationError

_NEVER = np.iinfo(np.int32).max


class BeladyState(NamedTuple):
    """``uses`` int32: times of use, key by key; ``cursor`` int64 (L*E,): place of the key's next use in it; ``last`` int64
    (L*E,): where the key's uses end; ``upcoming`` int32 (L*E,): the next use itself. ``found`` int64 (1,): the slot that
    admission found."""

    uses: np.ndarray
    cursor: np.ndarray
    last: np.ndarray
    upcoming: np.ndarray
    found: np.ndarray


class BeladyBypassState(NamedTuple):
    """As :class:`BeladyState`, a type of its own for its own rules."""

    uses: np.ndarray
    cursor: np.ndarray
    last: np.ndarray
    upcoming: np.ndarray
    found: np.ndarray


@compiled
def _move(state: Any, key: Any, by: int) -> None:
    """Let the key's next use be one later or earlier."""
    place = state.cursor[key] + by
    state.cursor[key] = place
    state.upcoming[key] = state.uses[np.uint64(place)] if place < state.last[key] else np.int32(_NEVER)


def _on_access(state, residency, pool, key, hit, clock, phase):  # type: ignore[no-untyped-def]
    _move(state, np.uint64(key), 1)


@compiled
def _sooner(state: Any, one: Any, other: Any) -> Any:
    """Whether ``one`` is needed before ``other``; where both are needed at once, the uses after that decide."""
    if state.upcoming[one] != state.upcoming[other]:
        return state.upcoming[one] < state.upcoming[other]
    mine, its = state.cursor[one] + 1, state.cursor[other] + 1
    while mine < state.last[one] and its < state.last[other]:
        if state.uses[np.uint64(mine)] != state.uses[np.uint64(its)]:
            return state.uses[np.uint64(mine)] < state.uses[np.uint64(its)]
        mine += 1
        its += 1
    return mine < state.last[one]


@compiled
def _farthest(state: Any, residency: Any, pool: Any, clock: Any) -> Any:
    """The first slot whose next use is farthest away, and how many more share that use."""
    best = np.int64(-1)
    farthest = np.int32(-1)
    others = 0
    for slot in range(residency.pool_start[pool], residency.pool_start[pool + 1]):
        use = state.upcoming[np.uint64(residency.key_of_slot[np.uint64(slot)])]
        free = may_go(residency, slot, clock)
        better = free & (use > farthest)
        others = 0 if better else others + (free & (use == farthest))
        farthest = use if better else farthest
        best = np.int64(slot) if better else best
    return best, others


def _victim(state, residency, pool, clock):  # type: ignore[no-untyped-def]
    return _farthest(state, residency, pool, clock)[0]


@compiled
def _last_needed(state: Any, residency: Any, pool: Any, clock: Any) -> Any:
    best, others = _farthest(state, residency, pool, clock)
    if others > 0:
        farthest = state.upcoming[np.uint64(residency.key_of_slot[np.uint64(best)])]
        if farthest != _NEVER:
            for slot in range(best + 1, np.int64(residency.pool_start[pool + np.uint64(1)])):
                key = np.uint64(residency.key_of_slot[np.uint64(slot)])
                held = np.uint64(residency.key_of_slot[np.uint64(best)])
                if state.upcoming[key] == farthest and may_go(residency, slot, clock) and _sooner(state, held, key):
                    best = np.int64(slot)
    return best


def _last_needed_victim(state, residency, pool, clock):  # type: ignore[no-untyped-def]
    # What was admitted has just looked for it.
    return state.found[0]


def _admit(state, residency, pool, key, clock, phase):  # type: ignore[no-untyped-def]
    slot = _last_needed(state, residency, pool, clock)
    state.found[0] = slot
    # The key's own cursor has moved on: on_access comes before admission.
    return slot >= 0 and _sooner(state, np.uint64(key), np.uint64(residency.key_of_slot[np.uint64(slot)]))


def _arrange(state, residency, base, experts):  # type: ignore[no-untyped-def]
    # Needed again soonest first, so that admission in this order keeps the best of all that missed.
    for i in range(len(experts)):
        _move(state, np.uint64(base + experts[i]), 1)
    for i in range(1, len(experts)):
        expert = experts[i]
        j = i
        while j > 0 and _sooner(state, np.uint64(base + expert), np.uint64(base + experts[j - 1])):
            experts[j] = experts[j - 1]
            j -= 1
        experts[j] = expert
    for i in range(len(experts)):
        _move(state, np.uint64(base + experts[i]), -1)


rules(BeladyState, on_access=_on_access, victim=_victim)
rules(BeladyBypassState, on_access=_on_access, victim=_last_needed_victim, admit=_admit, arrange=_arrange)


@final
class Belady:
    """Evicts the expert whose next use is farthest away."""

    name = "belady"
    optimum = True
    state_type = BeladyState

    def state(self, num_moe_layers: int, num_experts: int, pools: int) -> NamedTuple:
        """Refused: the optimum needs the future, which only a replay has."""
        raise UnsupportedOperationError(f"The policy {self.name!r} knows the future: it runs in a replay, not in an engine.")


@final
class BeladyBypass:
    """Keeps what is needed soonest, and leaves a miss outside that is needed later than all that may go."""

    name = "belady_bypass"
    optimum = True
    state_type = BeladyBypassState

    def state(self, num_moe_layers: int, num_experts: int, pools: int) -> NamedTuple:
        """Refused: the optimum needs the future, which only a replay has."""
        raise UnsupportedOperationError(f"The policy {self.name!r} knows the future: it runs in a replay, not in an engine.")


@compiled
def _count_uses(ids: Any, rows: Any, starts: Any, num_experts: Any, seen: Any, count: Any) -> None:
    for c in range(len(starts) - 1):
        for moe_layer in range(ids.shape[1]):
            for i in range(starts[c], starts[c + 1]):
                for k in range(ids.shape[2]):
                    if ids[rows[i], moe_layer, k] >= 0:
                        key = moe_layer * num_experts + ids[rows[i], moe_layer, k]
                        if seen[key] != c:
                            seen[key] = c
                            count[key + 1] += 1


@compiled
def _fill_uses(ids: Any, rows: Any, starts: Any, num_experts: Any, single: Any, seen: Any, place: Any, uses: Any) -> None:
    now = 0
    for c in range(len(starts) - 1):
        for moe_layer in range(ids.shape[1]):
            now += not single
            for i in range(starts[c], starts[c + 1]):
                for k in range(ids.shape[2]):
                    if ids[rows[i], moe_layer, k] >= 0:
                        key = moe_layer * num_experts + ids[rows[i], moe_layer, k]
                        if seen[key] != c:
                            seen[key] = c
                            now += single
                            uses[place[key]] = now
                            place[key] += 1


def future_state(
    state_type: type, ids: np.ndarray, rows: np.ndarray, starts: np.ndarray, num_experts: int, *, single: bool
) -> NamedTuple:
    """State of an optimum for exactly this replay: every use of every key, in replay order."""
    keys = ids.shape[1] * num_experts
    ends = np.zeros(keys + 1, np.int64)
    _count_uses(ids, rows, starts, num_experts, np.full(keys, -1, np.int64), ends)
    np.cumsum(ends, out=ends)
    uses = np.empty(int(ends[-1]), np.int32)
    _fill_uses(ids, rows, starts, num_experts, single, np.full(keys, -1, np.int64), ends[:-1].copy(), uses)
    first, last = ends[:-1].copy(), ends[1:].copy()
    upcoming = np.full(keys, _NEVER, np.int32)
    used = first < last
    upcoming[used] = uses[first[used]]
    return state_type(uses, first, last, upcoming, np.zeros(1, np.int64))
