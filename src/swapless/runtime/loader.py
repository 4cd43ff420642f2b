"""Reader threads: fetch experts into slots while the computation goes on, demand reads before all else."""

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


class Loader:
    """A few threads that fill slots.

    Parameters
    ----------
    read : callable of (moe_layer, expert, slot memory, bounce buffer) -> int
        Fetches one expert and returns the bytes read; called from several threads at once.
    slot_memory : callable of int -> uint8 ndarray
        The memory of a slot.
    bounce_buffer : callable of () -> uint8 ndarray
        A scratch buffer for one thread.
    threads : int
        Reads in flight.
    """

    def __init__(
        self,
        read: Callable[[int, int, np.ndarray, np.ndarray], int],
        slot_memory: Callable[[int], np.ndarray],
        bounce_buffer: Callable[[], np.ndarray],
        threads: int,
    ) -> None:
        self._read = read
        self._slot_memory = slot_memory
        self._tasks: queue.PriorityQueue[tuple[int, int, tuple[int, int, int] | threading.Barrier | None]] = (
            queue.PriorityQueue()
        )
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

    def submit(self, moe_layer: int, expert: int, slot: int) -> None:
        """Ask for an expert in a slot. The slot must not be touched until its read comes back from :meth:`next`."""
        if self._closed:
            raise ClosedError(message("The model was closed.", step="Load it again."))
        self._issued += 1
        self._outstanding += 1
        self._tasks.put((DEMAND, self._issued, (moe_layer, expert, slot)))

    def next(self) -> Read:
        """The next finished read, waiting for it. Raises nothing of its own: look at ``error``."""
        read = self._finished.get()
        self._outstanding -= 1
        return read

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
            moe_layer, expert, slot = task
            start = time.perf_counter()
            nbytes, failure = 0, None
            try:
                nbytes = self._read(moe_layer, expert, self._slot_memory(slot), bounce)
            except BaseException as error:  # the computation's thread raises it, in its own place
                failure = error
            self._finished.put(Read(moe_layer, expert, slot, nbytes, time.perf_counter() - start, failure))


def _empty(waiting: queue.Queue[Any] | queue.SimpleQueue[Any]) -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            waiting.get_nowait()
