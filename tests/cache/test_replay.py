"""Schedule, capacity, warm-up and errors of the replay."""

from __future__ import annotations

import numpy as np
import pytest

from swapless.cache.capacity import pools_for
from swapless.cache.replay import replay
from swapless.cache.schedule import schedule
from swapless.errors import CapacityError, TraceFormatError, UnknownNameError, UsageError
from swapless.trace import Trace
from tests.cache.made import made_trace


@pytest.fixture(scope="module")
def trace():
    return made_trace(tokens=40, documents=4, seed=1)


def test_warm_up_and_measured_requests_are_disjoint(trace):
    whole, warm = replay(trace, "lru", 3), replay(trace, "lru", 3, warmup_tokens=10)
    assert warm.requests + warm.warmup_requests == whole.requests
    assert warm.hits == whole.tally.hits[10:].sum()
    each = replay(trace, "lru", 3, warmup_tokens=2, state="reset")
    assert each.warmup_requests == 2 * 4 * 3 * 2


def test_documents_sum_to_the_whole(trace):
    documents, hits, requests = replay(trace, "lru", 3, warmup_tokens=3).by_document()
    found = replay(trace, "lru", 3, warmup_tokens=3)
    assert (hits.sum(), requests.sum()) == (found.hits, found.requests)
    assert documents.tolist() == [0, 1, 2, 3]


def test_interleaved_documents_take_turns(trace):
    plan = schedule(trace, interleave=2)
    assert sorted(plan.rows.tolist()) == list(range(len(trace)))
    assert plan.document[:4].tolist() == [0, 1, 0, 1]
    for number in range(4):
        rows = plan.rows[trace.document[plan.rows] == number]
        assert (np.diff(rows) > 0).all()
    assert plan.begins.sum() == 4


def test_steps_are_forward_calls(trace):
    step = np.arange(len(trace)) // 4
    called = Trace.from_arrays(trace.header, expert_ids=trace.expert_ids, step=step, document=trace.document)
    found = replay(called, "lru", 1.0)
    assert len(found.tally.requests) == 10
    wanted = [[len(np.unique(trace.expert_ids[4 * call : 4 * call + 4, layer])) for layer in range(3)] for call in range(10)]
    assert found.tally.requests.tolist() == wanted
    assert found.decode_tokens == 40


def test_prefill_never_takes_what_decode_uses(trace):
    phase = ["decode"] * 10 + ["prefill"] * 20 + ["decode"] * 10
    step = np.r_[np.arange(10), np.full(20, 10), 11 + np.arange(10)]
    called = Trace.from_arrays(
        trace.header, expert_ids=trace.expert_ids, step=step, phase=phase, document=np.zeros(40, int), position=np.arange(40)
    )
    found = replay(called, "lru", 3)
    assert found.requests == 20 * 3 * 2
    assert found.prefill_reads > 0 and found.tally.evictions[10].sum() == 0 and found.tally.streamed[10].sum() > 0
    alone = replay(called.rows(np.r_[:10, 30:40]), "lru", 3)
    assert found.tally.hits[11:].tolist() == alone.tally.hits[10:].tolist()


def test_capacities():
    assert pools_for(0.25, 26, 64, 6).capacity_experts == 16
    assert pools_for(0.01, 26, 64, 6).capacity_experts == 6
    assert pools_for(0.1, 26, 64, 6, "shared").pool_slots == [166]
    assert pools_for(0.3, 1, 10, 1).capacity_experts == 3
    assert pools_for(5, 26, 64, 6, "shared").pool_slots == [5]
    assert pools_for(0.01, 26, 64, 6, "floor").pool_slots == [156]
    for capacity, kind in (
        (5, "layer"),
        (65, "layer"),
        (0, "shared"),
        (155, "floor"),
        (1.5, "layer"),
        (0.0, "layer"),
        (True, "layer"),
    ):
        with pytest.raises(CapacityError):
            pools_for(capacity, 26, 64, 6, kind)


def test_a_pool_below_one_token_never_hits_under_lru(trace):
    # With one layer of demand to spare an expert may just survive a token; without, it never does.
    assert replay(trace, "lru", 4, pool="shared").hits == 0
    assert replay(trace, "lru", 4, pool="shared", request_model="single").hits == 0
    assert replay(trace, "belady", 4, pool="shared").hits > 0


def test_errors_say_what_to_do(trace):
    with pytest.raises(UnknownNameError, match="Did you mean 'lru'"):
        replay(trace, "lur")
    bare = made_trace(scores=False)
    with pytest.raises(TraceFormatError, match="record --scores"):
        replay(bare, "score")
    for bad in (
        {"request_model": "batch"},
        {"state": "drop"},
        {"pool": "heap"},
        {"warmup_tokens": -1},
        {"interleave": 0},
        {"interleave": 2, "state": "reset"},
    ):
        with pytest.raises(UsageError):
            replay(trace, "lru", **bad)
