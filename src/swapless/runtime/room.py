"""How many blocks for experts a forward call leaves: what it holds at once is lent by slots for as long as it runs.

A budget has room for a decode step beside all slots. A long prompt holds more, and so does the cache of a batch; then as many
blocks as that takes are given back to the system before the call, and used again after it. What the process really holds
is looked at before every call, so that what nobody foresaw costs slots and never breaks the cap. Where a share of the experts
was asked for and no cap, that share stays resident, and no call is refused.
"""

from __future__ import annotations

from swapless.cache.serve import ExpertCache
from swapless.errors import BudgetError, message
from swapless.runtime.allocator import give_back, pages_of_their_own
from swapless.runtime.budget import Budget
from swapless.runtime.fetch import Fetcher
from swapless.runtime.memory import MemoryMeter
from swapless.runtime.needs import Call, Needs
from swapless.runtime.pool import SlotPool
from swapless.units import format_size

_PROMPT_ROWS = 64
"""A call of so many rows is one of those for which memory is taken with care, and given back when they are over."""

_ROWS_BYTES = 1 << 20
"""Routing of so many bytes is part of what a budget sets aside for it."""


class Room:
    """Weighs forward calls against a budget, and lends them the memory of slots.

    Parameters
    ----------
    budget : Budget
        What there is.
    needs : Needs
        What calls of the model hold.
    meter : MemoryMeter
        Tells what the process holds.
    pool, fetcher, cache : SlotPool, Fetcher, ExpertCache
        The blocks, who uses them, and whose slots they are.
    """

    def __init__(
        self, budget: Budget, needs: Needs, meter: MemoryMeter, pool: SlotPool, fetcher: Fetcher, cache: ExpertCache
    ) -> None:
        self._budget, self._needs, self._meter = budget, needs, meter
        self._pool, self._fetcher, self._cache = pool, fetcher, cache
        parts = budget.parts
        lent = ("slots", "staging", "ahead", "prompt", "activations")
        self._beside = sum(nbytes for name, nbytes in parts.items() if name not in lent)
        self._kv_bytes = parts["kv_cache"]
        self._all = budget.slots + budget.staging_slots + budget.ahead_slots
        self._staging = budget.staging_blocks
        self._large = False

    def make(self, call: Call, *, decode: bool, nested: bool, rows_bytes: int) -> None:
        """Lend what ``call``, which is about to run, holds beside the parts of the budget; what was lent before it comes back.

        Parameters
        ----------
        call : Call
            Its sizes.
        decode : bool
            Whether it reads no expert that gets no slot.
        nested : bool
            Whether it runs inside another one, which holds what it holds.
        rows_bytes : int
            What its routing takes on the way.

        Raises
        ------
        BudgetError
            The budget has no room for it; the message names the one that has.
        """
        large = call.batch * call.new >= _PROMPT_ROWS
        if large != self._large and not nested:
            self._large = large
            pages_of_their_own(large)
            if large:
                give_back()
        if not self._budget.capped:
            return
        # A decode step needs a slot of each pool; where all have their own block, staging has none.
        least = self._staging + (sum(map(bool, self._cache.pool_slots)) if decode else 0)
        needs = self._needs.of(call) + max(0, rows_bytes - _ROWS_BYTES) + max(0, self._needs.cached(call) - self._kv_bytes)
        usable = self._usable(call, needs)
        if usable < min(least, self._all):
            give_back()
            usable = self._usable(call, needs)
        if usable < min(least, self._all):
            raise self._too_large(call, needs, self._budget.total_bytes + (least - usable) * self._budget.slot_bytes)
        blocks = self._pool.slots if usable >= self._all else usable
        if nested:
            blocks = min(blocks, self._fetcher.blocks)
        if blocks != self._fetcher.blocks:
            withheld, changed = self._fetcher.use(blocks)
            if changed:
                self._cache.withhold([*withheld, *changed])
            self._cache.withhold(withheld)

    def done(self, *, nested: bool) -> None:
        """A call is over: what it held goes back to the system."""
        if self._large and not nested:
            self._large = False
            pages_of_their_own(False)
            give_back()

    def _usable(self, call: Call, needs: int) -> int:
        budget = self._budget
        free = budget.total_bytes - self._beside - needs
        if self._meter.source != "unknown":
            held = self._meter.quick_bytes() - self._pool.held_bytes + self._needs.new_in_cache(call)
            free = min(free, budget.total_bytes - held - needs)
        return max(0, free // budget.slot_bytes)

    def _too_large(self, call: Call, needs: int, least: int) -> BudgetError:
        sequences = f"{call.batch} sequences of " if call.batch > 1 else ""
        logits = f", with logits of {call.logits_rows}" if call.logits_rows > 1 else ""
        return BudgetError(
            message(
                "The memory budget has no room for this call.",
                got=f"{sequences}{call.past + call.new} tokens{logits}: {format_size(needs)} at once",
                allowed=f"with a budget of at least {format_size(least)} ({least} bytes)",
                step="Raise --memory, or run fewer or shorter sequences at once, or ask for fewer logits (logits_to_keep).",
            )
        )
