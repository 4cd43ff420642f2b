"""Traces as Parquet files: the columns of the contract, checked by name and type; the header as file metadata."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from swapless.atomic import WholeFile, saying_where, write_whole
from swapless.errors import SwaplessError, TraceFormatError, TraceMismatchError, TraceMissingError, TraceValueError, message
from swapless.notation import Phase
from swapless.trace.checks import check_trace
from swapless.trace.header import TraceHeader
from swapless.trace.trace import Trace
from swapless.untrusted import shown

HEADER_KEY = b"swapless.trace"
ROW_GROUP_TOKENS = 32768
MOST_GROWTH = 200
"""Times its file's size that a trace may take; ids of experts are hardly compressible."""
ALWAYS_BYTES = 256 << 20
_REQUIRED = ("document", "position", "phase", "expert_ids")
_LABEL = pa.dictionary(pa.int32(), pa.string())


def read_trace(path: str | os.PathLike[str], *, columns: tuple[str, ...] | None = None) -> Trace:
    """Read a whole trace, validated.

    Parameters
    ----------
    path : path
        A Parquet file in the form of ``docs/formats/trace.md``.
    columns : tuple of str, optional
        Optional columns to read (``token``, ``gate_weights``, ...); all by default. The required ones always come.

    Returns
    -------
    Trace
        Its arrays are views of the memory that Arrow decoded into.

    Raises
    ------
    TraceFormatError
        Not a Parquet file or a truncated one, no header, an unknown version, a missing column or a wrong column type.
    TraceValueError
        A value that cannot be; row, MoE layer and value are named.
    TraceMissingError
        No such file.
    """
    with open_parquet(path) as file:
        header = file_header(file, path)
        names = check_columns(file, header, path)
        if columns is not None:
            names = [name for name in names if name in (*_REQUIRED, "domain", *columns)]
        _check_size(file, header, names, path)
        with decoding(path):
            table = file.read(columns=names)
    trace = trace_of_table(table, header)
    check_trace(trace)
    return trace


def write_trace(path: str | os.PathLike[str], trace: Trace, *, row_group_tokens: int = ROW_GROUP_TOKENS) -> None:
    """Write ``trace`` in the contract's form, whole or not at all (temporary name, then rename)."""

    def write(part: Path) -> None:
        table = table_of_trace(trace)
        pq.write_table(table, part, row_group_size=row_group_tokens, **_ENCODING)

    write_whole(path, write)


class TraceWriter:
    """Writes a trace piece by piece, one row group a piece, so that it never has to fit into memory.

    A context manager: the file appears under its name only when the block ends without an exception. Every piece must have
    the columns of the first one and the same header.
    """

    def __init__(self, path: str | os.PathLike[str], header: TraceHeader) -> None:
        self.header = header
        self.num_tokens = 0
        self._file = WholeFile(path)
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> TraceWriter:
        return self

    def write(self, trace: Trace) -> None:
        """Append the rows of ``trace``.

        Raises
        ------
        TraceMismatchError
            Another header, or other columns than the first piece had.
        WriteError
            The disk is full, or the folder cannot be written.
        """
        if trace.header != self.header:
            raise TraceMismatchError(message("A piece has another header than its trace.", got=trace.header.model_id))
        table = table_of_trace(trace)
        if self._writer is None:
            self._file.__enter__()
            with saying_where(self._file.path):
                self._writer = pq.ParquetWriter(self._file.part, table.schema, **_ENCODING)
        elif self._writer.schema != table.schema:
            what = "A piece has other columns than the first one."
            raise TraceMismatchError(message(what, got=table.column_names, allowed=self._writer.schema.names))
        with saying_where(self._file.path):
            self._writer.write_table(table, row_group_size=max(1, len(table)))
        self.num_tokens += len(trace)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trail: TracebackType | None) -> None:
        try:
            if self._writer is not None:
                with saying_where(self._file.path) if kind is None else contextlib.suppress(OSError):
                    self._writer.close()  # writes the footer; after an error, such as a full disk, it only lets go
            if kind is None:
                if self._writer is None:
                    raise TraceValueError(message("A trace needs at least one token.", where=self._file.path, got="no piece"))
                self._file.commit()
        finally:
            self._file.discard()


_CODED = ["phase", "domain", "token", "expert_ids.list.element"]
_ENCODING: dict[str, Any] = {"compression": "zstd", "use_dictionary": _CODED}


def open_parquet(path: str | os.PathLike[str]) -> pq.ParquetFile:
    """Parquet file, memory-mapped; a typed error if it is none."""
    if not Path(path).exists():
        raise TraceMissingError(message("No such trace.", where=path))
    if not Path(path).is_file():
        raise TraceFormatError(message("A trace is a regular file.", where=path))
    with decoding(path, "Not a Parquet file, or a truncated one."):
        return pq.ParquetFile(path, memory_map=True)


