"""A trace larger than memory: an open file that hands out whole documents, row group by row group."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from swapless.errors import TraceFormatError, TraceValueError, message
from swapless.trace.checks import check_trace
from swapless.trace.header import TraceHeader
from swapless.trace.parquet import check_columns, file_header, open_parquet, trace_of_table
from swapless.trace.trace import Trace

_NEEDED = ("document", "position", "phase", "domain", "expert_ids")


class TraceFile:
    """A trace on disk, measured without being read as a whole; a context manager.

    Every measure takes one in place of a :class:`Trace`. Only the columns that measures need are read. Each document must
    stand in one piece, which the reader checks.

    Parameters
    ----------
    path : path
        A trace in Parquet form.

    Raises
    ------
    TraceFormatError
        As :func:`swapless.trace.read_trace`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = path
        self._file: pq.ParquetFile = open_parquet(path)
        try:
            self.header: TraceHeader = file_header(self._file, path)
            names = check_columns(self._file.schema_arrow, self.header, path)
        except BaseException:
            self._file.close()
            raise
        self._columns = [name for name in names if name in _NEEDED]

    def __enter__(self) -> TraceFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    @property
    def num_documents(self) -> int:
        """Number of different documents, from that column alone."""
        seen: set[int] = set()
        for group in range(self._file.num_row_groups):
            seen.update(np.unique(self._read(group, ["document"]).column(0).to_numpy()).tolist())
        return len(seen)

    def pieces(self, max_tokens: int | None = None, max_documents: int | None = None) -> Iterator[Trace]:
        """Whole documents, validated, in pieces of about that size; one row group and one document are held at a time.

        Raises
        ------
        TraceValueError
            A value that cannot be, or a document that returns after another one began.
        """
        rest: pa.Table | None = None
        closed: set[int] = set()
        for group in range(self._file.num_row_groups):
            table = self._read(group, self._columns)
            table = table if rest is None else pa.concat_tables([rest, table])
            document = table.column("document").to_numpy()
            last_start = int(np.flatnonzero(document != document[-1])[-1]) + 1 if (document != document[-1]).any() else 0
            final = group == self._file.num_row_groups - 1
            whole, rest = (table, None) if final else (table.slice(0, last_start), table.slice(last_start))
            if len(whole):
                trace = trace_of_table(whole, self.header)
                check_trace(trace)
                numbers = trace.document[trace.document_offsets[:-1]].tolist()
                again = closed.intersection(numbers)
                if again or len(set(numbers)) < len(numbers):
                    what = "Documents interleave, so the trace cannot be read in pieces."
                    where = f"document {sorted(again)[0]}" if again else f"row group {group}"
                    raise TraceValueError(message(what, where=where, step="Read it whole with read_trace."))
                closed.update(numbers)
                yield from trace.pieces(max_tokens, max_documents)

    def _read(self, group: int, columns: list[str]) -> pa.Table:
        try:
            return self._file.read_row_group(group, columns=columns)
        except (pa.ArrowException, OSError) as error:
            where = f"{self._path}, row group {group}"
            raise TraceFormatError(message("The trace cannot be decoded.", where=where, got=str(error))) from error
