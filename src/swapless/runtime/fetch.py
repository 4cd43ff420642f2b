"""Which memory every expert is in or on its way to: cache slots, staging of prefill, and what was read ahead.

A cache slot is a name for a block of the pool. What was read ahead becomes resident by exchanging blocks, not by a copy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

from swapless.errors import ReadError, message
from swapless.runtime.ahead import Lookahead, Prefetcher, ReadAhead
from swapless.runtime.budget import Budget
from swapless.runtime.loader import Loader, Read
from swapless.runtime.pool import SlotPool
from swapless.runtime.store import Store


class Fetcher:
    """Reads of one engine: what is asked for, what has come, and what it took.

    Parameters
    ----------
    store : Store
        Where from.
    pool : SlotPool
        Where to; its first blocks are for staging, then come the cache slots, then the blocks for reading ahead.
    budget : Budget
        How many of each.
    depth : int
        Reads in flight.
    lookahead : Lookahead, optional
        Foresees what to read ahead.
    resident : callable of (moe_layer, expert) -> bool
        What the cache holds.
    pool_slots : sequence of int
        Slots of each of the cache's pools, in order; all in one by default.
    """

    def __init__(
        self,
        store: Store,
        pool: SlotPool,
        budget: Budget,
        depth: int,
        lookahead: Lookahead | None,
        resident: Callable[[int, int], bool],
        pool_slots: Sequence[int] = (),
    ) -> None:
        self._store, self._pool = store, pool
        self._loader = Loader(store.read_part, store.parts, pool.bytes_of, store.bounce_buffer, depth)
        self._staging = range(budget.staging_blocks)
        self._slot_pools = slot_ranges(pool_slots or [budget.slots])
        self._block_of_slot = spread(self._slot_pools, self._staging.stop)
        self.free_staging = list(self._staging)
        self.blocks = pool.slots
        self.prefetcher: Prefetcher | None = None
        if lookahead is not None:
            blocks = range(self._staging.stop + budget.slots, pool.slots)
            self.prefetcher = Prefetcher(lookahead, ReadAhead(self._loader, blocks), resident)
        self.reset_counts()

    def reset_counts(self) -> None:
        """Count afresh."""
        self.counts: dict[str, Any] = {"reads": 0, "bytes_read": 0, "read_s": 0.0, "stall_s": 0.0}
        if self.prefetcher is not None:
            self.prefetcher.reset_stats()

    def block(self, slot: int) -> int:
        """The block that is the slot's now."""
        return self._block_of_slot[slot]

    def demand(self, moe_layer: int, expert: int, slot: int) -> bool:
        """Get a missing expert into its slot: True if it is there at once, because it was read ahead."""
        if self.prefetcher is not None:
            block, under_way = self.prefetcher.reads.take(moe_layer, expert)
            if block is not None:
                self._exchange(slot, block)
                return True
            if under_way:
                return False
        self._loader.submit(moe_layer, expert, self._block_of_slot[slot])
        return False

    def stream(self, moe_layer: int, expert: int) -> int | None:
        """Begin to read an expert that gets no slot into a free staging block, which is returned; None if there is none."""
        if not self.free_staging:
            return None
        block = self.free_staging.pop()
        self._loader.submit(moe_layer, expert, block)
        return block

    def arrival(self) -> Read:
        """Wait for the next finished read that is needed now.

        Raises
        ------
        ReadError
            It failed.
        """
        while True:
            waited = time.perf_counter()
            read = self._loader.next()
            self.counts["stall_s"] += time.perf_counter() - waited
            if self._needed(read):
                return read

    def arrivals(self) -> list[Read]:
        """Wait for the next finished read that is needed now, and take with it all that have finished too.

        Raises
        ------
        ReadError
            One failed.
        """
        return [self.arrival(), *filter(self._needed, self._loader.finished())]

    def _needed(self, read: Read) -> bool:
        """Take note of a finished read; whether somebody waits for it, or it was read ahead."""
        self._count(read)
        if self.prefetcher is not None and self.prefetcher.reads.landed(read):
            return False
        if read.error is None:
            return True
        if isinstance(read.error, ReadError):
            raise read.error
        raise ReadError(
            message(
                "A read of expert weights failed.",
                where=f"MoE layer {read.moe_layer}, expert {read.expert}",
                got=repr(read.error),
            )
        ) from read.error

    def settle(self, read: Read, slot: int) -> None:
        """Let the slot have what was read for it: a read that began ahead of time went to a block beside the cache."""
        if read.slot != self._block_of_slot[slot]:
            self._exchange(slot, read.slot)

    def collect(self) -> None:
        """Take note of what was read ahead and is here by now. Only between blocks, when nothing is awaited."""
        if self.prefetcher is not None:
            for read in self._loader.finished():
                self._count(read)
                self.prefetcher.reads.landed(read)

    def come_to_rest(self) -> None:
        """After an error or Ctrl-C: no read under way, every block in its place."""
        self._loader.drain()
        self.free_staging = list(self._staging)
        if self.prefetcher is not None:
            taken = {*self._block_of_slot, *self._staging}
            self.prefetcher.reads.reset(block for block in range(self.blocks) if block not in taken)

    def use(self, blocks: int) -> tuple[list[int], list[int]]:
        """From now on, between two forward calls, use the first ``blocks`` blocks of memory alone, and give the others back.

        Returns the slots that are left without memory, and those whose memory is another one's from now on, so that what they
        held is gone too: a pool that would be left with none gets a slot's from the pool that has most.
        """
        self._loader.drain()
        of = self._block_of_slot
        left = [[slot for slot in pool if of[slot] < blocks] for pool in self._slot_pools]
        changed = []
        for slots, pool in zip(left, self._slot_pools, strict=True):
            most = max(left, key=len)
            if not slots and len(pool) and len(most) > 1:
                giver, taker = most.pop(), pool[0]
                of[giver], of[taker] = of[taker], of[giver]
                slots.append(taker)
                changed.append(taker)
        if blocks < self.blocks:
            self._pool.release(range(blocks, self.blocks))
        self.blocks = blocks
        self.come_to_rest()
        return [slot for slot, block in enumerate(of) if block >= blocks], changed

    def reader_ids(self) -> list[int]:
        """What the system calls the reader threads."""
        return self._loader.thread_ids

    def problems(self) -> list[str]:
        """What is wrong between two blocks, a sentence each."""
        ahead = [] if self.prefetcher is None else self.prefetcher.reads.blocks
        blocks = [*self._block_of_slot, *self._staging, *ahead]
        found = []
        lent = set(range(self.blocks, self._pool.slots)) - set(blocks)
        if sorted([*blocks, *lent]) != list(range(self._pool.slots)):
            found.append(f"Memory is lost or used twice: slots, staging and reads ahead have blocks {blocks}.")
        if sorted(self.free_staging) != list(self._staging):
            found.append(f"Staging is in use: of blocks {list(self._staging)} only {self.free_staging} are free.")
        under_way = 0 if self.prefetcher is None else self.prefetcher.reads.under_way
        if self._loader.outstanding != under_way:
            found.append(f"Reads outstanding: {self._loader.outstanding}, of which {under_way} are reads ahead.")
        if not self._loader.complete:
            found.append("A reader thread has ended.")
        return found

    def begin_child(self) -> None:
        """The process was forked: what was under way is lost. :meth:`come_to_rest` makes this usable again."""
        self._loader.begin_child()

    def start_afresh(self) -> None:
        """Forget everything: no read under way, and no block holds an expert."""
        self._block_of_slot = spread(self._slot_pools, self._staging.stop)
        self.blocks = self._pool.slots
        self.come_to_rest()

    def close(self) -> None:
        """End the reader threads and close the files. May be called twice."""
        self._loader.close()
        self._store.close()

    def _exchange(self, slot: int, block: int) -> None:
        assert self.prefetcher is not None, "only what was read ahead lies beside the cache"
        old, self._block_of_slot[slot] = self._block_of_slot[slot], block
        self.prefetcher.reads.give(old)

    def _count(self, read: Read) -> None:
        self.counts["reads"] += 1
        self.counts["bytes_read"] += read.nbytes
        self.counts["read_s"] += read.seconds


def slot_ranges(pool_slots: Sequence[int]) -> list[range]:
    """The slots of each pool, where pools follow one another."""
    return [range(first, end) for first, end in pairwise(accumulate(pool_slots, initial=0))]


def spread(pools: Sequence[range], first: int) -> list[int]:
    """A block for every slot, from ``first`` on, the pools taking turns: the last blocks are some of every pool."""
    order = sorted((slot - pool.start, number, slot) for number, pool in enumerate(pools) for slot in pool)
    block_of_slot = [0] * len(order)
    for place, (_, _, slot) in enumerate(order):
        block_of_slot[slot] = first + place
    return block_of_slot
