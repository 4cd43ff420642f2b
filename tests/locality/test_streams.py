"""A trace on disk: cut into the same pieces, measured to the same figures, held in bounded memory."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from swapless.cli._survey import survey
from swapless.errors import TraceValueError, UnknownNameError, UsageError
from swapless.locality import vocabulary_specialization
from swapless.testing import random_trace
from swapless.trace import Trace, TraceFile, TraceHeader, TraceWriter, select, stream, write_trace
from swapless.trace.importers import open_trace
from swapless.trace.parquet import table_of_trace
from swapless.trace.select import Choice

LENGTHS = (9, 30, 1, 12, 5, 41, 2, 2, 2, 17)


def rich_trace(seed=0):
    rng = np.random.default_rng(seed)
    tokens = sum(LENGTHS)
    return random_trace(
        rng,
        num_moe_layers=3,
        lengths=LENGTHS,
        domains=("a", "b"),
        missing=0.1,
        phase=["prefill" if t % 3 else "decode" for t in range(tokens)],
        token=[None if t % 11 == 0 else f"t{t % 4}" for t in range(tokens)],
        gate_weights=rng.random((tokens, 3, 2)),
    )


CHOICES = [
    {},
    {"documents": "1-5"},
    {"documents": "0,3,9"},
    {"domain": "b"},
    {"phase": "decode"},
    {"documents": "1-8", "domain": "b", "phase": "prefill"},
]


@pytest.fixture(params=[3, 16384])
def batches(request, monkeypatch):
    monkeypatch.setattr(stream, "_BATCH_TOKENS", request.param)
    monkeypatch.setattr(stream, "_LABEL_TOKENS", request.param)


@pytest.mark.few(20)
@pytest.mark.parametrize("options", CHOICES)
@pytest.mark.parametrize("limits", [(None, None), (1, None), (10, None), (None, 2), (25, 3), (1000, 4)])
def test_a_file_is_cut_into_the_pieces_of_the_trace(tmp_path, batches, options, limits):
    trace = rich_trace()
    write_trace(tmp_path / "t.parquet", trace, row_group_tokens=7)
    whole = select(trace, **options)
    choice = Choice.of(*(options.get(name) for name in ("documents", "domain", "phase")))
    with TraceFile(tmp_path / "t.parquet", choice=choice) as file:
        assert (len(file), file.num_documents, file.in_pieces) == (len(whole), whole.num_documents, True)
        for _ in range(2):  # the second pass is not checked again
            ours = list(file.pieces(*limits, columns=("token", "gate_weights")))
            theirs = list(whole.pieces(*limits))
            assert [len(piece) for piece in ours] == [len(piece) for piece in theirs]
            for a, b in zip(ours, theirs):
                for name in ("document", "position", "phase", "expert_ids", "gate_weights"):
                    assert np.array_equal(getattr(a, name), getattr(b, name)), name
                assert a.tokens == b.tokens
                assert [a.domains[code] for code in a.domain] == [b.domains[code] for code in b.domain]


@pytest.mark.few(2)
@pytest.mark.parametrize("options", [CHOICES[0], CHOICES[1], CHOICES[4]])
def test_the_survey_of_a_file_is_that_of_the_trace(tmp_path, batches, options, monkeypatch):
    monkeypatch.setattr("swapless.locality.specialization.LEAST_COUNT", 5)
    monkeypatch.setattr("swapless.locality.specialization.TABLE_BYTES", 1)
    trace = rich_trace()
    write_trace(tmp_path / "t.parquet", trace, row_group_tokens=7)
    small = {"segments": [3, 16], "replicates": 20}
    theirs = survey(select(trace, **options), **small)
    with open_trace(tmp_path / "t.parquet", choice=Choice.of(*map(options.get, ("documents", "domain", "phase")))) as file:
        assert isinstance(file, TraceFile)
        ours = survey(file, **small)
    assert json.dumps(ours) == json.dumps(theirs)
    assert {row["variant"] for row in ours["rows"] if row["measure"] == "specialization"} >= {"vocabulary_in", "vocabulary_out"}


def test_interleaved_documents_are_read_whole_and_measure_the_same(tmp_path):
    trace = rich_trace()
    order = np.argsort(trace.position, kind="stable")
    write_trace(tmp_path / "t.parquet", trace.rows(order), row_group_tokens=7)
    with open_trace(tmp_path / "t.parquet") as opened:
        assert isinstance(opened, Trace)
        ours = survey(opened, segments=[4], replicates=0)
    theirs = survey(trace.rows(order), segments=[4], replicates=0)
    assert json.dumps(ours) == json.dumps(theirs)


def test_errors_name_the_row_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "_BATCH_TOKENS", 10)
    trace = rich_trace()
    row = np.arange(len(trace))
    at = row[:, None, None]
    weights = np.broadcast_to(np.where(at == 33, np.nan, 1), trace.expert_ids.shape)
    for change, said in (
        ({"expert_ids": np.where(at == 47, 8, trace.expert_ids).astype(np.int16)}, r"row 47, moe_layer 0\. Got: 8"),
        ({"position": np.where(row == 20, 0, trace.position).astype(np.int32)}, "row 20, document 1"),
        ({"gate_weights": weights.astype(np.float16)}, "row 33"),
    ):
        write_trace(tmp_path / "t.parquet", replace(trace, **change))
        with TraceFile(tmp_path / "t.parquet") as file, pytest.raises(TraceValueError, match=said):
            list(file.pieces(10, columns=("gate_weights",)))
    table = table_of_trace(trace)
    nulls = pa.array([None if row == 61 else row for row in range(len(trace))], pa.int32())
    pq.write_table(table.set_column(1, "position", nulls), tmp_path / "t.parquet")
    with TraceFile(tmp_path / "t.parquet") as file, pytest.raises(TraceValueError, match=r"position is null.*row 61"):
        list(file.pieces())


def test_choices_that_nothing_meets(tmp_path):
    write_trace(tmp_path / "t.parquet", rich_trace())
    for choice, error, said in (
        (Choice(domain="c"), UnknownNameError, "a, b"),
        (Choice(documents=((20, 30),)), UsageError, "documents 20-30.*documents 0-9"),
    ):
        with TraceFile(tmp_path / "t.parquet", choice=choice) as file, pytest.raises(error, match=said):
            len(file)


@pytest.mark.slow
def test_memory_stays_that_of_a_piece(tmp_path):
    """32 MB of ids, of which no more than some batches are held at a time."""
    header = TraceHeader(
        model_id="test/long", num_experts=64, top_k=8, moe_blocks=(0, 1), expert_order="descending gate weight"
    )
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((5000, 2, 64), np.float32), axis=2)[:, :, :8].astype(np.int16)
    with TraceWriter(tmp_path / "t.parquet", header) as writer:
        for number in range(200):
            part = Trace.from_arrays(header, expert_ids=ids, document=np.full(5000, number), token_id=np.arange(5000) % 97)
            writer.write(part)
    before = pa.total_allocated_bytes()
    held = []
    with TraceFile(tmp_path / "t.parquet") as file:
        assert len(file) == 1_000_000
        for _ in file.pieces(16384, 512):
            held.append(pa.total_allocated_bytes() - before)
        assert max(held) < 10e6
        assert vocabulary_specialization(file).vocabulary == 97
