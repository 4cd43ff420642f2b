"""Forward calls of the whole model as they begin and end, one inside another too, and whatever cuts them off."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

from swapless.notation import Phase
from swapless.runtime.routing import RoutingLog, Step
from swapless.runtime.turns import on_stack


class Done(NamedTuple):
    """A forward call that is complete: its step, the seconds it took, and how many of them waited for reads."""

    step: Step
    seconds: float
    stall_s: float

    def add_to(self, counts: dict[str, Any]) -> None:
        """Add it to the counters of all calls."""
        phase = self.step.phase
        counts["steps"] += 1
        counts["compute_s"] += self.seconds - self.stall_s
        counts[f"{phase.label}_tokens"] += int(self.step.recorded.sum())
        counts[f"{phase.label}_s"] += self.seconds
        if phase is Phase.DECODE:
            counts["decode_stall_s"] += self.stall_s


class _Call:
    """The frame that runs a forward call, whether it is inside another, and its step once that has begun."""

    __slots__ = ("frame", "nested", "stalled_before", "started", "step")

    def __init__(self, frame: FrameType | None, *, nested: bool = False) -> None:
        self.frame, self.nested = frame, nested
        self.step: Step | None = None
        self.started = self.stalled_before = 0.0


class Calls:
    """The forward call that is under way.

    Parameters
    ----------
    routing : RoutingLog
        Keeps the routing of complete calls.
    stalled_s : callable of () -> float
        Seconds waited for reads so far.
    resume : callable of Step
        Goes on with the step of an outer call when the one inside it is over.
    """

    def __init__(self, routing: RoutingLog, stalled_s: Callable[[], float], resume: Callable[[Step], None]) -> None:
        self._routing, self._stalled_s, self._resume = routing, stalled_s, resume
        self._call = _Call(None)

    @property
    def inside(self) -> bool:
        """Whether this thread is inside a forward call. By its frame, not by a flag, which Ctrl-C would leave behind."""
        return on_stack(self._call.frame)

    @property
    def nested(self) -> bool:
        """Whether the forward call under way is one inside another."""
        return self._call.nested

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a forward call with its hooks; what it leaves undone is abandoned. The caller has the turn.

        A call from inside another (a hook makes it) is a step of its own, between two blocks of the outer one. It is no text:
        its routing is not kept.
        """
        outer = self._call if self.inside else None
        kept = self._routing.suspend() if outer is not None else None
        begun, stalled_s = time.perf_counter(), self._stalled_s()
        self._call = _Call(sys._getframe(), nested=outer is not None)
        try:
            return forward(*args, **kwargs)
        finally:
            self._routing.abandon()
            self._call = outer or _Call(None)
            self._routing.resume(kept)
            if outer is not None and outer.step is not None:
                outer.started += time.perf_counter() - begun
                outer.stalled_before += self._stalled_s() - stalled_s
                self._resume(outer.step)

    def begin(self, step: Step) -> None:
        """The step of the forward call under way begins."""
        call = self._call
        if not call.nested:
            self._routing.begin(step)
        call.step, call.started, call.stalled_before = step, time.perf_counter(), self._stalled_s()

    def end(self) -> Done | None:
        """The step is complete; None if it was abandoned."""
        call, step = self._call, self._call.step
        if step is None:
            return None
        call.step = None
        self._routing.end()
        return Done(step, time.perf_counter() - call.started, self._stalled_s() - call.stalled_before)

    def abandon(self) -> None:
        """The step failed, or is none of the whole model's: its routing is not kept and its time not counted."""
        self._routing.abandon()
        self._call.step = None
