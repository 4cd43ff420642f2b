"""Whose turn it is: one forward call of a model at a time, and what a fork leaves of it.

The slots of a block are pinned while it is computed and quantised layers have scratch memory of their own, so calls of two
threads cannot run through one model at once: the later waits for its turn. A call from inside another, as a hook may make,
has the turn already and goes ahead between two blocks.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

PATIENCE = 10.0
"""Seconds that a fork waits for a call of another thread to end."""


class Turn:
    """A lock that the thread which holds it may take again, and that a forked child gets anew.

    Take it by ``with turn.lock:`` and no other way: between its taking and the ``with`` no Ctrl-C can strike.

    Parameters
    ----------
    in_child : bound method of bool, optional
        Called in a forked child before anything else, told whether nobody else had the turn when the process was forked.
        Its object is not kept alive.
    """

    def __init__(self, in_child: Callable[[bool], None] | None = None) -> None:
        self.lock = threading.RLock()
        self._in_child = weakref.WeakMethod(in_child) if in_child is not None else None
        self._held = False
        _add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return Turn, ()  # a copy of whatever takes turns takes its own

    def before_fork(self) -> None:
        """Take the lock, so that no call runs while memory is copied.

        What a call of another thread is in the middle of, a lock of torch's or of OneDNN's, the child would wait for without
        end. So the fork waits for that call, though not for ever: it may itself be waiting for the thread that forks.
        """
        self._held = self.lock.acquire(timeout=PATIENCE)

    def after_fork(self) -> None:
        """Go on, in the parent."""
        if self._held:
            self._held = False
            self.lock.release()

    def begin_child(self) -> None:
        """Start afresh, in the child, where no other thread is left that could give the lock back."""
        alone, self._held = self._held, False
        self.lock = threading.RLock()
        told = self._in_child() if self._in_child is not None else None
        if told is not None:
            told(alone)


def on_stack(frame: FrameType | None) -> bool:
    """Whether ``frame`` is being executed by this thread: one that Ctrl-C cut off is not, whatever it left undone."""
    here: FrameType | None = sys._getframe(1) if frame is not None else None
    while here is not None:
        if here is frame:
            return True
        here = here.f_back
    return False


_turns: set[weakref.ref[Turn]] = set()


def _add(turn: Turn) -> None:
    _turns.add(weakref.ref(turn, _turns.discard))


def _all(call: Callable[[Turn], None]) -> None:
    for reference in tuple(_turns):
        turn = reference()
        if turn is not None:
            call(turn)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=lambda: _all(Turn.before_fork),
        after_in_parent=lambda: _all(Turn.after_fork),
        after_in_child=lambda: _all(Turn.begin_child),
    )
