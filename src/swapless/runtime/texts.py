"""Which recorded rows make up which text: every row knows the row before it, every text its last row.

Decoding is no straight line: drafts are taken back, beams fork and are given up, one prefix is read once and continued many
times. Rows are numbered as they are run and never moved; what a text is follows from its last row alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from swapless.notation import Phase

NO_ROW = -1
"""Before a row that begins its text; in a cache, the place of padding."""

UNKNOWN_ROW = -2
"""A row that is not in the trace: run elsewhere, or before the trace began."""


class Path(NamedTuple):
    """A text: ``rows`` int64 (n,), the first ``shared`` of them in a text before it too; ``whole`` if none is missing."""

    rows: np.ndarray
    shared: int
    whole: bool


class Texts:
    """The rows of a recording as a forest, and where in it texts end.

    Rows have numbers that only ever rise; those below ``base`` are forgotten.

    Attributes
    ----------
    base, next_row : int
        The first row that is known, and the number that the next one gets.
    notes : Counter of str
        What had to be assumed, and how often: sentences for a trace's ``notes``.
    recording : int
        How often it was begun anew.
    undecided : int
        Rows of drafts that nobody has accepted or refused.
    drafting : object or None
        What drafts for another model: the last cache that did, as it is held.
    """

    def __init__(self) -> None:
        self.base = self.next_row = 0
        self.notes: Counter[str] = Counter()
        self.recording = self.undecided = 0
        self.drafting: Any = None
        self._parent = np.empty(256, np.int64)
        self._token = np.empty(256, np.int32)
        self._phase = np.empty(256, np.int8)
        self._ends: dict[int, int] = {}
        self._finished: set[int] = set()
        self._next_stream = 0
        self.count_from_here()

    def clear(self) -> None:
        """Forget all rows and texts; what caches hold of them is unknown from now on."""
        self.base = self.next_row
        self._ends.clear()
        self._finished.clear()
        self.recording += 1
        self.notes.clear()
        self.undecided = 0

    def forget_before(self, row: int) -> None:
        """Forget the rows below this number."""
        kept = self.next_row - row
        for column in (self._parent, self._token, self._phase):
            column[:kept] = column[row - self.base : self.next_row - self.base].copy()
        self.base = row
        for end in [end for end in self._ends if end < row]:
            del self._ends[end]
        self._finished = {end for end in self._finished if end >= row}

    def streams(self, number: int) -> np.ndarray:
        """New names for sequences that are run side by side, int32 (number,)."""
        self._next_stream += number
        return np.arange(self._next_stream - number, self._next_stream, dtype=np.int32)

    # -- rows --------------------------------------------------------------------------------------------------------

    def append(self, parent: np.ndarray, token: np.ndarray | None, phase: Phase) -> None:
        """Rows that were run: the row before each, their tokens if known, and how they were run."""
        used, more = self.next_row - self.base, len(parent)
        while used + more > len(self._parent):
            self._parent, self._token, self._phase = (
                np.concatenate([column, np.empty_like(column)]) for column in (self._parent, self._token, self._phase)
            )
        place = slice(used, used + more)
        self._parent[place], self._phase[place] = parent, int(phase)
        self._token[place] = -1 if token is None else token
        self.next_row += more

    def tokens(self, rows: np.ndarray) -> np.ndarray:
        """Token ids of known rows, -1 where there was none."""
        return self._token[rows - self.base]

    def parents(self, rows: np.ndarray) -> np.ndarray:
        """The rows before known rows."""
        return self._parent[rows - self.base]

    # -- ends --------------------------------------------------------------------------------------------------------

    def end(self, row: int, before: int = NO_ROW) -> None:
        """A text ends with ``row`` for now; the one that ended with ``before`` until now goes on no more by itself."""
        ends = self._ends
        others = ends.pop(before, 1) - 1
        if others:
            ends[before] = others
        if row >= self.base:
            ends[row] = ends.get(row, 0) + 1

    def finish(self, row: int) -> None:
        """A whole text ends with ``row``, and is one by itself even if another goes on from there."""
        self._finished.add(row)

    # -- what was run in vain ----------------------------------------------------------------------------------------

    def count_from_here(self) -> None:
        """Count what is taken back among the rows from now on."""
        self._counted_from = self.next_row
        self._taken_back = np.zeros(len(Phase), np.int64)

    def taken_back(self, rows: np.ndarray, *, again: bool = False) -> None:
        """These rows belong to no text, for now or for good; with ``again`` they do after all."""
        if len(rows) == 0:
            return
        rows = rows[rows >= max(self.base, self._counted_from)]
        counts = np.bincount(self._phase[rows - self.base], minlength=len(Phase))
        self._taken_back += -counts if again else counts

    def num_taken_back(self, phase: Phase) -> int:
        """Rows run in this phase that belong to no text."""
        return int(self._taken_back[phase])

    # -- texts -------------------------------------------------------------------------------------------------------

    def paths(self) -> list[Path]:
        """The texts, in the order in which what is theirs alone began. One that another continues is no text by itself.

        That is what a conversation is: an answer, and the turns after it.
        """
        num_rows = self.next_row - self.base
        parent = self._parent[:num_rows] - self.base
        rows = np.arange(num_rows)
        run_start = np.maximum.accumulate(np.where(parent == rows - 1, 0, rows))
        covered = np.zeros(num_rows, bool)

        def runs(row: int, stop_at_covered: bool) -> list[tuple[int, int]]:
            found = []
            while row >= 0 and not (stop_at_covered and covered[row]):
                start = int(run_start[row])
                if stop_at_covered:
                    known = np.flatnonzero(covered[start : row + 1])
                    start += int(known[-1]) + 1 if len(known) else 0
                    covered[start : row + 1] = True
                found.append((start, row))
                row = int(parent[start])
            return found[::-1]

        ends = sorted((end - self.base for end in self._ends), reverse=True)
        last = {end for end in ends if runs(end, True)} | {end - self.base for end in self._finished}
        covered[:] = False
        own_start = {end: own[0][0] if (own := runs(end, True)) else end + 1 for end in sorted(last)}
        paths = []
        for end in sorted(last, key=lambda end: (own_start[end], end)):
            pieces = runs(end, False)
            path = np.concatenate([np.arange(start, stop + 1) for start, stop in pieces])
            whole = self._parent[pieces[0][0]] == NO_ROW
            paths.append(Path(path + self.base, int(np.searchsorted(path, own_start[end])), bool(whole)))
        return paths

    def matches(self, rows: Iterable[int], texts: Sequence[np.ndarray]) -> set[int]:
        """Of ``rows``, in rising order, the one of each text that lies farthest along it.

        A text is the token ids int (n,) of a whole sequence. A row matches if its token and those of all rows before it are
        the text's; -1, on either side, matches any.
        """
        found = set()
        candidates = list(rows)
        place: dict[int, int] = {}
        for row in candidates:
            before = int(self._parent[row - self.base])
            if before not in place:
                place[before] = self._length(before)
            place[row] = place[before] + 1
        for text in texts:
            matched: dict[int, bool] = {NO_ROW: True}
            best, farthest = None, -1
            for row in candidates:
                before, at = int(self._parent[row - self.base]), place[row] - 1
                if before not in matched:
                    matched[before] = self._along(before, text)
                token = self._token[row - self.base]
                matched[row] = matched[before] and at < len(text) and (token < 0 or text[at] < 0 or token == text[at])
                if matched[row] and at > farthest:
                    best, farthest = row, at
            if best is not None:
                found.add(best)
        return found

    def _chain(self, row: int) -> list[int]:
        chain = []
        while row >= self.base:
            chain.append(row)
            row = int(self._parent[row - self.base])
        return chain[::-1]

    def _length(self, row: int) -> int:
        return len(self._chain(row))

    def _along(self, row: int, text: np.ndarray) -> bool:
        tokens = self.tokens(np.array(self._chain(row), np.int64))
        text = text[: len(tokens)]
        return len(tokens) == len(text) and bool(((tokens < 0) | (text < 0) | (tokens == text)).all())
