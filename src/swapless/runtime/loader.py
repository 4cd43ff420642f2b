"""Reader threads: fetch experts into slots while the computation goes on, demand reads before all else.

A prefetch read waits while any demand read does; it can be called off until a thread has begun it, and hurried once the
computation waits for it.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from swapless.errors import ClosedError, ReadError, message

DEMAND, PREFETCH = 0, 1


class Read(NamedTuple):
    """One finished read: what was asked for, what it cost, and the error that ended it, if any."""

    moe_layer: int
    expert: int
    slot: int
    nbytes: int
    seconds: float
    error: BaseException | None


class Ticket:
    """An expert under way: what is left of it, and what it has cost so far. Handed out by :meth:`Loader.submit`."""

    __slots__ = ("begun", "error", "expert", "left", "lock", "moe_layer", "nbytes", "parts", "seconds", "slot")

    def __init__(self, moe_layer: int, expert: int, slot: int, parts: int) -> None:
        self.moe_layer, self.expert, self.slot = moe_layer, expert, slot
        self.parts = self.left = parts
        self.begun: set[int] = set()
        self.nbytes, self.seconds = 0, 0.0
        self.error: BaseException | None = None
        self.lock = threading.Lock()

    def begin(self, part: int) -> bool:
        """Whether the caller is the first to take this part: a hurried one is queued twice."""
        with self.lock:
            if part in self.begun:
                return False
            self.begun.add(part)
            return True

    def call_off(self) -> bool:
        """Take all parts away from the reader threads, unless one of them was begun already."""
        with self.lock:
            if self.begun:
                return False
            self.begun.update(range(self.parts))
            return True

    def part_done(self, nbytes: int, seconds: float, error: BaseException | None) -> Read | None:
        """One part is done; the whole read if it was the last."""
        with self.lock:
            self.left -= 1
            self.nbytes += nbytes
            self.seconds += seconds
            self.error = self.error or error
            if self.left:
                return None
        return Read(self.moe_layer, self.expert, self.slot, self.nbytes, self.seconds, self.error)


class Loader:
    """A few threads that fill slots.

    Parameters
    ----------
    read_part : callable of (moe_layer, expert, part, slot memory, bounce buffer) -> int
        Fetches one part of an expert and returns the bytes read; called from several threads at once.
    parts : callable of (moe_layer, expert) -> int
        Into how many parts an expert is cut.
    slot_memory : callable of int -> uint8 ndarray
        The memory of a slot.
    bounce_buffer : callable of () -> uint8 ndarray
        A scratch buffer for one thread.
    threads : int
        Reads in flight.
    """

    def __init__(
        self,
        read_part: Callable[[int, int, int, np.ndarray, np.ndarray], int],
        parts: Callable[[int, int], int],
        slot_memory: Callable[[int], np.ndarray],
        bounce_buffer: Callable[[], np.ndarray],
        threads: int,
    ) -> None:
        self._parts = parts
        self._read_part, self._slot_memory = read_part, slot_memory
        self._bounces = [bounce_buffer() for _ in range(threads)]
        self._closed = False
        self._start()

    def _start(self) -> None:
        self._outstanding = 0
        self._forked = False
        self._work = work = _Work(self._read_part, self._slot_memory)
        # Threads know their work and not the loader: one that everybody has forgotten is collected, and ends them.
        self._end = weakref.finalize(self, work.end)
        for number, bounce in enumerate(self._bounces):
            thread = threading.Thread(target=work.run, args=(bounce,), name=f"swapless-read-{number}", daemon=True)
            work.threads.append(thread)
            thread.start()

    @property
    def outstanding(self) -> int:
        """Reads submitted and not yet taken back by :meth:`next`."""
        return self._outstanding

    @property
    def thread_ids(self) -> list[int]:
        """What the system calls the reader threads."""
        return [thread.native_id for thread in self._work.threads if thread.native_id is not None]

    @property
    def complete(self) -> bool:
        """Whether all reader threads are there."""
        return len(self._work.threads) == len(self._bounces) and all(thread.is_alive() for thread in self._work.threads)

    def submit(self, moe_layer: int, expert: int, slot: int, priority: int = DEMAND) -> Ticket:
        """Ask for an expert in a slot. The slot must not be touched until its read comes back from :meth:`next`."""
        if self._closed:
            raise ClosedError(message("The model was closed.", step="Load it again."))
        ticket = Ticket(moe_layer, expert, slot, self._parts(moe_layer, expert))
        self._outstanding += 1
        self._work.add(ticket, priority)
        return ticket

    def hurry(self, ticket: Ticket) -> None:
        """Turn a prefetch read into a demand read: the computation waits for it now."""
        self._work.add(ticket, DEMAND)

    def call_off(self, ticket: Ticket) -> bool:
        """Drop a read that no thread has begun; False if one has, and then it comes back from :meth:`next` like any other."""
        gone = ticket.call_off()
        self._outstanding -= gone
        return gone

    def next(self) -> Read:
        """The next finished read, waiting for it. Raises nothing of its own: look at ``error``."""
        read = self._work.finished.get()
        self._outstanding -= 1
        return read

    def finished(self) -> list[Read]:
        """The reads that are back already, without waiting."""
        reads = []
        with contextlib.suppress(queue.Empty):
            while True:
                reads.append(self._work.finished.get_nowait())
        self._outstanding -= len(reads)
        return reads

    def drain(self) -> None:
        """Come to rest after an error or Ctrl-C: drop the reads not begun, wait for those under way, forget them all.

        Nothing is counted here, because Ctrl-C may strike between a queue and its counter: the threads are met at a barrier.
        In a forked child, where there are none to be met, it starts new ones.
        """
        if self._forked:
            self._start()
            return
        work = self._work
        work.drop()
        barrier = threading.Barrier(len(work.threads) + 1)
        try:
            for _ in work.threads:
                work.wake.put(barrier)
            barrier.wait()
        finally:
            barrier.abort()  # a second Ctrl-C must not leave the threads waiting
            _empty(work.finished)
            self._outstanding = 0

    def begin_child(self) -> None:
        """The process was forked, and this is the child: there are no threads any more, and what they were at is lost."""
        self._end.detach()
        self._forked = True
        self._work.finished = queue.SimpleQueue()
        lost = ReadError(
            message("The process was forked in the middle of a read.", step="Fork between two calls of the model.")
        )
        self._work.finished.put(Read(-1, -1, -1, 0, 0.0, lost))  # whoever waits for a read in this child would wait for ever

    def close(self) -> None:
        """Finish what is under way and end the threads. May be called twice, and again where Ctrl-C cut it off."""
        self._closed = True
        if not self._forked:
            self._work.end()
        self._end.detach()


class _Work:
    """What reader threads share: their tasks by priority, what is done, and whether it is over."""

    def __init__(
        self,
        read_part: Callable[[int, int, int, np.ndarray, np.ndarray], int],
        slot_memory: Callable[[int], np.ndarray],
    ) -> None:
        self._read_part, self._slot_memory = read_part, slot_memory
        self.threads: list[threading.Thread] = []
        self.finished: queue.SimpleQueue[Read] = queue.SimpleQueue()
        # Nothing here has a lock of Python's: a garbage collection may end the threads from anywhere, from one of them too.
        self.wake: queue.SimpleQueue[threading.Barrier | None] = queue.SimpleQueue()
        self._tasks: tuple[deque[_Task], ...] = (deque(), deque())
        self._over = False

    def add(self, ticket: Ticket, priority: int) -> None:
        """Queue all parts of a read."""
        for part in range(ticket.parts):
            self._tasks[priority].append((ticket, part))
            self.wake.put(None)

    def drop(self) -> None:
        """Forget what no thread has begun."""
        for tasks in self._tasks:
            tasks.clear()

    def end(self) -> None:
        """Let the threads finish what they are at, and wait for them. May be called again."""
        self._over = True
        for _ in self.threads:
            self.wake.put(None)
        if threading.current_thread() in self.threads:
            return  # a garbage collection in one of them: another may wait for what this one holds
        for thread in self.threads:
            if thread.ident is not None:  # else Ctrl-C came before it was started
                thread.join()

    def run(self, bounce: np.ndarray) -> None:
        """What a reader thread does; ``bounce`` is its own scratch buffer."""
        while True:
            barrier = self.wake.get()
            if self._over:
                return
            if barrier is not None:
                with contextlib.suppress(threading.BrokenBarrierError):
                    barrier.wait()
                continue
            task = self._next()
            if task is None:
                continue  # it was dropped
            ticket, part = task
            if not ticket.begin(part):
                continue
            start = time.perf_counter()
            nbytes, failure = 0, None
            try:
                memory = self._slot_memory(ticket.slot)
                nbytes = self._read_part(ticket.moe_layer, ticket.expert, part, memory, bounce)
            except BaseException as error:  # the computation's thread raises it, in its own place
                failure = error
            read = ticket.part_done(nbytes, time.perf_counter() - start, failure)
            if read is not None:
                self.finished.put(read)

    def _next(self) -> _Task | None:
        for tasks in self._tasks:
            with contextlib.suppress(IndexError):
                return tasks.popleft()
        return None


_Task = tuple[Ticket, int]


def _empty(waiting: queue.SimpleQueue[Any]) -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            waiting.get_nowait()
