"""Whether the tables of a cache agree with each other, and its policy with them: said in sentences, for tests and for doubt."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from swapless.cache.compiled import compiled_apart
from swapless.cache.policy import victim
from swapless.cache.serve import ExpertCache


def problems(cache: ExpertCache) -> list[str]:
    """What is wrong with ``cache`` between two requests, a sentence each; nothing is changed."""
    residency = cache.residency
    slots, keys = residency.key_of_slot.size, residency.slot_of_key.size
    withheld = cache.withheld
    taken = np.array([slot for slot in np.flatnonzero(residency.key_of_slot >= 0).tolist() if slot not in withheld], np.int64)
    resident = np.flatnonzero(residency.slot_of_key >= 0)
    found = []
    if ((residency.slot_of_key >= slots) | (residency.slot_of_key < -1)).any():
        return ["An expert is said to be in a slot that does not exist."]
    if ((residency.key_of_slot >= keys) | (residency.key_of_slot < -1)).any():
        return ["A slot is said to hold an expert that does not exist."]
    if not np.array_equal(residency.slot_of_key[residency.key_of_slot[taken]], taken) or len(taken) != len(resident):
        found.append("Slots and experts do not name each other.")
    pool_of_slot = np.repeat(np.arange(len(residency.free_count)), np.diff(residency.pool_start))
    if (pool_of_slot[residency.slot_of_key[resident]] != residency.pool_of_layer[resident // cache.num_experts]).any():
        found.append("An expert is in a slot of another layer's pool.")
    for pool, (first, end) in enumerate(pairwise(residency.pool_start.tolist())):
        free = residency.free_slots[first : first + residency.free_count[pool]].tolist()
        inside = taken[(taken >= first) & (taken < end)].tolist()
        out = [slot for slot in range(first, end) if slot in withheld]
        if sorted([*free, *inside, *out]) != list(range(first, end)):
            found.append(f"Pool {pool} has lost a slot, or has one that is free and taken.")
        elif not free and residency.floor[0] == 0:
            found += _of_victims(cache, pool, inside)
    if residency.floor[0] > 0:
        held = np.bincount(resident // cache.num_experts, minlength=cache.num_moe_layers)
        if not np.array_equal(held, residency.held):
            found.append("The slots that layers are said to hold are not those that they hold.")
    return found


def _of_victims(cache: ExpertCache, pool: int, taken: list[int]) -> list[str]:
    """Whether the policy, asked for one victim after the other, names each slot of a full pool once, and then none."""
    # On copies: asking may turn the hands of a clock.
    residency = type(cache.residency)(*(array.copy() for array in cache.residency))
    state: Any = _copied(cache.policy_state)
    clock = int(residency.clock[0]) + 1
    residency.pinned[list(cache.withheld)] = clock
    named = []
    for _ in taken:
        slot = int(_victim(state, residency, pool, clock))
        if slot < 0:
            break
        named.append(slot)
        residency.pinned[slot] = clock
    last = int(_victim(state, residency, pool, clock)) if len(named) == len(taken) else -1
    if sorted(named) != taken or last >= 0:
        return [f"The policy does not know what pool {pool} holds: it would evict from slots {named} of {taken}."]
    return []


def _copied(value: Any) -> Any:
    if isinstance(value, tuple):
        return type(value)(*map(_copied, value))
    return value.copy() if isinstance(value, np.ndarray) else value


@compiled_apart
def _victim(state: Any, residency: Any, pool: int, clock: int) -> int:
    return victim(state, residency, pool, clock)
