"""Serve one demand set from the cache: judge, evict, assign slots. The one loop behind both replay and engine.

Token at once: all distinct experts of the demand set are judged on the state before it, and all are pinned while it is
served. Where the set does not fit into its pool, it is cut into waves: the experts of a later wave may take the slots of an
earlier one, residents first. Prefill takes free slots and those that decode never used; what finds none is *streamed*
(slot -1): read, used once, and forgotten.
"""

# Compiled code: numba needs plain signatures, and annotations would say no more than the docstrings do.
from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from swapless.arrays import want
from swapless.cache.compiled import compiled, compiled_apart
from swapless.cache.policy import (
    Policy,
    admit,
    fresh_state,
    on_access,
    on_demand,
    on_document,
    on_evict,
    on_insert,
    on_scores,
    victim,
)
from swapless.cache.residency import Residency, empty_residency
from swapless.errors import UsageError, message
from swapless.notation import Phase

_PREFILL = int(Phase.PREFILL)
STREAMED = -1


@compiled_apart
def demand_order(ids: Any, num_experts: int, distinct: Any, tokens: Any, count: Any) -> int:
    """Distinct experts of ``ids`` (one axis), most used first, then as first named.

    Writes them to ``distinct`` and their uses to ``tokens``; ``count`` is room to count in (int32 of length >= E, all three).
    Returns how many. Ids outside [0, E) stand for no expert and are passed over. For one token this is its list.
    """
    for expert in range(num_experts):
        count[expert] = 0
    n = 0
    for i in range(len(ids)):
        expert = ids[i]
        if 0 <= expert < num_experts:
            if count[expert] == 0:
                distinct[n] = expert
                n += 1
            count[expert] += 1
    for i in range(n):
        expert = distinct[i]
        uses = count[expert]
        j = i
        while j > 0 and tokens[j - 1] < uses:
            tokens[j] = tokens[j - 1]
            distinct[j] = distinct[j - 1]
            j -= 1
        tokens[j] = uses
        distinct[j] = expert
    return n


@compiled_apart
def _spare_decode(residency: Any, pool: Any, clock: int) -> None:
    # Bounds are read here: known outside, checks for this loop would be made ready at every decode as well.
    for slot in range(residency.pool_start[pool], residency.pool_start[pool + np.uint64(1)]):
        if residency.used_in_decode[slot]:
            residency.pinned[slot] = clock


@compiled_apart
def _pin_withheld(residency: Any, clock: int) -> None:
    for i in range(1, residency.withheld[0] + 1):
        residency.pinned[residency.withheld[i]] = clock


