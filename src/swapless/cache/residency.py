"""Which expert sits in which slot: plain arrays, shared by replay and engine, changed only by ``cache/serve.py``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from swapless.cache.compiled import compiled
from swapless.errors import UsageError, message


class Residency(NamedTuple):
    """Slots of all pools; slots of pool p are ``pool_start[p] .. pool_start[p + 1] - 1``.

    ``slot_of_key`` int32 (L*E,), -1 = not resident. ``key_of_slot`` int32 (slots,), -1 = free. ``pool_of_layer`` int32 (L,).
    ``free_slots`` holds each pool's free slots as a stack that begins at ``pool_start[p]`` with ``free_count[p]`` entries.
    ``pinned`` int64 (slots + 1,): the clock of the demand set that must not lose the slot; ``used_in_decode`` uint8
    (slots + 1,): whether decode has asked for the slot's expert; prefill never evicts such a one. The last place of both is
    for misses. ``clock`` int64 (1,).
    ``demand_sets`` int64 (L,): demand sets served a MoE layer, which in decode are its tokens. ``held`` int32 (L,): slots each
    MoE layer holds, counted only under a floor; ``floor`` int32 (1,): a layer that holds no more than this loses nothing to
    another; ``asking`` int64 (1,): the MoE layer being served. ``layer_of_key`` int32 (L*E,) saves a division.
    ``withheld`` int32 (slots + 1,): how many slots are out of use for now, and which: pinned in every demand set. Each still
    names an expert, so that no rule has to ask, but none names it.
    """

    slot_of_key: np.ndarray
    key_of_slot: np.ndarray
    pool_of_layer: np.ndarray
    pool_start: np.ndarray
    free_slots: np.ndarray
    free_count: np.ndarray
    pinned: np.ndarray
    used_in_decode: np.ndarray
    clock: np.ndarray
    demand_sets: np.ndarray
    held: np.ndarray
    floor: np.ndarray
    asking: np.ndarray
    layer_of_key: np.ndarray
    withheld: np.ndarray


def empty_residency(
    num_moe_layers: int, num_experts: int, pool_of_layer: Sequence[int], pool_slots: Sequence[int], floor: int = 0
) -> Residency:
    """All slots free. ``pool_of_layer`` names the pool of each MoE layer, ``pool_slots`` the slots of each pool, ``floor``
    the slots that no other layer of its pool may take from one.

    Raises
    ------
    UsageError
        A shape that cannot be: compiled code trusts what it finds here.
    """
    pools, keys = len(pool_slots), num_moe_layers * num_experts
    known = len(pool_of_layer) == num_moe_layers and all(0 <= pool < pools for pool in pool_of_layer)
    if num_moe_layers < 1 or num_experts < 1 or floor < 0 or not known or any(not 0 <= slots <= keys for slots in pool_slots):
        got = f"{num_moe_layers} MoE layers, {num_experts} experts, pools {list(pool_of_layer)}, slots {list(pool_slots)}"
        allowed = f"a pool from 0 to {pools - 1} for each MoE layer, 0 to {keys} slots a pool"
        raise UsageError(message("Such pools cannot be.", got=f"{got}, floor {floor}", allowed=allowed))
    start = np.zeros(len(pool_slots) + 1, np.int32)
    start[1:] = np.cumsum(pool_slots)
    slots = int(start[-1])
    # Stacks are filled so that the lowest slot is handed out first.
    free = np.empty(slots, np.int32)
    for first, end in pairwise(start):
        free[first:end] = np.arange(end - 1, first - 1, -1)
    return Residency(
        slot_of_key=np.full(num_moe_layers * num_experts, -1, np.int32),
        key_of_slot=np.full(slots, -1, np.int32),
        pool_of_layer=np.asarray(pool_of_layer, np.int32),
        pool_start=start,
        free_slots=free,
        free_count=np.asarray(pool_slots, np.int32).copy(),
        pinned=np.full(slots + 1, -1, np.int64),
        used_in_decode=np.zeros(slots + 1, np.uint8),
        clock=np.zeros(1, np.int64),
        demand_sets=np.zeros(num_moe_layers, np.int64),
        held=np.zeros(num_moe_layers, np.int32),
        floor=np.array([floor], np.int32),
        asking=np.zeros(1, np.int64),
        layer_of_key=np.repeat(np.arange(num_moe_layers, dtype=np.int32), num_experts),
        withheld=np.zeros(slots + 1, np.int32),
    )


@compiled
def may_go(residency: Any, slot: Any, clock: Any) -> Any:
    """Whether the expert in ``slot`` may be evicted now: not pinned, and its layer above the floor.

    Without a branch on the pin, which is a guess: scans join the answer to their own comparison with ``&``.
    """
    unpinned = residency.pinned[np.uint64(slot)] != clock
    if residency.floor[0] > 0:
        moe_layer = residency.layer_of_key[residency.key_of_slot[np.uint64(slot)]]
        return unpinned & ((moe_layer == residency.asking[0]) | (residency.held[moe_layer] > residency.floor[0]))
    return unpinned


def layer_pools(num_moe_layers: int, num_experts: int, slots: int) -> tuple[list[int], list[int]]:
    """Pools for ``slots`` slots in all: equal quotas a MoE layer, or one shared pool where a layer would get none.

    Returns ``pool_of_layer`` and ``pool_slots``. A layer never gets more than its E experts; slots left over by the
    division go to the first layers.
    """
    if slots < num_moe_layers:
        return [0] * num_moe_layers, [slots]
    quota, left = divmod(min(slots, num_moe_layers * num_experts), num_moe_layers)
    return list(range(num_moe_layers)), [quota + (moe_layer < left) for moe_layer in range(num_moe_layers)]
