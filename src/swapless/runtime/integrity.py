"""Whether pool, cache, policy, reads and slots of an engine at rest agree with each other."""

from __future__ import annotations

import numpy as np

from swapless.cache.integrity import problems as problems_of_cache
from swapless.cache.serve import ExpertCache
from swapless.runtime.fetch import Fetcher
from swapless.runtime.pool import SlotPool
from swapless.runtime.store import Store
from swapless.store.read import aligned_buffer


def problems(store: Store, cache: ExpertCache, pool: SlotPool, fetcher: Fetcher, *, weights: bool) -> list[str]:
    """What is wrong, a sentence each. With ``weights`` every resident expert is read again and compared with its slot.

    Raises
    ------
    ReadError
        An expert cannot be read again.
    """
    found = problems_of_cache(cache) + fetcher.problems()
    if weights and not found:
        found += _of_weights(store, cache, pool, fetcher)
    return found


def _of_weights(store: Store, cache: ExpertCache, pool: SlotPool, fetcher: Fetcher) -> list[str]:
    found = []
    fresh, bounce = aligned_buffer(pool.slot_bytes), store.bounce_buffer()
    for slot in np.flatnonzero(cache.residency.key_of_slot >= 0).tolist():
        if slot in cache.withheld:
            continue
        moe_layer, expert = divmod(int(cache.residency.key_of_slot[slot]), cache.num_experts)
        for part in range(store.parts(moe_layer, expert)):
            store.read_part(moe_layer, expert, part, fresh, bounce)
        held = pool.bytes_of(fetcher.block(slot))
        for name, first, nbytes in pool.extents(moe_layer):
            if not np.array_equal(held[first : first + nbytes], fresh[first : first + nbytes]):
                found.append(f"Slot {slot} does not hold {name} of expert {expert} of MoE layer {moe_layer}, as it claims.")
    return found
