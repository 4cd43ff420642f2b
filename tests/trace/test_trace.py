"""The trace itself: construction, what it refuses, and choosing rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from swapless.errors import TraceMismatchError, TraceValueError, UnknownNameError, UsageError
from swapless.notation import Phase
from swapless.testing import random_trace, traces
from swapless.trace import Trace, TraceHeader, concatenate, select, split

HEADER = TraceHeader(model_id="test/tiny", num_experts=4, top_k=2, moe_blocks=(1, 3))


def make(ids, **columns):
    return Trace.from_arrays(HEADER, expert_ids=np.asarray(ids), **columns)


IDS = [[[0, 1], [2, 3]], [[1, 0], [3, -1]], [[2, 0], [0, 1]]]


def test_from_arrays_fills_what_is_left_out_and_shares_memory():
    ids = np.array(IDS, np.int16)
    trace = Trace.from_arrays(
        HEADER, expert_ids=ids, document=[4, 4, 7], phase="prefill", domain="code", token=["a", None, "c"]
    )
    assert trace.position.tolist() == [0, 1, 0]
    assert trace.phase.tolist() == [Phase.PREFILL] * 3
    assert trace.domains == ("code",)
    assert trace.tokens == ["a", None, "c"]
    assert np.shares_memory(trace.expert_ids, ids)
    assert trace.document_offsets.tolist() == [0, 2, 3]


def test_a_trace_cannot_be_changed():
    trace = make(IDS)
    with pytest.raises(ValueError, match="read-only"):
        trace.expert_ids[0, 0, 0] = 1
    with pytest.raises(AttributeError):
        trace.header = HEADER


@pytest.mark.parametrize(
    ("ids", "columns", "said"),
    [
        ([[[0, 4], [2, 3]]], {}, r"row 0, moe_layer 0.*Got: 4"),
        ([[[0, 1], [-2, 3]]], {}, r"row 0, moe_layer 1.*Got: -2"),
        ([[[0, 1], [3, 3]]], {}, r"twice.*row 0, moe_layer 1.*Got: 3"),
        ([[[0, 40000], [2, 3]]], {}, r"does not fit int16.*\[0, 0, 1\].*Got: 40000"),
        ([[[0, 1, 2], [1, 2, 3]]], {}, r"wrong shape.*\(1, 2, 3\)"),
        (np.zeros((0, 2, 2), np.int16), {}, r"at least one token"),
        (IDS, {"document": [0, 1]}, r"document has the wrong shape|wrong shape"),
        (IDS, {"position": [0, 2, 2]}, r"rise strictly.*row 2, document 0.*2 after 2"),
        (IDS, {"phase": ["decode", "warm", "decode"]}, r"Unknown phase.*row 1.*'warm'"),
        (IDS, {"phase": 2}, r"Unknown phase"),
        (IDS, {"step": [0, -1, 2]}, r"step is out of range.*row 1"),
        (IDS, {"document": [-1, 0, 0]}, r"document is out of range.*row 0"),
        (IDS, {"gate_weights": [[[1, np.nan], [1, 1]]] * 3}, r"gate_weights.*row 0, moe_layer 0, place 1"),
        (IDS, {"router_scores": np.zeros((3, 2, 3))}, r"router_scores has the wrong shape"),
        (IDS, {"token": ["a"]}, r"token has the wrong length"),
        (IDS, {"domain": ["a", 1, "b"]}, r"domain must be a text.*row 1"),
        (np.array(IDS, np.float64), {}, r"must be integers"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(ids, columns, said):
    with pytest.raises(TraceValueError, match=said):
        make(ids, **columns)


def test_ragged_ids_are_refused():
    with pytest.raises(TraceValueError, match="ragged"):
        Trace.from_arrays(HEADER, expert_ids=[[[0, 1], [2]], [[0, 1], [2, 3]]])


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_experts": 0},
        {"top_k": 5},
        {"moe_blocks": ()},
        {"moe_blocks": (3, 1)},
        {"num_experts": 4.0},
        {"top_k": True},
        {"model_id": 3},
        {"hidden_size": -1},
    ],
)
def test_a_header_that_cannot_be(wrong):
    shape = {"model_id": None, "num_experts": 4, "top_k": 2, "moe_blocks": (1, 3)} | wrong
    with pytest.raises(TraceValueError, match=next(iter(wrong))):
        TraceHeader(**shape)


def test_interleaved_documents_are_grouped_in_order_of_appearance():
    ids = np.arange(6, dtype=np.int16).reshape(6, 1, 1) % 4
    header = TraceHeader(model_id=None, num_experts=4, top_k=1, moe_blocks=(0,))
    trace = Trace.from_arrays(header, expert_ids=ids, document=[5, 2, 5, 2, 5, 9], token=list("abcdef"))
    grouped = trace.grouped()
    assert grouped.document.tolist() == [5, 5, 5, 2, 2, 9]
    assert grouped.tokens == list("acebdf")
    assert grouped.grouped() is grouped


@settings(max_examples=50, deadline=None)
@given(traces())
def test_pieces_put_together_are_the_whole(trace):
    parts = list(trace.pieces(5, 2))
    assert np.array_equal(np.concatenate([part.expert_ids for part in parts]), trace.expert_ids)
    assert all(part.num_documents <= 2 for part in parts)
    assert sum(part.num_documents for part in parts) == trace.num_documents


def test_select_by_document_domain_and_phase():
    trace = random_trace(np.random.default_rng(0), lengths=(3, 4, 5), domains=("a", "b"), phase=[0] * 6 + [1] * 6)
    assert select(trace, documents="0,2").document.tolist() == [0] * 3 + [2] * 5
    assert select(trace, documents=[1]).num_documents == 1
    assert set(select(trace, domain="b").document.tolist()) == {1}
    assert len(select(trace, phase="decode", documents="1-9")) == 6
    assert select(trace) is trace
    with pytest.raises(UnknownNameError, match="a, b"):
        select(trace, domain="c")
    with pytest.raises(UnknownNameError, match="decode, prefill"):
        select(trace, phase="warm")
    with pytest.raises(UsageError, match="No token"):
        select(trace, documents="7")
    for text in ("", "3-1", "a", "1-2-3"):
        with pytest.raises(UsageError, match="range of documents"):
            select(trace, documents=text)


def test_concatenate_renumbers_and_refuses_other_models():
    one = random_trace(np.random.default_rng(1), lengths=(3, 2), domains=("a",), step=range(5))
    two = random_trace(np.random.default_rng(2), lengths=(4,), domains=("b",), step=range(4))
    both = concatenate([one, two])
    assert both.document.tolist() == [0] * 3 + [1] * 2 + [2] * 4
    assert both.step.tolist() == list(range(9))
    assert both.domains == ("a", "b")
    assert both.domain.tolist() == [0] * 5 + [1] * 4
    with pytest.raises(TraceMismatchError, match="document numbers"):
        concatenate([one, two], renumber=False)
    with pytest.raises(TraceMismatchError, match=r"num_experts differs.*trace 1"):
        concatenate([one, random_trace(np.random.default_rng(3), num_experts=9)])
    with pytest.raises(TraceMismatchError, match="with and without step"):
        concatenate([one, random_trace(np.random.default_rng(3))])
    with pytest.raises(UsageError):
        concatenate([])


def test_split_is_disjoint_whole_and_repeatable():
    trace = random_trace(np.random.default_rng(4), lengths=(3,) * 10)
    parts = split(trace, (0.5, 0.3, 0.2), seed=1)
    assert [part.num_documents for part in parts] == [5, 3, 2]
    assert sorted(d for part in parts for d in np.unique(part.document)) == list(range(10))
    again = split(trace, (0.5, 0.3, 0.2), seed=1)
    assert all(np.array_equal(a.document, b.document) for a, b in zip(parts, again))
    assert [part.num_documents for part in split(trace, (0.99, 0.01))] == [9, 1]
    for wrong in ((0.5, 0.4), (1.5, -0.5)):
        with pytest.raises(UsageError, match="sum to 1"):
            split(trace, wrong)
    with pytest.raises(UsageError, match="never by token"):
        split(trace, by="token")
    with pytest.raises(UsageError, match="Too few documents"):
        split(trace, (1 / 11,) * 11)
