"""Reading ahead: experts that are foreseen, fetched while the disk has nothing else to do, beside the cache and never into it.

What was foreseen lands in a few blocks of memory of its own, so that a wrong guess evicts nothing. When the expert is asked
for and the cache gives it a slot, block and slot change places: no copy. A read ahead is *useful* if it is there when asked
for, *late* if it is still under way then, and *wasted* if its MoE layer is gone past without it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from swapless.notation import Phase
from swapless.runtime.loader import PREFETCH, Loader, Read, Ticket
from swapless.runtime.routing import Step

Key = tuple[int, int]
"""MoE layer and expert."""


class Foreseen(NamedTuple):
    """Experts foreseen for a later MoE layer, likeliest first, and how many of the first are worth a read."""

    moe_layer: int
    experts: list[int]
    worth: int


class Lookahead(Protocol):
    """Says which experts come next."""

    def begin(self, step: Step) -> None:
        """A forward call of the whole model begins."""
        ...

    def seen(self, moe_layer: int, ids_TK: torch.Tensor) -> None:
        """The experts of a MoE layer as its router chose them: called in every block, before :meth:`foresee`."""
        ...

    def foresee(self, moe_layer: int, hidden_TD: torch.Tensor | None) -> Sequence[Foreseen]:
        """What is foreseen for later MoE layers, nearest layer first.

        Asked in decode, at the beginning of a step (``moe_layer`` -1, no hidden state yet) and then when the experts of
        ``moe_layer`` are known; ``hidden_TD`` is what they are given.
        """
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

    @property
    def blocks(self) -> list[int]:
        """All blocks that are here and no slot's: free, read into, or with an expert that was foreseen."""
        reading = [ticket.slot for ticket in (*self._under_way.values(), *self._awaited.values())]
        return [*self._free, *reading, *self._here.values()]

    @property
    def under_way(self) -> int:
        """Reads that have not come back."""
        return len(self._under_way) + len(self._awaited)

    def fetch(self, moe_layer: int, experts: Iterable[int]) -> None:
        """Begin to read what is not here yet, as far as there is room."""
        for expert in experts:
            key = moe_layer, expert
            self._passed.discard(key)  # foreseen again, for the next token, before its read for this one has ended
            if key in self._here or key in self._under_way:
                continue
            if not self._free:
                return
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

    A trial of four short windows, with, without, without, with, decides for a while; then another trial, since the text
    and the disk change. What only becomes faster or slower with time weighs on both alike in that order. The first trial waits
    until the cache has filled a little: the first tokens miss most.

    Attributes
    ----------
    on : bool
        Whether to read ahead now.
    with_s, without_s : float or None
        Of the last whole trial, in seconds a token, the mean of its windows' medians; None before the first.
    times_off : int
        Trials that ended with it off.
    """

    TRIAL = (True, False, False, True)
    WINDOW_TOKENS = 8
    HOLD_TOKENS = 256
    FIRST_TOKENS = 16

    def __init__(self) -> None:
        self.on = True
        self.with_s: float | None = None
        self.without_s: float | None = None
        self.times_off = 0
        self._trial: list[list[float]] | None = None
        self._held = self.HOLD_TOKENS - self.FIRST_TOKENS

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
        if len(self._trial) < len(self.TRIAL):
            self.on = self.TRIAL[len(self._trial)]
            self._trial.append([])
            return
        # The first token after a change still lives on what the other way left behind.
        windows = [statistics.median(window[1:]) for window in self._trial]
        self.with_s, self.without_s = (
            statistics.fmean(median for on, median in zip(self.TRIAL, windows, strict=True) if on == way)
            for way in (True, False)
        )
        self.on = self.with_s < self.without_s
        self.times_off += not self.on
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
        self._decode = False
        self.reset_stats()

    def reset_stats(self) -> None:
        """Count afresh."""
        self._asked: dict[int, int] = {}
        self._right: dict[int, int] = {}
        self._tokens = 0
        self._own_s = 0.0
        self._governor.times_off = 0
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
            "prefetch_own_s": self._own_s,
            "prefetch_with_s": self._governor.with_s,
            "prefetch_without_s": self._governor.without_s,
            "prefetch_times_off": self._governor.times_off,
        }

    def begin(self, step: Step) -> None:
        """A forward call of the whole model begins; in decode, foresee its first MoE layers."""
        self._decode = step.phase is Phase.DECODE
        self._foreseen = {}
        begun = time.perf_counter()
        self._lookahead.begin(step)
        self._charge(begun)
        if self._decode:
            self.look(-1, None)
        else:
            self.reads.pass_by()

    def chosen(self, moe_layer: int, ids_TK: torch.Tensor, experts: Iterable[int]) -> None:
        """The router of a MoE layer has chosen these distinct experts."""
        begun = time.perf_counter()
        self._lookahead.seen(moe_layer, ids_TK)
        self._charge(begun)
        if not self._decode:
            return
        wanted = set(experts)
        for key in [key for key in self._foreseen if key[0] == moe_layer]:
            lead, foreseen = key[1], self._foreseen.pop(key)
            self._asked[lead] = self._asked.get(lead, 0) + len(wanted)
            self._right[lead] = self._right.get(lead, 0) + len(wanted.intersection(foreseen))

    def look(self, moe_layer: int, hidden_TD: torch.Tensor | None) -> None:
        """Foresee and begin to read, while it pays."""
        if not self._governor.on:
            return
        begun = time.perf_counter()
        found = self._lookahead.foresee(moe_layer, hidden_TD)
        self._charge(begun)
        for later, experts, worth in found:
            self._foreseen[later, later - moe_layer] = experts
            self.reads.fetch(later, [expert for expert in experts[:worth] if not self._resident(later, expert)])

    def token_done(self, seconds: float) -> None:
        """A decode step took so long."""
        self._tokens += self._governor.on
        self._governor.token_done(seconds)

    def _charge(self, begun: float) -> None:
        """Time of the look-ahead itself; in prefill it is part of the time to the first token and of no token's."""
        if self._decode:
            self._own_s += time.perf_counter() - begun
