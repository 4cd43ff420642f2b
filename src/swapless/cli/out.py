"""The one place that prints: data on stdout, everything else on stderr.

A verb makes one :class:`Out` and says what a line is, not where it goes. With ``as_json`` the only thing on stdout is one
JSON document; with ``quiet`` notes and progress fall silent, results stay.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from swapless.cli.notices import hear

__all__ = ["Out", "ProgressCall", "plain"]

ProgressCall = Callable[[str, float], None]
"""How long work reports itself: the stage's name and the share done, in [0, 1]."""


def plain(value: Any) -> Any:
    """The value in what JSON knows: numpy scalars and arrays unpacked, tuples as lists, NaN and infinities as null.

    Examples
    --------
    >>> plain({"rate": float("nan"), "sizes": (1, 2)})
    {'rate': None, 'sizes': [1, 2]}
    """
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist") and not isinstance(value, (str, bytes)):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class Out:
    """The sink of one verb.

    Parameters
    ----------
    as_json : bool
        The result is one JSON document on stdout; text and tables are dropped.
    quiet : bool
        No notes and no progress.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self._aside = Console(stderr=True, highlight=False, soft_wrap=True)
        hear(self.note, quiet)

    def text(self, text: str, *, end: str = "\n") -> None:
        """Part of the result, written as it is and at once; nothing under ``as_json``."""
        if not self.as_json:
            sys.stdout.write(text + end)
            sys.stdout.flush()

    def document(self, document: dict[str, Any] | list[Any]) -> None:
        """The result as one JSON document; nothing unless ``as_json``."""
        if self.as_json:
            sys.stdout.write(json.dumps(plain(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
            sys.stdout.flush()

    def note(self, text: str = "") -> None:
        """A remark for the person at the terminal, on stderr."""
        if not self.quiet:
            self._aside.print(text, markup=False)

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None, aside: bool = False
    ) -> None:
        """Rows under their columns: on stdout as a result, on stderr with ``aside``.

        The first column stands left, the others right.
        """
        if (self.quiet if aside else self.as_json) or not rows:
            return
        widths = [max(len(line[place]) for line in (columns, *rows)) for place in range(len(columns))]
        lines = [columns, ["-" * width for width in widths], *rows]
        say = self.note if aside else self.text
        if title:
            say(title)
        for line in lines:
            cells = [cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(zip(line, widths))]
            say("  ".join(cells).rstrip())

    def facts(self, pairs: Sequence[tuple[str, str]], *, aside: bool = False) -> None:
        """Names and values, one pair a line, in two aligned columns."""
        if self.quiet if aside else self.as_json:
            return
        width = max((len(name) for name, _ in pairs), default=0)
        say = self.note if aside else self.text
        for name, value in pairs:
            say(f"{name:<{width}}  {value}")

    @contextmanager
    def progress(self) -> Iterator[ProgressCall]:
        """A bar on stderr while work goes on; call what it yields with stage and share done.

        It is drawn on a terminal only and leaves no line behind, so that logs and pipes stay clean.
        """
        if self.quiet or not self._aside.is_terminal:
            yield _silent
            return
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn())
        with Progress(*columns, console=self._aside, transient=True) as bar:
            task = bar.add_task("", total=1.0)
            yield lambda stage, done: bar.update(task, description=stage, completed=done)


def _silent(stage: str, done: float) -> None:
    """Progress that nobody watches."""