@contextlib.contextmanager
def decoding(path: object, what: str = "The trace cannot be decoded.") -> Iterator[None]:
    """Whatever a library raises within becomes ours.

    Raises
    ------
    TraceFormatError
        It failed.
    """
    try:
        yield
    except SwaplessError:
        raise
    except Exception as error:  # libraries check a file each in their own way
        raise TraceFormatError(message(what, where=path, got=str(error)[:300] or type(error).__name__)) from error


def _check_size(file: pq.ParquetFile, header: TraceHeader, names: list[str], path: str | os.PathLike[str]) -> None:
    """Refuse a file of some kilobytes that would take gigabytes."""
    places = header.num_moe_layers * header.top_k
    each = {
        "expert_ids": 2 * places,
        "gate_weights": 2 * places,
        "router_scores": 2 * header.num_moe_layers * header.num_experts,
    }
    decoded, held = file.metadata.num_rows * sum(each.get(name, 4) for name in names), Path(path).stat().st_size
    if decoded > max(MOST_GROWTH * held, ALWAYS_BYTES):
        got = f"{file.metadata.num_rows} rows, {decoded} bytes once decoded"
        allowed = f"up to {MOST_GROWTH} times the {held} bytes of the file"
        raise TraceFormatError(
            message("The trace claims far more rows than its file can hold.", where=path, got=got, allowed=allowed)
        )


def file_header(file: pq.ParquetFile, path: str | os.PathLike[str]) -> TraceHeader:
    """The trace header of an open file."""
    with decoding(path):
        raw = (file.metadata.metadata or {}).get(HEADER_KEY)
    if raw is None:
        what = "The Parquet file has no trace header (metadata key swapless.trace)."
        raise TraceFormatError(message(what, where=path))
    return TraceHeader.from_json(raw)


def _types(header: TraceHeader) -> dict[str, Callable[[pa.DataType], bool]]:
    places = header.num_moe_layers * header.top_k
    scores = header.num_moe_layers * header.num_experts

    def is_label(kind: pa.DataType) -> bool:
        return _is_text(kind) or (pa.types.is_dictionary(kind) and _is_text(kind.value_type))

    def is_list(value: pa.DataType, size: int) -> Callable[[pa.DataType], bool]:
        return lambda kind: pa.types.is_fixed_size_list(kind) and kind.list_size == size and kind.value_type == value

    whole = dict.fromkeys(("document", "position", "token_id", "step"), pa.types.is_int32)
    labels = {"phase": is_label, "domain": is_label, "token": is_label}
    lists = {"expert_ids": is_list(pa.int16(), places), "gate_weights": is_list(pa.float16(), places)}
    return {**whole, **labels, **lists, "router_scores": is_list(pa.float16(), scores)}


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def check_columns(file: pq.ParquetFile, header: TraceHeader, path: object) -> list[str]:
    """Names of the known columns of a file, after checking that none is missing and each has its type.

    Raises
    ------
    TraceFormatError
        A missing column, or one of another type.
    TraceValueError
        ``expert_ids`` in lists of several lengths; the first row that differs is named.
    """
    with decoding(path):
        schema, types = file.schema_arrow, _types(header)
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise TraceFormatError(message("Two columns of a trace have one name.", where=path, got=shown(twice[0])))
    missing = [name for name in _REQUIRED if name not in schema.names]
    if missing:
        raise TraceFormatError(message("A trace lacks required columns.", where=path, got=", ".join(missing)))
    shape = f"L={header.num_moe_layers}, K={header.top_k}, E={header.num_experts}"
    for field in schema:
        if field.name in types and not types[field.name](field.type):
            if field.name == "expert_ids":
                _check_ragged(file, header, path)
            what = f"Column {field.name} has a type that a trace of {shape} does not have."
            raise TraceFormatError(message(what, where=path, got=str(field.type), step="See docs/formats/trace.md."))
    unknown = [name for name in schema.names if name not in types]
    if unknown:
        warnings.warn(
            f"{path}: columns that a trace does not know are ignored: {', '.join(shown(name)[1:-1] for name in unknown)}",
            stacklevel=3,
        )
    return [name for name in schema.names if name in types]


def batches(file: pq.ParquetFile, path: object, **how: Any) -> Iterator[pa.RecordBatch]:
    """Rows of a file, batch by batch.

    Raises
    ------
    TraceFormatError
        A part of the file that cannot be decoded.
    """
    found = iter(())
    with decoding(path):
        found = file.iter_batches(**how)
    while True:
        with decoding(path):
            batch = next(found, None)
        if batch is None:
            return
        yield batch