@compiled
def serve(
    state: Any,
    residency: Any,
    moe_layer: int,
    num_experts: int,
    experts: Any,
    phase: int,
    single: bool,
    hit: Any,
    slot: Any,
    wave: Any,
) -> tuple[int, int, int, int]:
    """Serve the distinct ``experts`` of one demand set: all are judged first, then touched in the order given.

    With ``single`` each expert is a demand set of its own, judged when those before it have been served. Writes for each
    whether it ``hit`` (uint8), its ``slot`` (int32, -1 = streamed) and its ``wave`` (int32); returns the numbers of waves,
    hits, evictions and streamed misses. State and residency change.
    """
    pool = np.uint64(residency.pool_of_layer[np.uint64(moe_layer)])
    first, end = np.int64(residency.pool_start[pool]), np.int64(residency.pool_start[pool + np.uint64(1)])
    nowhere = residency.key_of_slot.size
    base = moe_layer * num_experts
    floor = residency.floor[0] > 0
    prefill = phase == _PREFILL
    decode = np.uint8(not prefill)
    n = len(experts)
    clock = residency.clock[0]
    residency.demand_sets[np.uint64(moe_layer)] += 1
    residency.asking[0] = moe_layer
    waves = 1
    hits = evictions = streamed = 0
    begin = 0
    while True:
        stop = begin + 1 if single else n
        clock += 1
        residency.clock[0] = clock
        if residency.withheld[0] > 0:
            _pin_withheld(residency, clock)
        on_demand(state, residency, moe_layer, experts[begin:stop], phase)
        for i in range(begin, stop):
            place = np.uint64(i)
            s = np.int64(residency.slot_of_key[np.uint64(base + experts[place])])
            hit[place] = s >= 0
            slot[place] = s
            # A miss writes to the place behind the last slot: no branch, so none to be mispredicted.
            s = s if s >= 0 else nowhere
            residency.pinned[np.uint64(s)] = clock
            residency.used_in_decode[np.uint64(s)] |= decode
        if prefill:
            _spare_decode(residency, pool, clock)
        for i in range(begin, stop):
            place = np.uint64(i)
            key = np.uint64(base + experts[place])
            wave[place] = 0
            found = slot[place] >= 0
            # In a later wave an expert that hit may already have gone again: its slot was used in the first wave.
            resident = found and (waves == 1 or residency.slot_of_key[key] >= 0)
            on_access(state, residency, pool, key, resident, clock, phase)
            if found:
                hits += 1
                continue
            s = np.int64(-1)
            free = residency.free_count[pool]
            if free > 0:
                residency.free_count[pool] = free - 1
                s = np.int64(residency.free_slots[first + free - 1])
            elif admit(state, residency, pool, key, clock, phase):
                s = np.int64(victim(state, residency, pool, clock))
                if s < 0 and not prefill and end > first:
                    waves += 1
                    clock += 1
                    residency.clock[0] = clock
                    if residency.withheld[0] > 0:
                        _pin_withheld(residency, clock)
                    s = np.int64(victim(state, residency, pool, clock))
                if s >= 0:
                    old = np.uint64(residency.key_of_slot[np.uint64(s)])
                    residency.slot_of_key[old] = -1
                    if floor:
                        residency.held[residency.layer_of_key[old]] -= 1
                    evictions += 1
                    on_evict(state, residency, pool, old, clock)
            wave[place] = waves - 1
            slot[place] = s
            if s >= 0:
                mine = np.uint64(s)
                residency.key_of_slot[mine] = key
                if floor:
                    residency.held[moe_layer] += 1
                residency.pinned[mine] = clock
                residency.used_in_decode[mine] = decode
                # The last store, so that the rule finds it in a register.
                residency.slot_of_key[key] = s
                on_insert(state, residency, pool, key, clock, phase)
            else:
                streamed += 1
        begin = stop
        if begin >= n:
            break
    return waves, hits, evictions, streamed


class Served(NamedTuple):
    """What one demand set got; views into the cache's own buffers, valid until the next request.

    ``experts`` int32 (n,) most important first, ``tokens`` int32 (n,) uses of each, ``hit`` uint8 (n,), ``slot`` int32 (n,)
    with -1 = streamed, ``wave`` int32 (n,), ``waves`` their number.
    """

    experts: np.ndarray
    tokens: np.ndarray
    hit: np.ndarray
    slot: np.ndarray
    wave: np.ndarray
    waves: int


