"""The default policy follows what it learned where that is better, and LRU where it is not."""

from __future__ import annotations

import numpy as np

from swapless.cache.replay import replay
from swapless.trace import Trace, TraceHeader
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


def test_where_nothing_is_to_be_learned_it_is_lru():
    for group, every in ((12, 60), (20, 200), (24, 400)):
        trace = working_sets(group, every)
        for capacity in (8, 16, 20, 32):
            above = replay(trace, "next_use", capacity).hit_rate - replay(trace, "lru", capacity).hit_rate
            assert above > -0.002, (group, every, capacity)


def test_trust_is_not_given_in_advance():
    trace = in_turn(12)
    assert replay(trace, "next_use", 6).hits == replay(trace, "lru", 6).hits
