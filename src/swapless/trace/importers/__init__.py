"""Foreign traces: one file a format, recognised by content, or named on request.

An importer has ``matches(path) -> bool``, which looks at the content, ``load(path, model_id) -> Trace``, and perhaps ``reads``,
the form in a few words for messages.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from swapless.content import content_of
from swapless.errors import TraceError, TraceFormatError, TraceMismatchError, TraceMissingError, message
from swapless.registry import Registry
from swapless.trace.header import TraceHeader
from swapless.trace.parquet import read_trace
from swapless.trace.select import Choice, chosen_rows
from swapless.trace.stream import TraceFile
from swapless.trace.trace import Trace

IMPORTERS = Registry(
    "importer",
    "swapless.importers",
    {
        "moe-beyond": "swapless.trace.importers.moe_beyond:IMPORTER",
        "npz": "swapless.trace.importers.npz:IMPORTER",
        "routed-experts": "swapless.trace.importers.routed_experts:IMPORTER",
    },
)


def load_trace(
    path: str | os.PathLike[str],
    *,
    importer: str | None = None,
    model_id: str | None = None,
    columns: tuple[str, ...] | None = None,
) -> Trace:
    """Read a trace in our own form or in a foreign one.

    Parameters
    ----------
    path : path
        A trace, or what an importer reads.
    importer : str, optional
        Name of the importer; found by content when left out.
    model_id : str, optional
        Model of a foreign trace that names none.
    columns : tuple of str, optional
        As :func:`swapless.trace.read_trace`; importers read all that there is.

    Raises
    ------
    TraceFormatError
        No known form.
    UnknownNameError
        No such importer.
    TraceMissingError
        Nothing at ``path``.
    """
    place = Path(path)
    found = IMPORTERS.get(importer) if importer is not None else importer_of(place)
    return read_trace(place, columns=columns) if found is None else found.load(place, model_id)


def importer_of(path: str | os.PathLike[str]) -> Any | None:
    """The importer that knows the content of ``path``, or None for our own form, Parquet by content or by name.

    Raises
    ------
    TraceMissingError
        Nothing at ``path``.
    TraceFormatError
        What nobody knows; the message says what it seems to be, and what is known.
    """
    place = Path(path)
    if not place.exists():
        raise TraceMissingError(message("No such trace.", where=path))
    if is_parquet(place):
        return None
    for name in IMPORTERS.names():
        found = IMPORTERS.get(name)
        if found.matches(place):
            return found
    if place.is_file() and place.suffix == ".parquet":
        return None
    step = "docs/formats/trace.md shows how to write one from arrays."
    raise TraceFormatError(message("This is no trace.", where=path, got=content_of(place), allowed=known_forms(), step=step))


def known_forms() -> str:
    """The forms of traces that are read, each in a few words."""
    forms = {name: getattr(IMPORTERS.get(name), "reads", "") for name in IMPORTERS.names()}
    return ", or ".join(["a Parquet trace", *(f"{reads} ({name})" if reads else name for name, reads in forms.items())])


def is_parquet(path: Path) -> bool:
    """Whether a file begins as Parquet files do."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"PAR1"


@contextmanager
def open_trace(
    path: str | os.PathLike[str], *, choice: Choice | None = None, model_id: str | None = None
) -> Iterator[Trace | TraceFile]:
    """A trace to measure, read piece by piece where its form allows it: whole documents of our own form.

    Parameters
    ----------
    path : path
        A trace, or what an importer reads.
    choice : Choice, optional
        Keep only the rows that it names.
    model_id : str, optional
        Model of a trace that names none.

    Raises
    ------
    TraceMismatchError
        ``model_id`` differs from the one that the trace names.
    TraceError, UsageError
        As :func:`load_trace` and :func:`swapless.trace.select`.
    """
    chosen = choice or Choice()
    try:
        if importer_of(path) is None:
            with TraceFile(path, choice=chosen) as file:
                if file.in_pieces:
                    file.header = named(file.header, model_id, path)
                    yield file
                    return
        trace = load_trace(path, model_id=model_id)
        trace = replace(trace, header=named(trace.header, model_id, path))
        yield chosen_rows(trace, chosen).grouped()
    except TraceError as error:  # one of several traces may be at fault: say which
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error


def named(header: TraceHeader, model_id: str | None, path: str | os.PathLike[str]) -> TraceHeader:
    """The header with ``model_id`` where it names no model.

    Raises
    ------
    TraceMismatchError
        It names another one.
    """
    if model_id is None or header.model_id == model_id:
        return header
    if header.model_id is not None:
        what = "The trace is of another model than was said."
        raise TraceMismatchError(message(what, where=path, got=model_id, allowed=header.model_id))
    return replace(header, model_id=model_id)
