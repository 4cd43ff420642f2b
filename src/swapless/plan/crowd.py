"""Whether others are at work on the same machine while something is measured on it: figures of a busy machine are not kept.

Three signs, each of which misses something. How much processor time this process gets when it wants all there is: it sees every
neighbour, limits of containers and a hypervisor that gives others the processor, but only for the moment that it takes. What
the kernel says that others used in between: whole periods, but not in every container. And figures measured twice that
ought to be the same: a disk or a memory bus that others use.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from swapless.processors import affinity, processor_quota, processors

LEAST_SHARE = 0.85
"""Of the processor time asked for, what a quiet machine gives. A neighbour on one of two processors leaves two thirds."""

MOST_TAKEN = 0.15
"""Share of the processors that others may use before figures are too far off: the rest of a system uses a few per cent."""

MOST_SPREAD = 3.0
"""How far two figures of the same thing may lie apart: virtual disks differ by a half from minute to minute."""

_LOOK_S = 0.2
_MOST_THREADS = 32
_CHUNK = bytes(4 << 20)
"""Hashed without the interpreter's lock, for so long that threads hardly meet at it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Busy:
    """Others were at work: what told, and how much was left.

    ``share`` is the least part of the processor time asked for that was given, 1.0 where all of it was; ``taken`` how many
    of the ``processors`` others used on average, where the kernel says so; ``apart`` what was measured twice with figures too
    far apart, each with its two figures.
    """

    processors: int
    share: float
    taken: float | None
    apart: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        signs = []
        if self.share < LEAST_SHARE:
            signs.append(f"this process got {self.share:.0%} of the processor time it asked for")
        if self.taken is not None and self.taken > MOST_TAKEN * self.processors:
            signs.append(f"others used {self.taken:.1f} of {self.processors} processors")
        signs += [f"measured twice, {twice}" for twice in self.apart]
        return f"The machine is busy: {'; '.join(signs)}."


class _Times(NamedTuple):
    """Seconds on the clock, of the processors that we may use, and of this process and its children, all from some start."""

    clock: float
    used: float
    own: float


class Crowd:
    """Looks for others, and remembers the worst that it saw.

    Parameters
    ----------
    least_share, most_taken, most_spread : float
        From where on a machine counts as busy.
    root : Path
        Where ``proc`` and ``sys`` are found.
    """

    def __init__(
        self,
        *,
        least_share: float = LEAST_SHARE,
        most_taken: float = MOST_TAKEN,
        most_spread: float = MOST_SPREAD,
        root: Path = Path("/"),
    ) -> None:
        self._least_share, self._most_taken, self._most_spread, self._root = least_share, most_taken, most_spread, root
        self._processors = processors(root)
        self._share = 1.0
        self._taken: float | None = None
        self._apart: list[str] = []

    def look(self) -> None:
        """Ask for all processor time for a moment, and see how much of it is given."""
        quota = processor_quota(self._root)
        threads = max(1, min(_MOST_THREADS, self._processors if quota is None else int(quota)))
        allowed = 1.0 if quota is None else min(1.0, quota / threads)
        self._share = min(self._share, share_given(threads) / allowed)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count what others use meanwhile. Not around reads and writes: the kernel's own threads do those for us."""
        before = _times(self._root)
        yield
        after = _times(self._root)
        taken = taken_by_others(before, after)
        if taken is not None:
            self._taken = max(taken, self._taken or 0.0)

    def twice(self, what: str, first: float, second: float) -> None:
        """Compare two figures of the same thing, which are positive; ``what`` says its name, with two places for them."""
        if max(first, second) > self._most_spread * min(first, second):
            self._apart.append(what.format(first, second))

    def found(self) -> Busy | None:
        """What was seen; None on a quiet machine."""
        crowded = self._taken is not None and self._taken > self._most_taken * self._processors
        if self._share >= self._least_share and not crowded and not self._apart:
            return None
        return Busy(processors=self._processors, share=self._share, taken=self._taken, apart=tuple(self._apart))


def share_given(threads: int, seconds: float = _LOOK_S) -> float:
    """Part of the processor time given to so many threads that all work for so long."""
    spent, clocks = [0.0] * threads, [0.0] * threads
    together = threading.Barrier(threads)

    def work(number: int) -> None:
        together.wait()
        clock, own = time.perf_counter(), time.thread_time()
        while time.perf_counter() - clock < seconds:
            hashlib.sha256(_CHUNK)
        spent[number], clocks[number] = time.thread_time() - own, time.perf_counter() - clock

    workers = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return min(1.0, sum(spent) / sum(clocks))


def taken_by_others(before: _Times | None, after: _Times | None) -> float | None:
    """Processors that others used on average between two looks; None where the kernel does not say."""
    if before is None or after is None or after.clock <= before.clock:
        return None
    return max(0.0, (after.used - before.used) - (after.own - before.own)) / (after.clock - before.clock)


def _times(root: Path) -> _Times | None:
    try:
        lines = (root / "proc/stat").read_text(encoding="utf-8").splitlines()
        ticks = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None  # no Linux
    used = used_ticks(lines, affinity())
    own = os.times()
    if used is None:
        return None
    spent = own.user + own.system + own.children_user + own.children_system
    return _Times(time.perf_counter(), used / ticks, spent)


def used_ticks(lines: Iterable[str], mine: Iterable[int]) -> int | None:
    """Ticks in which the processors ``mine`` were not idle, by the lines of ``/proc/stat``; None where it knows none of them.

    Examples
    --------
    >>> used_ticks(["cpu 9 0 9 80 2 0 0 0 0 0", "cpu0 5 0 5 40 1 0 0 0 0 0", "cpu1 4 0 4 40 1 0 0 0 0 0"], [1])
    8
    """
    wanted, found = {f"cpu{number}" for number in mine}, dict[str, int]()
    for line in lines:
        name, *fields = line.split()
        if name in wanted and len(fields) >= 8 and all(field.isdecimal() for field in fields[:8]):
            user, nice, system, _idle, _waiting, interrupts, soft, stolen = map(int, fields[:8])
            found[name] = user + nice + system + interrupts + soft + stolen
    return sum(found.values()) if found.keys() == wanted and any(found.values()) else None
