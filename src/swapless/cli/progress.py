"""How far work is, and how long it still takes: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["ProgressCall", "TimeLeft", "shown_progress"]

ProgressCall = Callable[[str, float], None]
"""How long work reports itself: the stage's name and the share done, in [0, 1]."""

LINE_EVERY_S = 5.0
"""Between two lines where there is no terminal; work that takes less leaves none."""


class TimeLeft:
    """What is left of work that reports the share done.

    The share is one of the whole work or of a stage: where it falls, another stage has begun, and the clock with it.

    Examples
    --------
    >>> left = TimeLeft(now=0.0)
    >>> left.update(0.0, now=10.0)
    >>> left.update(0.25, now=20.0)
    >>> left.seconds(now=20.0)
    30.0
    """

    def __init__(self, now: float) -> None:
        self._begun_at, self._begun, self._done = now, math.inf, 0.0

    def update(self, done: float, now: float) -> None:
        """The share that is done now."""
        if done < self._done or done <= self._begun:
            self._begun_at, self._begun = now, done
        self._done = done

    def seconds(self, now: float) -> float | None:
        """Seconds left at the pace so far; None before anything was done."""
        moved = self._done - self._begun
        if moved <= 0 or self._done >= 1:
            return None
        return (1 - self._done) * (now - self._begun_at) / moved


def told(seconds: float | None) -> str:
    """Time left as a person says it, or nothing.

    Examples
    --------
    >>> told(42.4), told(200.0), told(9000.0), told(None)
    ('about 42 s left', 'about 3 min left', 'about 2.5 h left', '')
    """
    if seconds is None:
        return ""
    if seconds < 90:
        return f"about {max(1, round(seconds))} s left"
    return f"about {seconds / 60:.0f} min left" if seconds < 5400 else f"about {seconds / 3600:.1f} h left"


@contextmanager
def shown_progress(terminal: bool, say: Callable[[str], None]) -> Iterator[ProgressCall]:
    """Show what is reported to the call that this yields: as a bar on stderr, or through ``say``, a line every few seconds."""
    with _bar() if terminal else _lines(say) as report:
        yield report


@contextmanager
def _bar() -> Iterator[ProgressCall]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    bar_and_share = (BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    columns = (
        TextColumn("{task.description}", markup=False),
        *bar_and_share,
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    # stdout is not for the bar to take over: what is printed there is the result
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as bar:
        task = bar.add_task("", total=1.0, left="")
        left = TimeLeft(time.monotonic())

        def report(stage: str, done: float) -> None:
            now = time.monotonic()
            left.update(done, now)
            bar.update(task, description=stage, completed=done, left=told(left.seconds(now)))

        yield report


@contextmanager
def _lines(say: Callable[[str], None]) -> Iterator[ProgressCall]:
    """A thread says where the work is, so that one that reports seldom does not look dead."""
    begun = time.monotonic()
    left = TimeLeft(begun)
    stage, done = "", 0.0
    over = threading.Event()
    lock = threading.Lock()

    def report(name: str, share: float) -> None:
        nonlocal stage, done
        with lock:
            stage, done = name, share
            left.update(share, time.monotonic())

    def watch() -> None:
        while not over.wait(LINE_EVERY_S):
            now = time.monotonic()
            with lock:
                parts = [f"{stage or 'working'}, {now - begun:.0f} s", f"{done:.0%} done" if done else ""]
                parts.append(told(left.seconds(now)))
            say(", ".join(filter(None, parts)))

    watcher = threading.Thread(target=watch, name="swapless-progress", daemon=True)
    watcher.start()
    try:
        yield report
    finally:
        over.set()
        watcher.join()
