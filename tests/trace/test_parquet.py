"""Traces on disk: what is written comes back, and every damaged file has its own error."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings

from swapless.errors import TraceFormatError, TraceMismatchError, TraceMissingError, TraceValueError
from swapless.testing import random_trace, traces
from swapless.trace import TraceFile, TraceWriter, read_trace, write_trace
from swapless.trace.parquet import HEADER_KEY, table_of_trace

SAMPLE = Path(__file__).resolve().parents[1] / "data" / "gpt-oss-20b.sample.parquet"


def full_trace(seed=0):
    rng = np.random.default_rng(seed)
    tokens = 47
    return random_trace(
        rng,
        domains=("a", "b"),
        token=[None if i % 7 == 0 else f"t{i}" for i in range(tokens)],
        token_id=np.arange(tokens),
        step=np.arange(tokens) // 2,
        gate_weights=rng.random((tokens, 2, 2)),
        router_scores=rng.random((tokens, 2, 8)),
        phase=[i % 2 for i in range(tokens)],
    )


def same(ours, theirs):
    assert ours.header == theirs.header
    for name in ("document", "position", "phase", "expert_ids", "gate_weights", "router_scores", "token_id", "step"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert (a is None and b is None) or (a.dtype == b.dtype and np.array_equal(a, b)), name
    assert ours.tokens == theirs.tokens
    labels = [[trace.domains[code] if code >= 0 else None for code in trace.domain] for trace in (ours, theirs)]
    assert labels[0] == labels[1]


@settings(max_examples=25, deadline=None)
@given(traces())
def test_what_is_written_comes_back(tmp_path_factory, trace):
    path = tmp_path_factory.mktemp("trace") / "t.parquet"
    write_trace(path, trace, row_group_tokens=7)
    same(read_trace(path), trace)


def test_every_column_comes_back_as_a_view(tmp_path):
    trace = full_trace()
    trace = replace(trace, header=replace(trace.header, notes="ü", extra={"future": [1, 2]}))
    write_trace(tmp_path / "t.parquet", trace, row_group_tokens=10)
    read = read_trace(tmp_path / "t.parquet")
    same(read, trace)
    assert not read.expert_ids.flags.owndata
    assert read_trace(tmp_path / "t.parquet", columns=("token",)).gate_weights is None


def test_the_writer_appends_and_leaves_nothing_after_a_failure(tmp_path):
    trace, path = full_trace(), tmp_path / "t.parquet"
    with TraceWriter(path, trace.header) as writer:
        for piece in trace.pieces(max_documents=1):
            writer.write(piece)
    same(read_trace(path), trace)
    with pytest.raises(TraceMismatchError, match="other columns"), TraceWriter(tmp_path / "u.parquet", trace.header) as writer:
        writer.write(trace)
        writer.write(replace(trace, step=None))
    with pytest.raises(TraceMismatchError, match="another header"), TraceWriter(tmp_path / "u.parquet", trace.header) as writer:
        writer.write(random_trace(np.random.default_rng(0), num_experts=3))
    with pytest.raises(TraceValueError, match="at least one token"), TraceWriter(tmp_path / "u.parquet", trace.header):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["t.parquet"]


def write_table(path, table):
    pq.write_table(table, path)
    return path


def with_header(table, **changes):
    header = json.loads(table.schema.metadata[HEADER_KEY]) | changes
    header = {name: value for name, value in header.items() if value != "gone"}
    return table.replace_schema_metadata({HEADER_KEY: json.dumps(header)})


def column(table, name, values):
    return table.set_column(table.schema.get_field_index(name), name, values)


LISTS = {"expert_ids": lambda rows: pa.array([[0, 1, 2, 3]] * rows, pa.list_(pa.int16()))}


@pytest.mark.parametrize(
    ("damage", "error", "said"),
    [
        (lambda t: t.replace_schema_metadata(None), TraceFormatError, "no trace header"),
        (lambda t: t.replace_schema_metadata({HEADER_KEY: b"{"}), TraceFormatError, "no JSON"),
        (lambda t: t.replace_schema_metadata({HEADER_KEY: b"[]"}), TraceFormatError, "JSON object"),
        (lambda t: with_header(t, format_version=2), TraceFormatError, "format_version.*Got: 2"),
        (lambda t: with_header(t, num_experts="gone"), TraceFormatError, "lacks required keys.*num_experts"),
        (lambda t: with_header(t, top_k="two"), TraceFormatError, "top_k"),
        (lambda t: with_header(t, moe_blocks=[0, 1, 2]), TraceFormatError, "expert_ids.*int16"),
        (lambda t: with_header(t, num_experts=7), TraceFormatError, "router_scores"),
        (lambda t: with_header(t.drop_columns("router_scores"), num_experts=3), TraceValueError, r"out of range.*moe_layer"),
        (lambda t: t.drop_columns(["phase"]), TraceFormatError, "lacks required columns.*phase"),
        (lambda t: column(t, "document", t["document"].cast(pa.int64())), TraceFormatError, "document.*int64"),
        (lambda t: column(t, "expert_ids", LISTS["expert_ids"](len(t))), TraceFormatError, "expert_ids.*list"),
        (lambda t: column(t, "position", pa.nulls(len(t), pa.int32())), TraceValueError, "position is null.*row 0"),
        (lambda t: column(t, "phase", pa.array(["hot"] * len(t))), TraceValueError, "Unknown phase.*row 0.*'hot'"),
        (lambda t: column(t, "phase", pa.nulls(len(t), pa.string())), TraceValueError, "Unknown phase.*null"),
        (lambda t: t.slice(0, 0), TraceValueError, "at least one token"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, damage, error, said):
    path = write_table(tmp_path / "t.parquet", damage(table_of_trace(full_trace())))
    with pytest.raises(error, match=said):
        read_trace(path)


def test_truncated_foreign_and_missing_files(tmp_path):
    whole = SAMPLE.read_bytes()
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "t.parquet").write_bytes(whole[:size])
        with pytest.raises(TraceFormatError, match=r"truncated|decoded"):
            read_trace(tmp_path / "t.parquet")
    damaged = bytearray(whole)
    damaged[len(whole) // 3 : len(whole) // 3 + 400] = bytes(400)
    (tmp_path / "t.parquet").write_bytes(damaged)
    with pytest.raises((TraceFormatError, TraceValueError)):
        read_trace(tmp_path / "t.parquet")
    with pytest.raises(TraceMissingError):
        read_trace(tmp_path / "none.parquet")


def test_unknown_columns_are_named_and_left_out(tmp_path):
    trace = full_trace()
    path = write_table(tmp_path / "t.parquet", table_of_trace(trace).append_column("mood", pa.array([1] * len(trace))))
    with pytest.warns(UserWarning, match="mood"):
        same(read_trace(path), trace)


def test_a_stream_hands_out_whole_documents(tmp_path):
    trace = random_trace(np.random.default_rng(3), lengths=(5, 30, 1, 1, 9, 17), domains=("a", "b"))
    write_trace(tmp_path / "t.parquet", trace, row_group_tokens=4)
    with TraceFile(tmp_path / "t.parquet") as file:
        assert (len(file), file.num_documents, file.header) == (63, 6, trace.header)
        pieces = list(file.pieces(10))
        assert np.array_equal(np.concatenate([piece.expert_ids for piece in pieces]), trace.expert_ids)
        assert sum(piece.num_documents for piece in pieces) == 6


def test_a_stream_refuses_documents_that_come_back(tmp_path):
    ids = np.zeros((9, 2, 2), np.int16)
    ids[:, :, 1] = 1
    trace = random_trace(np.random.default_rng(3), lengths=(9,))
    trace = replace(trace, document=np.array([0, 0, 0, 1, 1, 1, 0, 0, 0], np.int32), expert_ids=ids)
    write_trace(tmp_path / "t.parquet", trace, row_group_tokens=3)
    with TraceFile(tmp_path / "t.parquet") as file, pytest.raises(TraceValueError, match=r"interleave.*document 0"):
        list(file.pieces())


def test_the_sample_is_a_trace():
    trace = read_trace(SAMPLE)
    assert (trace.num_moe_layers, trace.num_experts, trace.top_k) == (24, 32, 4)
    assert trace.header.licence == "Apache-2.0"
    assert SAMPLE.stat().st_size <= 200_000
