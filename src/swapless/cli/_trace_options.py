"""Options that every verb over traces shares: which rows of a trace to look at, and what its model is called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from swapless.trace import Trace, TraceFile

Documents = Annotated[
    str | None, typer.Option("--documents", metavar="RANGE", help="Only these documents, as 0-998 or 3 or 0-9,20-29.")
]
Domain = Annotated[str | None, typer.Option("--domain", metavar="NAME", help="Only documents with this label.")]
PhaseName = Annotated[str | None, typer.Option("--phase", metavar="PHASE", help="Only prefill or only decode.")]
ModelId = Annotated[str | None, typer.Option("--model-id", metavar="ID", help="The model of a trace that does not name one.")]


def chosen_trace(
    path: Path,
    *,
    documents: str | None = None,
    domain: str | None = None,
    phase: str | None = None,
    model_id: str | None = None,
    columns: tuple[str, ...] | None = None,
) -> Trace:
    """Read a trace as a whole and keep the rows that the shared options name.

    Raises
    ------
    TraceMismatchError
        ``model_id`` differs from the one that the trace names.
    TraceError, UsageError
        As reading and choosing do.
    """
    from dataclasses import replace

    from swapless.trace import select
    from swapless.trace.importers import load_trace, named

    trace = load_trace(path, model_id=model_id, columns=columns)
    trace = replace(trace, header=named(trace.header, model_id, path))
    return select(trace, documents=documents, domain=domain, phase=phase)


def opened_trace(
    path: Path,
    *,
    documents: str | None = None,
    domain: str | None = None,
    phase: str | None = None,
    model_id: str | None = None,
) -> AbstractContextManager[Trace | TraceFile]:
    """The same rows, read piece by piece where the form of the trace allows it; errors come when the context is entered."""
    from swapless.trace.importers import open_trace
    from swapless.trace.select import Choice

    return open_trace(path, choice=Choice.of(documents, domain, phase), model_id=model_id)


def number_list(text: str, *, what: str, whole: bool) -> list[float]:
    """Positive numbers of a comma-separated option, ascending and each once.

    Raises
    ------
    UsageError
        Something that is no positive number (no positive int with ``whole``).
    """
    from swapless.errors import UsageError, message

    try:
        numbers = sorted({int(part) if whole else float(part) for part in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or not numbers[0] > 0 or numbers[-1] == float("inf"):
        kind = "positive ints" if whole else "positive numbers"
        raise UsageError(message(f"{what} must be {kind}, separated by commas.", got=repr(text)))
    return numbers
