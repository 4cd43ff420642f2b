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
    (L*E,): where the key's uses end."""

    uses: np.ndarray
    cursor: np.ndarray
    last: np.ndarray


class BeladyBypassState(NamedTuple):
    """As :class:`BeladyState`, a type of its own for its own rules."""

    uses: np.ndarray
    cursor: np.ndarray
    last: np.ndarray


@compiled
def _next_use(state: Any, key: Any) -> Any:
    place = state.cursor[key]
    return state.uses[place] if place < state.last[key] else np.int32(_NEVER)


def _on_access(state, residency, pool, key, hit, clock, phase):  # type: ignore[no-untyped-def]
    state.cursor[key] += 1


@compiled
def _sooner(state: Any, one: Any, other: Any) -> Any:
    """Whether ``one`` is needed before ``other``; where both are needed at once, the uses after that decide."""
    mine, its = state.cursor[one], state.cursor[other]
    while mine < state.last[one] and its < state.last[other]:
        if state.uses[mine] != state.uses[its]:
            return state.uses[mine] < state.uses[its]
        mine += 1
        its += 1
    return mine < state.last[one]


def _victim(state, residency, pool, clock):  # type: ignore[no-untyped-def]
    best = np.int32(-1)
    farthest = np.int32(-1)
    for slot in range(residency.pool_start[pool], residency.pool_start[pool + 1]):
        if may_go(residency, slot, clock):
            use = _next_use(state, residency.key_of_slot[slot])
            if use > farthest:
                farthest = use
                best = np.int32(slot)
    return best


@compiled
def _last_needed(state: Any, residency: Any, pool: Any, clock: Any) -> Any:
    best = np.int32(-1)
    for slot in range(residency.pool_start[pool], residency.pool_start[pool + 1]):
        if may_go(residency, slot, clock) and (
            best < 0 or _sooner(state, residency.key_of_slot[best], residency.key_of_slot[slot])
        ):
            best = np.int32(slot)
    return best


def _last_needed_victim(state, residency, pool, clock):  # type: ignore[no-untyped-def]
    return _last_needed(state, residency, pool, clock)


def _admit(state, residency, pool, key, clock, phase):  # type: ignore[no-untyped-def]
    slot = _last_needed(state, residency, pool, clock)
    # The key's own cursor has moved on: on_access comes before admission.
    return slot >= 0 and _sooner(state, key, residency.key_of_slot[slot])


def _arrange(state, residency, base, experts):  # type: ignore[no-untyped-def]
    # Needed again soonest first, so that admission in this order keeps the best of all that missed.
    for i in range(len(experts)):
        state.cursor[base + experts[i]] += 1
    for i in range(1, len(experts)):
        expert = experts[i]
        j = i
        while j > 0 and _sooner(state, base + expert, base + experts[j - 1]):
            experts[j] = experts[j - 1]
            j -= 1
        experts[j] = expert
    for i in range(len(experts)):
        state.cursor[base + experts[i]] -= 1


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
    return state_type(uses, ends[:-1].copy(), ends[1:].copy())
