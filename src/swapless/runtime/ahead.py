"""Reading ahead: experts that are foreseen, fetched while the disk has nothing else to do, beside the cache and never into it.

What was foreseen lands in a few blocks of memory of its own, so that a wrong guess evicts nothing. When the expert is asked
for and the cache gives it a slot, block and slot change places: no copy. A read ahead is *useful* if it is there when asked
for, *late* if it is still under way then, and *wasted* if its MoE layer is gone past without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch

from swapless.runtime.loader import PREFETCH, Loader, Read, Ticket

Key = tuple[int, int]
"""MoE layer and expert."""


class Lookahead(Protocol):
    """Says which experts come next."""

    def foresee(self, moe_layer: int, hidden_TD: torch.Tensor) -> Iterable[tuple[int, list[int]]]:
        """Later MoE layers and the experts foreseen for each, nearest layer first, likeliest expert first.

        Asked in decode when the experts of ``moe_layer`` are known; ``hidden_TD`` is what they are given.
        """
        ...

    def seen(self, moe_layer: int, ids_TK: torch.Tensor) -> None:
        """The experts of a MoE layer as its router chose them: called in every block, before :meth:`foresee`."""
        ...


class ReadAhead:
    """The blocks beside the cache, and what is in them or on its way.

    Parameters
    ----------
    loader : Loader
        Reads.
    blocks : iterable of int
        Places in the pool that are no cache slots.
    """

    def __init__(self, loader: Loader, blocks: Iterable[int]) -> None:
        self._loader = loader
        self._free = list(blocks)
        self._under_way: dict[Key, Ticket] = {}
        self._here: dict[Key, int] = {}
        self._awaited: dict[Key, Ticket] = {}
        self._passed: set[Key] = set()
        self.reads = self.useful = self.late = self.wasted = 0

    def fetch(self, moe_layer: int, experts: Iterable[int]) -> None:
        """Begin to read what is not here yet, as far as there is room."""
        for expert in experts:
            key = moe_layer, expert
            if not self._free:
                return
            if key in self._here or key in self._under_way:
                continue
            self._under_way[key] = self._loader.submit(moe_layer, expert, self._free.pop(), PREFETCH)
            self.reads += 1

    def landed(self, read: Read) -> bool:
        """Take note of a finished read, if it is one of ours that nobody waits for."""
        key = read.moe_layer, read.expert
        self._awaited.pop(key, None)
        ticket = self._under_way.get(key)
        if ticket is None or ticket.slot != read.slot:
            return False
        del self._under_way[key]
        if read.error is not None or key in self._passed:
            # A read that failed is forgotten: if the expert is needed, the demand read says what is wrong.
            self._passed.discard(key)
            self._free.append(read.slot)
            self.wasted += 1
        else:
            self._here[key] = read.slot
        return True

    def take(self, moe_layer: int, expert: int) -> tuple[int | None, bool]:
        """An expert that is asked for now: its block if it is here, and whether its read is under way and must be waited for.

        Its block is the caller's from then on, who gives another back with :meth:`give`.
        """
        key = moe_layer, expert
        if key in self._here:
            self.useful += 1
            return self._here.pop(key), False
        ticket = self._under_way.pop(key, None)
        if ticket is None:
            return None, False
        self._passed.discard(key)
        if self._loader.call_off(ticket):  # not begun: the caller's own read goes straight into its slot
            self._free.append(ticket.slot)
            self.reads -= 1
            return None, False
        self._awaited[key] = ticket
        self._loader.hurry(ticket)
        self.late += 1
        return None, True

    def give(self, block: int) -> None:
        """A block that is free again."""
        self._free.append(block)

    def pass_by(self, moe_layer: int | None = None) -> None:
        """The experts of this MoE layer (None: of all) are known: what else was foreseen for it is of no use to this token."""

        def past(key: Key) -> bool:
            return moe_layer is None or key[0] == moe_layer

        for key in filter(past, list(self._here)):
            self._free.append(self._here.pop(key))
            self.wasted += 1
        for key in filter(past, list(self._under_way)):
            if self._loader.call_off(self._under_way[key]):
                self._free.append(self._under_way.pop(key).slot)
                self.reads -= 1
            else:
                self._passed.add(key)

    def reset(self, blocks: Iterable[int]) -> None:
        """After an error: nothing is under way any more, what was here is not trusted, and these blocks are free."""
        self._free = list(blocks)
        self._under_way, self._awaited, self._here, self._passed = {}, {}, {}, set()


class Governor:
    """Reads ahead only while it pays: the time of a token with it against the time without, taken in turns.

    A trial of four short windows, with, without, with, without, decides for a while; then another trial, since the text
    and the disk change.
    """

    TRIAL_WINDOWS = 4
    WINDOW_TOKENS = 8
    HOLD_TOKENS = 256

    def __init__(self) -> None:
        self.on = True
        self._trial: list[list[float]] | None = [[]]
        self._held = 0

    def token_done(self, seconds: float) -> None:
        """One decode step is over; changes ``on`` where it is time to."""
        if self._trial is None:
            self._held += 1
            if self._held == self.HOLD_TOKENS:
                self.on, self._trial = True, [[]]
            return
        self._trial[-1].append(seconds)
        if len(self._trial[-1]) < self.WINDOW_TOKENS:
            return
        if len(self._trial) < self.TRIAL_WINDOWS:
            self._trial.append([])
            self.on = not self.on
            return
        # The first token after a change still lives on what the other way left behind.
        with_it, without = (sorted(seconds for window in self._trial[first::2] for seconds in window[1:]) for first in (0, 1))
        self.on = with_it[len(with_it) // 2] < without[len(without) // 2]
        self._trial, self._held = None, 0


class Prefetcher:
    """Look-ahead, the blocks it reads into, and whether it pays: what the engine calls.

    Parameters
    ----------
    lookahead : Lookahead
        Foresees.
    reads : ReadAhead
        Fetches.
    resident : callable of (moe_layer, expert) -> bool
        Whether the cache holds an expert, which then need not be read.
    """

    def __init__(self, lookahead: Lookahead, reads: ReadAhead, resident: Callable[[int, int], bool]) -> None:
        self.reads = reads
        self._lookahead = lookahead
        self._resident = resident
        self._governor = Governor()
        self._foreseen: dict[tuple[int, int], list[int]] = {}
        self.reset_stats()

    def reset_stats(self) -> None:
        """Count afresh."""
        self._asked: dict[int, int] = {}
        self._right: dict[int, int] = {}
        self._tokens = 0
        self.reads.reads = self.reads.useful = self.reads.late = self.reads.wasted = 0

    def figures(self) -> dict[str, Any]:
        """Fields of :class:`~swapless.runtime.stats.Stats`."""
        return {
            "prefetch_reads": self.reads.reads,
            "prefetch_useful": self.reads.useful,
            "prefetch_late": self.reads.late,
            "prefetch_wasted": self.reads.wasted,
            "prefetch_tokens": self._tokens,
            "prefetch_on": self._governor.on,
            "prefetch_recall": {lead: self._right[lead] / asked for lead, asked in sorted(self._asked.items())},
        }

    def chosen(self, moe_layer: int, ids_TK: torch.Tensor, experts: Iterable[int], *, decode: bool) -> None:
        """The router of a MoE layer has chosen these distinct experts."""
        self._lookahead.seen(moe_layer, ids_TK)
        if not decode:
            return
        wanted = set(experts)
        for key in [key for key in self._foreseen if key[0] == moe_layer]:
            lead, foreseen = key[1], self._foreseen.pop(key)
            self._asked[lead] = self._asked.get(lead, 0) + len(wanted)
            self._right[lead] = self._right.get(lead, 0) + len(wanted.intersection(foreseen))

    def look(self, moe_layer: int, hidden_TD: torch.Tensor) -> None:
        """Foresee and begin to read, while it pays."""
        if not self._governor.on:
            return
        for later, experts in self._lookahead.foresee(moe_layer, hidden_TD):
            self._foreseen[later, later - moe_layer] = experts
            self.reads.fetch(later, [expert for expert in experts if not self._resident(later, expert)])

    def token_done(self, seconds: float) -> None:
        """A decode step took so long."""
        self._tokens += self._governor.on
        self._foreseen = {}
        self._governor.token_done(seconds)
