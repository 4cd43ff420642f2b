"""A trace larger than memory: an open file that hands out whole documents, some thousand rows at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from swapless.errors import TraceValueError, message
from swapless.trace.checks import check_trace
from swapless.trace.header import TraceHeader
from swapless.trace.parquet import batches, check_columns, columns_of_table, file_header, open_parquet, trace_of_table
from swapless.trace.select import Choice
from swapless.trace.trace import OPTIONAL, Trace

_NEEDED = ("document", "position", "phase", "domain", "expert_ids")
_LABELS = ("document", "phase", "domain")
_BATCH_TOKENS = 16384
_LABEL_TOKENS = 262144


@dataclass(frozen=True, slots=True)
class _Outline:
    """What the label columns of a file say: chosen rows and documents, and the first document that comes back, if any."""

    num_tokens: int
    num_documents: int
    returning: int | None


class TraceFile:
    """A trace on disk, measured without being read as a whole; a context manager.

    Every measure takes one in place of a :class:`Trace` and gives the same result. Only the columns that a measure needs are
    read; they are validated once, on the first full pass. Each document must stand in one piece.

    Parameters
    ----------
    path : path
        A trace in Parquet form.
    choice : Choice, optional
        Hand out only the rows that it names.

    Raises
    ------
    TraceFormatError
        As :func:`swapless.trace.read_trace`.
    """

    def __init__(self, path: str | os.PathLike[str], *, choice: Choice | None = None) -> None:
        self._path = path
        self._choice = choice or Choice()
        self._file: pq.ParquetFile = open_parquet(path)
        try:
            self.header: TraceHeader = file_header(self._file, path)
            self._names = check_columns(self._file, self.header, path)
        except BaseException:
            self._file.close()
            raise
        self._found: _Outline | None = None
        self._checked: set[str] = set()

    def __enter__(self) -> TraceFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return self._outline.num_tokens

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the optional columns that it has."""
        return tuple(name for name in OPTIONAL if name in self._names)

    @property
    def num_documents(self) -> int:
        """Number of different documents, from the label columns alone."""
        return self._outline.num_documents

    @property
    def in_pieces(self) -> bool:
        """Whether every document stands in one piece, as :meth:`pieces` needs it."""
        return self._outline.returning is None

    def pieces(
        self, max_tokens: int | None = None, max_documents: int | None = None, *, columns: Sequence[str] = ()
    ) -> Iterator[Trace]:
        """Whole documents, validated, cut as :meth:`Trace.pieces` cuts them; one piece and one batch of rows are held.

        Raises
        ------
        TraceValueError
            A value that cannot be, or a document that returns after another one began.
        TraceFormatError
            A part of the file that cannot be decoded.
        """
        if self._outline.returning is not None:
            what = "Documents interleave, so the trace cannot be read in pieces."
            where = f"{self._path}, document {self._outline.returning}"
            raise TraceValueError(message(what, where=where, step="Read it whole with read_trace."))
        held: list[pa.Table] = []
        tokens = last = 0
        for table in self._chosen([name for name in self._names if name in (*_NEEDED, *columns)]):
            held.append(table)
            tokens += len(table)
            # A piece is cut where the next document begins, so all but the last one are final. A document of many batches
            # is looked at only when it has doubled.
            if (max_tokens is None and max_documents is None) or tokens <= (max_tokens or 0) or tokens < 2 * last:
                continue
            whole = pa.concat_tables(held)
            *ready, rest = trace_of_table(whole, self.header).pieces(max_tokens, max_documents)
            yield from ready
            tokens = last = len(rest)
            held = [whole.slice(len(whole) - last)]
        if held:
            yield from trace_of_table(pa.concat_tables(held), self.header).pieces(max_tokens, max_documents)

    @property
    def _outline(self) -> _Outline:
        """The label columns, read once."""
        if self._found is None:
            tokens, first_row = 0, 0
            runs: list[np.ndarray] = []
            chosen: list[np.ndarray] = []
            domains: dict[str, None] = {}
            for table in self._batches([name for name in self._names if name in _LABELS], _LABEL_TOKENS):
                labels = columns_of_table(table, self.header, first_row)
                first_row += len(table)
                document = labels["document"]
                runs.append(document[np.flatnonzero(np.diff(document, prepend=document[:1] - 1))])
                domains |= dict.fromkeys(labels["domains"])
                mask = self._choice.mask(document, labels["domain"], labels["domains"], labels["phase"])
                tokens += int(mask.sum())
                chosen.append(np.unique(document[mask]))
            if not runs:
                raise TraceValueError(message("A trace needs at least one token.", where=self._path, got="0 rows"))
            self._choice.check_domain(domains)
            every = np.concatenate(runs)
            if tokens == 0:
                raise self._choice.nothing(int(every.min()), int(every.max()))
            self._found = _Outline(tokens, len(np.unique(np.concatenate(chosen))), _returning(every))
        return self._found

    def _chosen(self, names: list[str]) -> Iterator[pa.Table]:
        """The rows that the choice keeps, batch by batch; checked unless a full pass has done so."""
        checked, first_row = self._checked.issuperset(names), 0
        before: tuple[int, int] | None = None
        for table in self._batches(names, _BATCH_TOKENS):
            part = trace_of_table(table, self.header, first_row)
            if not checked:
                check_trace(part, first_row, before)
                before = int(part.document[-1]), int(part.position[-1])
            first_row += len(table)
            mask = self._choice.mask(part.document, part.domain, part.domains, part.phase)
            if mask.any():
                yield table if mask.all() else table.filter(pa.array(mask))
        self._checked.update(names)

    def _batches(self, names: list[str], rows: int) -> Iterator[pa.Table]:
        for batch in batches(self._file, self._path, batch_size=rows, columns=names):
            if len(batch):
                yield pa.Table.from_batches([batch])


def _returning(runs: np.ndarray) -> int | None:
    """First document that begins again after another one, given the document of each run; runs of a cut batch count once."""
    runs = runs[np.flatnonzero(np.diff(runs, prepend=runs[:1] - 1))]
    _, first = np.unique(runs, return_index=True)
    again = np.setdiff1d(np.arange(len(runs)), first)
    return int(runs[again[0]]) if len(again) else None
