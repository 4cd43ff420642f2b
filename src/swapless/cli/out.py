"""The one place that prints: data on stdout, everything else on stderr.

A verb makes one :class:`Out` and says what a line is, not where it goes. With ``as_json`` the only thing on stdout is one
JSON document; with ``quiet`` notes and progress fall silent, results and warnings stay. What comes from files (names, labels,
messages of libraries) reaches a terminal through :func:`safe` alone.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from swapless.cli.notices import hear
from swapless.cli.progress import ProgressCall, shown_progress
from swapless.errors import UNSAFE, WriteError, message, written_out

__all__ = ["Out", "ProgressCall", "complain", "plain", "safe"]


def safe(text: str, *, lines: bool = True) -> str:
    """``text`` with everything that a terminal would obey written out; newlines too unless ``lines``.

    Examples
    --------
    >>> print(safe("a" + chr(27) + "[31mb"))
    a\\x1b[31mb
    """
    if not lines:
        text = text.replace("\n", "\\n").replace("\t", "\\t")
    return written_out(text)


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


def complain(text: str) -> None:
    """One line on stderr that nothing silences: an error or a warning."""
    # Where stderr itself is closed or full there is nowhere left to say so; the exit code stays.
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(safe(text, lines=False) + "\n")
        sys.stderr.flush()


class Out:
    """The sink of one verb.

    Parameters
    ----------
    as_json : bool
        The result is one JSON document on stdout; text and tables are dropped.
    quiet : bool
        No notes and no progress.

    Raises
    ------
    WriteError
        In every method that prints results: stdout goes to a disk that is full. A pipe that its reader closed ends the process
        as every other command is ended by it.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self._thinking = False
        hear(self.note, self.warn, quiet)

    def text(self, text: str, *, end: str = "\n") -> None:
        """Part of the result, written at once; nothing under ``as_json``."""
        if not self.as_json:
            _write(safe(text) + end)

    def generated(self, text: str) -> None:
        """What a model writes: as it is into a file or a pipe, and on a terminal with what that would obey written out."""
        if not self.as_json:
            if self._thinking:
                self._thinking = False
                _aside("\n\n")
            _write(safe(text) if _is_terminal(sys.stdout) else text)

    def document(self, document: dict[str, Any] | list[Any]) -> None:
        """The result as one JSON document; nothing unless ``as_json``."""
        if self.as_json:
            self.json_lines([json.dumps(plain(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n"])

    def json_lines(self, pieces: Iterable[str]) -> None:
        """The result as pieces of a JSON document that is put together already."""
        for piece in pieces:  # only texts can hold such characters, and there the written-out form means the same
            _write(UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", piece), flush=False)
        _write("")

    def note(self, text: str = "") -> None:
        """A remark for the person at the terminal, on stderr."""
        if not self.quiet:
            _aside(safe(text) + "\n")

    def thinking(self, text: str) -> None:
        """What a model thinks before it answers: dim, on stderr, and nothing where nobody watches."""
        if not self.quiet and not self.as_json and _is_terminal(sys.stderr):
            self._thinking = True
            _aside(f"\x1b[2m{safe(text)}\x1b[22m")

    def ask(self, prompt: str) -> None:
        """A prompt at which a person types, on stderr."""
        _aside(prompt)

    def warn(self, text: str) -> None:
        """Something that makes the result another than was asked for; said with ``quiet`` too."""
        complain(f"Warning: {text}")

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None, aside: bool = False
    ) -> None:
        """Rows under their columns: on stdout as a result, on stderr with ``aside``.

        The first column stands left, the others right.
        """
        if (self.quiet if aside else self.as_json) or not rows:
            return
        rows = [[safe(cell, lines=False) for cell in row] for row in rows]
        widths = [max(len(line[place]) for line in (columns, *rows)) for place in range(len(columns))]
        lines = [columns, ["-" * width for width in widths], *rows]
        say = self.note if aside else self.text
        if title is not None:
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
            say(f"{name:<{width}}  {safe(value, lines=False)}")

    @contextmanager
    def progress(self) -> Iterator[ProgressCall]:
        """How far work is and how long it still takes; call what this yields with stage and share done.

        On a terminal a bar on stderr that leaves nothing behind, elsewhere a line every few seconds.
        """
        if self.quiet:
            yield lambda stage, done: None
            return
        with shown_progress(_is_terminal(sys.stderr), lambda line: _aside(safe(line, lines=False) + "\n")) as report:
            yield lambda stage, done: report(safe(stage, lines=False), done)


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def _aside(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a closed stderr must not end the work
        sys.stderr.write(text)
        sys.stderr.flush()


def _write(text: str, *, flush: bool = True) -> None:
    if sys.stdout is None:
        raise WriteError(message("The output could not be written to stdout.", got="stdout is closed"))
    try:
        sys.stdout.write(text)
        if flush:
            sys.stdout.flush()
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        raise stdout_error(error) from error


def stdout_error(error: OSError) -> WriteError:
    """The error that says that stdout took no more; what is still in its buffer is given up."""
    with contextlib.suppress(OSError, ValueError):  # or the interpreter tries again on its way out, and complains
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    step = "Free some space, or send the output elsewhere." if error.errno == errno.ENOSPC else None
    what = "The output could not be written to stdout."
    return WriteError(message(what, got=error.strerror or str(error), step=step))


def open_standard_streams() -> None:
    """Open what of the three standard files is closed, or the next file of ours would take its number and get stray output."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (lives as long as the process)
