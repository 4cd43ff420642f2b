"""The default policy follows what it learned where that is better, and LRU where it is not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from swapless.cache.replay import replay
from swapless.notation import Phase
from swapless.trace import Trace, TraceHeader, read_trace, select
from tests.cache.twins import slow_hits


def trace_of(ids_TLK, experts):
    header = TraceHeader(
        model_id="made", num_experts=experts, top_k=ids_TLK.shape[2], moe_blocks=tuple(range(ids_TLK.shape[1]))
    )
    return Trace.from_arrays(header, expert_ids=ids_TLK.astype(np.int16))


def in_turn(tokens):
    """Six pairs of experts in turn, two MoE layers: LRU with room for fewer than all always drops the one that comes next."""
    pair = np.arange(tokens) % 6
    ids = np.stack([2 * pair, 2 * pair + 1], 1)
    return trace_of(np.stack([ids, 11 - ids], 1), 12)


def working_sets(group, every, tokens=1500):
    """Uniform in a group of experts that is drawn anew every so often: nothing to learn beside what was used of late."""
    rng = np.random.default_rng(0)
    ids = np.empty((tokens, 2, 6), np.int64)
    for layer in range(2):
        for token in range(tokens):
            if token % every == 0:
                members = rng.permutation(64)[:group]
            ids[token, layer] = rng.choice(members, 6, replace=False)
    return trace_of(ids, 64)


def test_what_follows_what_is_learned_and_followed():
    trace = in_turn(600)
    found, lru = replay(trace, "next_use", 6), replay(trace, "lru", 6)
    assert lru.hits == 0
    assert found.hit_rate > 0.2
    assert found.tally.hits.tolist() == slow_hits("next_use", trace, found.pools)  # the learned half agrees with its twin too


def drawn(tokens, experts=32, power=1.0, every=0, seed=0):
    """Four experts of 32 by popularity, in two MoE layers; popularity changes every so often."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, experts + 1) ** power
    ids = np.empty((tokens, 2, 4), np.int64)
    for layer in range(2):
        for token in range(tokens):
            if token == 0 or (every and token % every == 0):
                order = rng.permutation(experts)
            ids[token, layer] = order[rng.choice(experts, 4, replace=False, p=share / share.sum())]
    return trace_of(ids, experts)


def successors(tokens, every, experts=32):
    """Each expert has one that follows it; who that is changes every so often, and what was learned turns wrong."""
    rng = np.random.default_rng(1)
    ids = np.empty((tokens, 2, 2), np.int64)
    for layer in range(2):
        now = rng.choice(experts, 2, replace=False)
        for token in range(tokens):
            if token % every == 0:
                follows = rng.permutation(experts)
            ids[token, layer] = now = follows[now]
    return trace_of(ids, experts)


def by_turns(tokens):
    """What is best for LRU and what is worst for it, one after the other."""
    rng, ids = np.random.default_rng(2), np.empty((tokens, 2, 4), np.int64)
    for token in range(tokens):
        if token % 300 == 0:
            members = rng.permutation(32)[:10]
        turning = token % 300 < 150
        for layer in range(2):
            ids[token, layer] = (4 * (token % 8) + np.arange(4)) if turning else rng.choice(members, 4, replace=False)
    return trace_of(ids, 32)


MADE = {
    "working sets of 12": lambda: working_sets(12, 60),
    "working sets of 20": lambda: working_sets(20, 200),
    "working sets of 24": lambda: working_sets(24, 400),
    "short-lived working sets": lambda: working_sets(16, 30),
    "in turn": lambda: in_turn(1200),
    "by popularity": lambda: drawn(1200),
    "uniform": lambda: drawn(1200, power=0.0),
    "popularity that changes": lambda: drawn(1200, power=1.5, every=60),
    "successors": lambda: successors(1200, 10**9),
    "successors that change": lambda: successors(1200, 40),
    "by turns": lambda: by_turns(1200),
}


@pytest.mark.few(7)
@pytest.mark.parametrize("request_model", ["token", "single"])
@pytest.mark.parametrize("name", MADE)
def test_it_is_nowhere_below_lru(name, request_model):
    trace = MADE[name]()
    experts, top_k, layers = trace.num_experts, trace.top_k, trace.num_moe_layers
    ways = [{}, {"pool": "shared"}, {"pool": "floor"}]
    if request_model == "token":
        ways.append({"state": "reset"})
    documents = np.repeat(np.arange(len(trace) // 100), 100).astype(np.int32)
    for capacity in sorted({top_k + 1, experts // 4, experts // 2} - set(range(top_k))):
        for way in ways:
            asked = replace(trace, document=documents) if "state" in way else trace
            share = capacity / experts if "pool" in way else capacity
            options = {"request_model": request_model, **way}
            found, lru = replay(asked, "next_use", share, **options), replay(asked, "lru", share, **options)
            # what is spent before it gives up, twice, and a fifth of a point
            most = 0.002 * found.requests + 2 * (32 + layers)
            assert found.hits > lru.hits - most, (capacity, way, found.hit_rate - lru.hit_rate)


def test_one_at_a_time_it_learns_as_well():
    for trace, capacity in ((in_turn(1200), 6), (drawn(1500), 8)):
        found = replay(trace, "next_use", capacity, request_model="single")
        assert found.hit_rate > replay(trace, "lru", capacity, request_model="single").hit_rate + 0.02
    trace = drawn(300)
    found = replay(trace, "next_use", 8, request_model="single")
    assert found.tally.hits.tolist() == slow_hits("next_use", trace, found.pools, single=True)


def test_trust_is_not_given_in_advance():
    trace = in_turn(12)
    assert replay(trace, "next_use", 6).hits == replay(trace, "lru", 6).hits


@pytest.mark.data
@pytest.mark.parametrize("request_model", ["token", "single"])
@pytest.mark.parametrize(
    ("name", "documents", "capacities"),
    [("gpt-oss-20b.decode", "0-11", (8, 16)), ("deepseek-v2-lite.puffin", "0-39", (16, 32))],
)
def test_on_recorded_routing_it_is_above_lru(data_dir, name, documents, capacities, request_model):
    trace = select(read_trace(data_dir / "traces" / f"{name}.parquet", columns=()), documents=documents)
    trace = replace(trace, phase=np.full(len(trace), Phase.DECODE, np.int8))
    for capacity in capacities:
        for way in ({}, {"pool": "shared"}, {"state": "reset"}):
            share = capacity / trace.num_experts if "pool" in way else capacity
            options = {"request_model": request_model, **way}
            found, lru = replay(trace, "next_use", share, **options), replay(trace, "lru", share, **options)
            assert found.hit_rate > lru.hit_rate, (capacity, way)
