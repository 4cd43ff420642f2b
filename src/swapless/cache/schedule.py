"""In which order a trace is replayed: rows into forward calls, calls into one sequence, documents side by side.

Where the trace has a ``step`` column, rows that share it are one forward call, in the order of first appearance, and phases
stand as recorded. Without it each row is a call of its own and is served as decode serves it, whatever its recorded phase: a
trace of teacher-forced prefill stands for the decode of the same text.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from swapless.errors import UsageError, message
from swapless.notation import Phase
from swapless.trace import Trace


class Schedule(NamedTuple):
    """``rows`` int64 (T,): trace rows in replay order; rows of call c are ``starts[c] .. starts[c + 1] - 1`` of it.

    ``phase`` uint8 (N,) and ``document`` int32 (N,) of each call (of its first row); ``begins`` bool (N,): a document's first.
    """

    rows: np.ndarray
    starts: np.ndarray
    phase: np.ndarray
    document: np.ndarray
    begins: np.ndarray


def schedule(trace: Trace, *, interleave: int = 1) -> Schedule:
    """Forward calls of ``trace`` in replay order.

    Parameters
    ----------
    trace : Trace
        What to replay.
    interleave : int
        Documents that take turns, one token each, as conversations of one server do; when one ends the next takes its place.

    Raises
    ------
    UsageError
        ``interleave`` below 1, or above 1 for a trace whose steps already say what ran together.
    """
    if interleave < 1:
        raise UsageError(message("interleave must be an int of at least 1.", got=interleave))
    if trace.step is not None:
        if interleave > 1:
            raise UsageError(
                message(
                    "This trace records its own steps, so its documents cannot be interleaved.", got=f"interleave={interleave}"
                )
            )
        rows, starts = _by_step(trace.step)
        phase = trace.phase[rows[starts[:-1]]].astype(np.uint8)
    else:
        rows = _interleaved(trace.document, interleave)
        starts = np.arange(len(rows) + 1, dtype=np.int64)
        phase = np.full(len(rows), int(Phase.DECODE), np.uint8)
    document = trace.document[rows[starts[:-1]]]
    begins = np.zeros(len(document), bool)
    changes = _changes(document)
    # Only where a document comes back after another is its first call not simply a change of document.
    begins[changes[np.unique(document[changes], return_index=True)[1]]] = True
    return Schedule(rows, starts, phase, document, begins)


def _by_step(step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    _, first, inverse = np.unique(step, return_index=True, return_inverse=True)
    call = first[inverse]
    rows = np.argsort(call, kind="stable")
    starts = np.flatnonzero(np.diff(call[rows], prepend=-1, append=len(rows)))
    return rows, starts.astype(np.int64)


def _interleaved(document: np.ndarray, interleave: int) -> np.ndarray:
    changes = _changes(document)
    if len(np.unique(document[changes])) == len(changes):
        order = np.arange(len(document), dtype=np.int64)  # every document in one piece, as nearly all traces have them
    else:
        order = np.argsort(_first_rows(document), kind="stable")
    if interleave == 1:
        return order
    starts = _changes(document[order])
    waiting = list(np.split(order, starts[1:]))[::-1]
    turn = np.empty(len(document), np.int64)
    places = [0] * min(interleave, len(waiting))
    # Each place of the server takes the next document as soon as it is free; a row's turn is its time on that place.
    while waiting:
        place = min(range(len(places)), key=lambda p: (places[p], p))
        rows = waiting.pop()
        turn[rows] = places[place] + np.arange(len(rows), dtype=np.int64)
        turn[rows] = turn[rows] * len(places) + place
        places[place] += len(rows)
    return np.argsort(turn, kind="stable")


def _changes(document: np.ndarray) -> np.ndarray:
    """The rows whose document is not that of the row before, the first one included."""
    return np.flatnonzero(np.diff(document, prepend=document[:1] - 1))


def _first_rows(document: np.ndarray) -> np.ndarray:
    """For each row, the first row of its document: sorts documents by first appearance, keeping their rows in order."""
    _, first, inverse = np.unique(document, return_index=True, return_inverse=True)
    return np.asarray(first[inverse])
