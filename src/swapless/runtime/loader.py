"""Reader threads: fetch experts into slots while the computation goes on, demand reads before all else.

A prefetch read waits while any demand read does; it can be called off until a thread has begun it, and hurried once the
computation waits for it.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from swapless.errors import ClosedError, message

DEMAND, PREFETCH, REST = 0, 1, 2


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
        self._read_part = read_part
        self._parts = parts
        self._slot_memory = slot_memory
        self._tasks: queue.PriorityQueue[tuple[int, int, _Task | threading.Barrier | None]] = queue.PriorityQueue()
        self._finished: queue.SimpleQueue[Read] = queue.SimpleQueue()
        self._issued = 0
        self._outstanding = 0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, args=(bounce_buffer(),), name=f"swapless-read-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def outstanding(self) -> int:
        """Reads submitted and not yet taken back by :meth:`next`."""
        return self._outstanding

    def submit(self, moe_layer: int, expert: int, slot: int, priority: int = DEMAND) -> Ticket:
        """Ask for an expert in a slot. The slot must not be touched until its read comes back from :meth:`next`."""
        if self._closed:
            raise ClosedError(message("The model was closed.", step="Load it again."))
        ticket = Ticket(moe_layer, expert, slot, self._parts(moe_layer, expert))
        self._outstanding += 1
        self._queue(ticket, priority)
        return ticket

    def hurry(self, ticket: Ticket) -> None:
        """Turn a prefetch read into a demand read: the computation waits for it now."""
        self._queue(ticket, DEMAND)

    def call_off(self, ticket: Ticket) -> bool:
        """Drop a read that no thread has begun; False if one has, and then it comes back from :meth:`next` like any other."""
        gone = ticket.call_off()
        self._outstanding -= gone
        return gone

    def _queue(self, ticket: Ticket, priority: int) -> None:
        for part in range(ticket.parts):
            self._issued += 1
            self._tasks.put((priority, self._issued, (ticket, part)))

    def next(self) -> Read:
        """The next finished read, waiting for it. Raises nothing of its own: look at ``error``."""
        read = self._finished.get()
        self._outstanding -= 1
        return read

    def finished(self) -> list[Read]:
        """The reads that are back already, without waiting."""
        reads = []
        with contextlib.suppress(queue.Empty):
            while True:
                reads.append(self._finished.get_nowait())
        self._outstanding -= len(reads)
        return reads

    def drain(self) -> None:
        """Come to rest after an error or Ctrl-C: drop the reads not begun, wait for those under way, forget them all.

        Nothing is counted here, because Ctrl-C may strike between a queue and its counter: the threads are met at a barrier.
        """
        _empty(self._tasks)
        barrier = threading.Barrier(len(self._threads) + 1)
        try:
            for _ in self._threads:
                self._issued += 1
                self._tasks.put((REST, self._issued, barrier))
            barrier.wait()
        finally:
            barrier.abort()  # a second Ctrl-C must not leave the threads waiting
            _empty(self._finished)
            self._outstanding = 0

    def close(self) -> None:
        """Finish what is under way and end the threads. May be called twice."""
        if self._closed:
            return
        self._closed = True
        for _ in self._threads:
            self._issued += 1
            self._tasks.put((REST, self._issued, None))
        for thread in self._threads:
            thread.join()

    def _work(self, bounce: np.ndarray) -> None:
        while True:
            task = self._tasks.get()[2]
            if task is None:
                return
            if isinstance(task, threading.Barrier):
                with contextlib.suppress(threading.BrokenBarrierError):
                    task.wait()
                continue
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
                self._finished.put(read)


_Task = tuple[Ticket, int]


def _empty(waiting: queue.Queue[Any] | queue.SimpleQueue[Any]) -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            waiting.get_nowait()
