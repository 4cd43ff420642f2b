"""Fewer threads while another process has the cores: one that is late holds up all that wait for it.

OpenMP cuts every product into as many equal parts as there are threads and waits for the last. A thread that shares its core
with a busy neighbour comes milliseconds late, hundreds of times a token, and decoding falls to a tenth. So forward calls look,
a few times a second, at how long our threads stood ready and had no core, and try fewer threads where that is much; what
decode steps then take says whether it was right. Once a core is idle again, all threads are tried. Only the thread that
computes, and only for its own calls, is given another number: no switch of the process is touched.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from swapless.runtime.kernels_threads import Before, limit_here, restore_here, threads_here

WINDOW_S = 0.25
"""Steps are looked at together for at least so long."""
LATE = 0.25
"""Threads that stand ready on average, from which on somebody else has the cores."""
IDLE = 0.5
"""Cores that are idle on average, from which on there may be room for all threads again."""
GAIN = 0.95
"""What a step may take, of what it took before, for another number of threads to have been worth it."""
HOLD_S, MOST_HOLD_S = 2.0, 64.0
"""After a trial that failed, the next waits so long; twice as long after each that fails again."""


class Reading(NamedTuple):
    """What the system says: seconds on the clock, and seconds so far that threads waited, readers ran, and cores were idle.

    ``waited_s`` sums over our threads the time that they were ready to run and did not, ``readers_s`` that our reader threads
    ran, during which a compute thread of ours may have waited for nobody else.
    """

    now_s: float
    waited_s: float
    readers_s: float
    idle_s: float


class _Trial(NamedTuple):
    before: int | None
    seconds: float | None
    fewer: bool


class Crowd:
    """How many threads the next forward call computes with.

    Parameters
    ----------
    read : callable of () -> Reading or None
        What the system says now; None where it says nothing, and then nothing is ever changed.
    clock : callable of () -> float
        Seconds.

    Attributes
    ----------
    limit : int or None
        Threads to use; None is all that torch has.
    """

    def __init__(self, read: Callable[[], Reading | None], clock: Callable[[], float] = time.perf_counter) -> None:
        self.limit: int | None = None
        self._read, self._clock = read, clock
        self._before: Before | None = None
        self._seconds: list[float] = []
        self._total_s = self._looked_s = self._began_s = 0.0
        self._last: Reading | None = None
        self._trial: _Trial | None = None
        self._not_before = {True: 0.0, False: 0.0}
        self._hold_s = {True: HOLD_S, False: HOLD_S}

    def begin(self) -> None:
        """A forward call begins in this thread."""
        self._began_s = self._clock()
        self._limit_here()

    def _limit_here(self) -> None:
        if self.limit is not None and self._before is None:
            self._before = limit_here(min(self.limit, threads_here()))

    def leave(self) -> None:
        """The call is over, however it ended: this thread is as it was."""
        if self._before is not None:
            restore_here(self._before)
            self._before = None

    def begin_child(self) -> None:
        """The process was forked, perhaps amid a call: this is the child, which has one thread and gets no other back."""
        self.limit = self._before = self._trial = self._last = None

    def block_done(self) -> None:
        """A block of a prompt is over: a long one does not wait for its end to notice."""
        if self._clock() - self._looked_s >= 4 * WINDOW_S:
            began_s, self._began_s = self._began_s, self._clock()
            self._total_s += self._began_s - began_s
            self._look(None)
            self.leave()
            self._limit_here()

    def step_done(self, seconds: float, *, decode: bool) -> None:
        """A forward call took so long; only those that decode compare with each other."""
        self._total_s += self._clock() - self._began_s
        if decode:
            self._seconds.append(seconds)
        if self._total_s >= WINDOW_S:
            self._look(sum(self._seconds) / len(self._seconds) if self._seconds else None)

    def _look(self, step_s: float | None) -> None:
        busy_s, self._seconds, self._total_s, self._looked_s = self._total_s, [], 0.0, self._clock()
        now, last = self._read(), self._last
        self._last = now
        if now is None or last is None or now.now_s - last.now_s > 2 * busy_s + WINDOW_S:
            return  # whatever happened between two texts is no sign of anything
        passed = now.now_s - last.now_s
        late = (now.waited_s - last.waited_s - (now.readers_s - last.readers_s)) / passed
        if self._trial is not None:
            self._judge(self._trial, step_s, now.now_s)
        elif late >= LATE:
            self._try(late, step_s, now.now_s)
        elif self.limit is not None and (now.idle_s - last.idle_s) / passed >= IDLE and self._may(False, now.now_s):
            self._trial, self.limit = _Trial(self.limit, step_s, False), None

    def _try(self, late: float, step_s: float | None, now_s: float) -> None:
        threads = self._before.threads if self._before is not None else threads_here()
        used = threads if self.limit is None else min(self.limit, threads)
        if used > 1 and self._may(True, now_s):
            self._trial = _Trial(self.limit, step_s, True)
            self.limit = max(1, used - max(1, round(late)))

    def _judge(self, trial: _Trial, step_s: float | None, now_s: float) -> None:
        if trial.seconds is not None and step_s is None:
            return  # no decode step since
        self._trial = None
        if trial.seconds is None or step_s is None or step_s <= GAIN * trial.seconds:
            self._hold_s[trial.fewer] = HOLD_S
            return
        self.limit = trial.before
        self._not_before[trial.fewer] = now_s + self._hold_s[trial.fewer]
        self._hold_s[trial.fewer] = min(MOST_HOLD_S, 2 * self._hold_s[trial.fewer])

    def _may(self, fewer: bool, now_s: float) -> bool:
        return now_s >= self._not_before[fewer]


class System:
    """Reads how crowded the cores are from Linux' own counters.

    Parameters
    ----------
    readers : callable of () -> collection of int
        Native ids of our reader threads.
    """

    def __init__(self, readers: Callable[[], Collection[int]]) -> None:
        self._readers = readers
        self._threads: dict[str, tuple[int, int]] = {}
        self._waited_ns = self._readers_ns = 0

    def __call__(self) -> Reading | None:
        """What the counters say now, or None where there are none."""
        readers = {str(number) for number in self._readers()}
        threads: dict[str, tuple[int, int]] = {}
        try:
            for task in Path("/proc/self/task").iterdir():
                with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
                    fields = (task / "schedstat").read_bytes().split()
                    threads[task.name] = int(fields[0]), int(fields[1])
            idle = Path("/proc/stat").read_bytes().split(maxsplit=6)
        except (OSError, ValueError, IndexError):
            return None  # no Linux, or a kernel without these counters
        if not threads:
            return None
        for thread, (ran, waited) in threads.items():
            if thread in self._threads:
                self._waited_ns += waited - self._threads[thread][1]
                self._readers_ns += (ran - self._threads[thread][0]) * (thread in readers)
        self._threads = threads
        idle_s = (int(idle[4]) + int(idle[5])) / os.sysconf("SC_CLK_TCK")
        return Reading(time.perf_counter(), self._waited_ns / 1e9, self._readers_ns / 1e9, idle_s)