def _check_ragged(file: pq.ParquetFile, header: TraceHeader, path: object) -> None:
    """Name the first row whose ids are not L * K, where a file holds lists of free length."""
    if not pa.types.is_list(file.schema_arrow.field("expert_ids").type):
        return
    places, first_row = header.num_moe_layers * header.top_k, 0
    for batch in batches(file, path, columns=["expert_ids"]):
        lengths = batch.column(0).value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        if (lengths != places).any():
            row = int(np.argmax(lengths != places))
            where = f"{path}, row {first_row + row}"
            allowed = f"L * K = {places} in every row"
            raise TraceValueError(message("Ragged number of expert ids.", where=where, got=int(lengths[row]), allowed=allowed))
        first_row += len(batch)


def trace_of_table(table: pa.Table, header: TraceHeader, first_row: int = 0) -> Trace:
    """Trace over the columns of an Arrow table, without copying single-chunk columns."""
    return Trace(header=header, **columns_of_table(table, header, first_row))


def columns_of_table(table: pa.Table, header: TraceHeader, first_row: int = 0) -> dict[str, Any]:
    """Columns of a table as a trace keeps them, those that it has; its first row is row ``first_row`` of the file.

    Raises
    ------
    TraceValueError
        A null, or an unknown phase; the row is named.
    """
    with decoding("its rows"):
        table.validate(full=True)
    num_tokens, num_layers = len(table), header.num_moe_layers
    columns: dict[str, Any] = {"domain": np.full(num_tokens, -1, np.int32), "domains": ()}
    for name in table.column_names:
        column = _one_array(table.column(name))
        if name in ("phase", "domain"):
            codes, names = _labels(column)
            if name == "domain":
                columns["domain"], columns["domains"] = codes, names
            else:
                columns["phase"] = _phases(codes, names, first_row)
            continue
        if column.null_count and name != "token":
            row = first_row + int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
            raise TraceValueError(message(f"{name} is null.", where=f"row {row}"))
        if name == "token":
            columns[name] = column
        elif pa.types.is_fixed_size_list(column.type):
            values, places = column.flatten(), column.type.list_size // num_layers
            if values.null_count:
                place = int(np.argmax(values.is_null().to_numpy(zero_copy_only=False))) // places
                where = f"row {first_row + place // num_layers}, moe_layer {place % num_layers}"
                raise TraceValueError(message(f"{name} holds a null.", where=where))
            columns[name] = values.to_numpy(zero_copy_only=True).reshape(num_tokens, num_layers, places)
        else:
            columns[name] = column.to_numpy(zero_copy_only=True)
    return columns


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    if column.num_chunks == 1:
        return column.chunk(0)
    if pa.types.is_dictionary(column.type):
        column = column.unify_dictionaries()
    whole = column.combine_chunks()
    return whole.chunk(0) if isinstance(whole, pa.ChunkedArray) else whole


def _labels(column: pa.Array) -> tuple[np.ndarray, tuple[str, ...]]:
    coded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    codes = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32)
    names = coded.dictionary.to_pylist()
    if codes.size and not -1 <= codes.min() <= codes.max() < len(names):
        what = "A label's number is beyond the labels of its column."
        raise TraceValueError(message(what, got=int(codes.max()), allowed=f"0 to {len(names) - 1}"))
    return codes, tuple(names)


def _phases(codes: np.ndarray, names: tuple[str, ...], first_row: int) -> np.ndarray:
    known = {phase.label: int(phase) for phase in Phase}
    table = np.array([known.get(name, -1) for name in names] + [-1], np.int8)
    phases = table[codes]
    if phases.size and phases.min() < 0:
        row = int(np.argmax(phases < 0))
        got = repr(names[codes[row]]) if codes[row] >= 0 else "null"
        where = f"row {first_row + row}"
        raise TraceValueError(message("Unknown phase.", where=where, got=got, allowed="prefill, decode"))
    return phases


def table_of_trace(trace: Trace) -> pa.Table:
    """Arrow table of a trace in the contract's types, header included."""
    columns: dict[str, pa.Array] = {"document": pa.array(trace.document), "position": pa.array(trace.position)}
    labels = [phase.label for phase in Phase]
    columns["phase"] = pa.DictionaryArray.from_arrays(pa.array(trace.phase.astype(np.int32)), pa.array(labels, pa.string()))
    if trace.domains:
        codes = pa.array(trace.domain, mask=trace.domain < 0)
        columns["domain"] = pa.DictionaryArray.from_arrays(codes, pa.array(trace.domains, pa.string()))
    else:
        columns["domain"] = pa.nulls(len(trace), _LABEL)
    if trace.token_id is not None:
        columns["token_id"] = pa.array(trace.token_id)
    if trace.token is not None:
        columns["token"] = trace.token.cast(pa.string())
    if trace.step is not None:
        columns["step"] = pa.array(trace.step)
    for name in ("expert_ids", "gate_weights", "router_scores"):
        values = getattr(trace, name)
        if values is not None:
            flat = pa.array(np.ascontiguousarray(values).reshape(-1))
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1] * values.shape[2])
    return pa.table(columns).replace_schema_metadata({HEADER_KEY: trace.header.to_json().encode()})