class ExpertCache:
    """Residency and policy of one running model: what the engine holds.

    Parameters
    ----------
    policy : Policy
        Decides who goes; its state is built here and belongs to this cache.
    num_moe_layers, num_experts : int
        L and E.
    pool_of_layer, pool_slots : sequence of int
        Pool of each MoE layer, and slots of each pool (see :func:`~swapless.cache.residency.layer_pools`).
    """

    def __init__(
        self, policy: Policy, num_moe_layers: int, num_experts: int, pool_of_layer: list[int], pool_slots: list[int]
    ) -> None:
        self.policy = policy
        self.num_moe_layers = num_moe_layers
        self.num_experts = num_experts
        self.pool_of_layer = pool_of_layer
        self.pool_slots = pool_slots
        self._buffers = [np.empty(num_experts, np.int32) for _ in range(5)]
        self._hit = np.empty(num_experts, np.uint8)
        self._withheld: frozenset[int] = frozenset()
        self.reset()

    def reset(self) -> None:
        """Empty the cache and start the policy afresh."""
        self.residency: Residency = empty_residency(self.num_moe_layers, self.num_experts, self.pool_of_layer, self.pool_slots)
        self._state = fresh_state(self.policy, self.num_moe_layers, self.num_experts, len(self.pool_slots))
        withheld, self._withheld = self._withheld, frozenset()
        self.withhold(withheld)

    def begin_document(self) -> None:
        """Tell the policy that a new text begins. What is resident stays."""
        _begun(self._state, self.residency)

    def request(self, moe_layer: int, ids: np.ndarray, phase: Phase, scores: np.ndarray | None = None) -> Served:
        """Serve the experts of ``ids`` (int64, any shape; ids outside [0, E) stand for none). Changes the cache.

        ``scores`` float32 (tokens, E): the router's output for every expert, for the policies that use it.

        Raises
        ------
        UsageError
            A MoE layer that is not there, ids that are no integers, scores of another shape.
        """
        if not 0 <= moe_layer < self.num_moe_layers or ids.dtype.kind != "i":
            raise _no_request(moe_layer, ids, self.num_moe_layers)
        if scores is not None:
            want(scores, "scores", np.float32, (None, self.num_experts))
            for row in scores:
                _scored(self._state, self.residency, moe_layer, row)
        distinct, tokens, slot, wave, count = self._buffers
        n = demand_order(ids.reshape(-1), self.num_experts, distinct, tokens, count)
        experts = distinct[:n]
        waves, _, _, _ = serve(
            self._state, self.residency, moe_layer, self.num_experts, experts, int(phase), False, self._hit, slot, wave
        )
        return Served(experts, tokens[:n], self._hit[:n], slot[:n], wave[:n], waves)

    @property
    def policy_state(self) -> Any:
        """The policy's state: a NamedTuple of arrays, which only compiled rules change."""
        return self._state

    def resident(self, moe_layer: int, expert: int) -> bool:
        """Whether an expert is in a slot now."""
        return bool(self.residency.slot_of_key[moe_layer * self.num_experts + expert] >= 0)

    def forget(self, moe_layer: int, experts: np.ndarray) -> None:
        """Drop experts whose bytes never arrived, so that a failed read leaves no slot that lies."""
        residency = self.residency
        for expert in experts:
            key = moe_layer * self.num_experts + int(expert)
            slot = int(residency.slot_of_key[key])
            if slot < 0:
                continue
            pool = int(residency.pool_of_layer[moe_layer])
            residency.slot_of_key[key] = -1
            residency.key_of_slot[slot] = -1
            residency.used_in_decode[slot] = 0
            residency.held[moe_layer] -= int(residency.floor[0] > 0)
            residency.free_slots[residency.pool_start[pool] + residency.free_count[pool]] = slot
            residency.free_count[pool] += 1
            _evicted(self._state, residency, pool, key)

    @property
    def withheld(self) -> frozenset[int]:
        """Slots that are out of use for now."""
        return self._withheld

    def withhold(self, slots: Iterable[int]) -> None:
        """Let these slots, and no others, hold nothing from now on, until they are given back by another call.

        The experts in them are evicted. A MoE layer that is left without a slot can be served in prefill alone.
        """
        residency, wanted = self.residency, frozenset(slots)
        for slot in sorted(self._withheld - wanted, reverse=True):  # the lowest is handed out first
            residency.key_of_slot[slot] = -1
            residency.pinned[slot] = -1
            self._free(slot)
        for slot in sorted(wanted - self._withheld):
            key, pool = int(residency.key_of_slot[slot]), self._pool_of(slot)
            if key < 0:
                first = residency.pool_start[pool]
                free = residency.free_slots[first : first + residency.free_count[pool]]
                free[:-1] = free[free != slot]
                residency.free_count[pool] -= 1
                residency.key_of_slot[slot] = 0  # any expert's name, for rules that look at it before they look at the pin
            else:
                residency.slot_of_key[key] = -1
                residency.held[residency.layer_of_key[key]] -= int(residency.floor[0] > 0)
                _evicted(self._state, residency, pool, key)
            residency.used_in_decode[slot] = 0
        residency.withheld[0] = len(wanted)
        residency.withheld[1 : len(wanted) + 1] = sorted(wanted)
        self._withheld = wanted

    def _pool_of(self, slot: int) -> int:
        return int(np.searchsorted(self.residency.pool_start, slot, side="right")) - 1

    def _free(self, slot: int) -> None:
        residency, pool = self.residency, self._pool_of(slot)
        residency.free_slots[residency.pool_start[pool] + residency.free_count[pool]] = slot
        residency.free_count[pool] += 1


def _no_request(moe_layer: int, ids: np.ndarray, num_moe_layers: int) -> UsageError:
    got, allowed = f"MoE layer {moe_layer}, ids of {ids.dtype}", f"0 to {num_moe_layers - 1}, integers"
    return UsageError(message("No such request can be served.", got=got, allowed=allowed))


@compiled
def _evicted(state: Any, residency: Any, pool: int, key: int) -> None:
    on_evict(state, residency, pool, key, residency.clock[0])


@compiled
def _begun(state: Any, residency: Any) -> None:
    on_document(state, residency)


@compiled
def _scored(state: Any, residency: Any, moe_layer: int, scores: Any) -> None:
    on_scores(state, residency, moe_layer, scores)
