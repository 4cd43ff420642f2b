"""The smallest shapes that there are, and arrays that were never checked or were changed after: no loop leaves its arrays."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest

from swapless.cache import POLICIES
from swapless.cache.capacity import Pools
from swapless.cache.curves import hit_rate_curves
from swapless.cache.devices import DeviceProfile
from swapless.cache.replay import replay
from swapless.cache.residency import empty_residency
from swapless.cache.serve import ExpertCache
from swapless.cache.static import Static
from swapless.cache.timeline import timeline
from swapless.errors import UsageError
from swapless.locality import balance, reuse, sch_lookahead, sch_static, srp
from swapless.notation import Phase
from swapless.trace import Trace, TraceHeader
from swapless.trace.pinned import pinned_hits
from swapless.trace.stacks import FREQUENCY, LOOKAHEAD, NEXT_USE, RECENCY, stack_hits

SHAPES = [
    # L, E, K, ids of T tokens
    (1, 1, 1, [[[0]]]),
    (1, 1, 1, [[[-1]]]),
    (1, 1, 1, [[[0]], [[0]], [[-1]], [[0]]]),
    (1, 3, 3, [[[0, 1, 2]], [[2, 1, 0]], [[1, -1, -1]]]),
    (2, 2, 2, [[[0, 1], [1, 0]], [[-1, -1], [-1, 0]]]),
    (3, 4, 1, [[[3], [0], [3]], [[3], [1], [0]], [[2], [0], [3]]]),
]


def made(layers: int, experts: int, top_k: int, ids: list, **columns: object) -> Trace:
    header = TraceHeader(model_id="edge", num_experts=experts, top_k=top_k, moe_blocks=tuple(range(layers)))
    return Trace.from_arrays(header, expert_ids=np.array(ids, np.int16).reshape(len(ids), layers, top_k), **columns)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("policy", ["lru", "belady_bypass", pytest.param("s3fifo", marks=pytest.mark.slow)])
def test_the_smallest_replays_count_right(policy, shape):
    trace = made(*shape)
    asked = int((trace.expert_ids >= 0).sum())
    everything = trace.num_moe_layers * trace.num_experts
    for pool, capacity in (("layer", trace.top_k), ("layer", trace.num_experts), ("shared", 1), ("shared", everything)):
        for request_model in ("token", "single"):
            found = replay(trace, policy, capacity, pool=pool, request_model=request_model)
            assert found.requests == asked and 0 <= found.hits <= asked
            if capacity == everything or (pool == "layer" and capacity == trace.num_experts):
                keys = {(layer, expert) for row in trace.expert_ids.tolist() for layer, ids in enumerate(row) for expert in ids}
                distinct = len({key for key in keys if key[1] >= 0})
                assert found.hits == asked - distinct and not found.evictions


@pytest.mark.parametrize("shape", SHAPES)
def test_the_smallest_curves_and_measures(shape):
    trace = made(*shape)
    asked = int((trace.expert_ids >= 0).sum())
    for requests in ("snapshot", "token", "single"):
        for curve in hit_rate_curves(trace, ["lru", "lfu", "belady"], requests=requests):
            assert curve.requests.sum() == asked
    for segment in (1, 2, 1000):
        for found in (*sch_lookahead(trace, segment), *sch_static(trace, segment)):
            assert found.hits().max(initial=0) <= max(asked * segment, 0)
        assert srp(trace, segment)[0].windows == max(0, len(trace) - segment + 1)
        assert reuse(trace, segment).uses.sum() == asked
        assert balance(trace, segment).load.sum() == asked


def test_a_segment_that_no_table_holds_is_refused():
    for measure in (srp, reuse, balance, sch_static, sch_lookahead):
        with pytest.raises(UsageError, match="too long"):
            measure(made(*SHAPES[0]), 10**9)


BAD = [[[4, 0]], [[-2, 0]], [[1, 1]], [[32767, 0]]]


@pytest.mark.parametrize("ids", BAD)
def test_a_trace_that_was_changed_after_its_checks_is_refused(ids):
    mine = np.array([[[0, 1]], [[2, 3]]], np.int16)
    trace = made(1, 4, 2, mine.tolist())
    mine = np.array(trace.expert_ids)
    trace = replace(trace, expert_ids=mine.view())
    mine[1] = ids
    calls = [
        lambda: replay(trace, "lru", 2),
        lambda: timeline(trace, "lru", 2, DeviceProfile(name="d", bytes_per_s=1e9), expert_bytes=1),
        lambda: hit_rate_curves(trace, ["lru"]),
        lambda: sch_lookahead(trace, 2),
        lambda: sch_static(trace, 2),
        lambda: srp(trace, 2),
        lambda: reuse(trace, 2),
        lambda: balance(trace, 2),
    ]
    for call in calls:
        with pytest.raises(UsageError, match=r"out of range|twice"):
            call()


def test_an_empty_or_misshapen_trace_is_refused():
    trace = made(1, 4, 2, [[[0, 1]], [[2, 3]]])
    with pytest.raises(UsageError, match="at least one token"):
        replay(trace.rows(slice(0, 0)), "lru", 2)
    for ids in (trace.expert_ids[:1], trace.expert_ids[..., :1], trace.expert_ids.astype(np.int64)):
        with pytest.raises(UsageError, match="wrong"):
            replay(replace(trace, expert_ids=ids), "lru", 2)


@pytest.mark.parametrize("rule", [RECENCY, FREQUENCY, NEXT_USE, LOOKAHEAD])
def test_passes_refuse_what_they_cannot_walk(rule):
    refs, offsets = np.array([[0, 1], [2, -1]], np.int32), np.array([0, 2])
    passes = [stack_hits] if rule == LOOKAHEAD else [stack_hits, pinned_hits]
    for walk in passes:
        assert walk(refs, offsets, 3, rule=rule)[1].sum() == 3
        assert walk(refs[:0], np.array([0]), 3, rule=rule)[0].shape == (0, 3)
        for wrong in ((refs, offsets, 2), (refs, np.array([0, 3]), 3), (refs, offsets, 0), (refs.astype(float), offsets, 3)):
            with pytest.raises(UsageError):
                walk(*wrong, rule=rule)
        with pytest.raises(UsageError):
            walk(refs, offsets, 3, rule=9)
    assert stack_hits(refs, offsets, 3, rule=LOOKAHEAD, window=1 << 60)[1].sum() == 3
    with pytest.raises(UsageError):
        stack_hits(refs, offsets, 3, rule=LOOKAHEAD, window=0)


@pytest.mark.parametrize(
    ("pools", "slots", "floor"),
    [
        ([0, 2], [1, 1], 0),
        ([0], [1, 1], 0),
        ([0, -1], [1, 1], 0),
        ([0, 1], [1, -1], 0),
        ([0, 1], [9, 1], 0),
        ([0, 1], [1, 1], -1),
    ],
)
def test_pools_that_cannot_be_are_refused(pools, slots, floor):
    with pytest.raises(UsageError, match="pools"):
        empty_residency(2, 4, pools, slots, floor)
    with pytest.raises(UsageError, match="pools"):
        replay(made(2, 4, 1, [[[0], [1]]]), "lru", Pools(pools, slots, floor, "layer", 1, 0.25))


def test_a_request_that_cannot_be_is_refused():
    cache = ExpertCache(POLICIES.get("lru")(), 2, 4, [0, 1], [2, 2])
    ids = np.array([0, 1])
    for moe_layer in (-1, 2, 10**9):
        with pytest.raises(UsageError, match="MoE layer"):
            cache.request(moe_layer, ids, Phase.DECODE)
    with pytest.raises(UsageError, match="float64"):
        cache.request(0, ids.astype(float), Phase.DECODE)
    for scores in (np.zeros((1, 5), np.float32), np.zeros((1, 4)), np.zeros(4, np.float32)):
        with pytest.raises(UsageError, match="scores"):
            cache.request(0, ids, Phase.DECODE, scores)
    served = cache.request(0, np.array([[7, -3, 1, 1]]), Phase.DECODE)  # ids outside [0, E) stand for none
    assert served.experts.tolist() == [1] and served.tokens.tolist() == [2]


class Loose(NamedTuple):
    number: int


@pytest.mark.parametrize("state", [None, (), Loose(1), Loose(np.zeros((2, 4))[:, ::2]), [np.zeros(1)]])
def test_a_policy_without_a_proper_state_is_refused(state):
    class Odd:
        name = "odd"

        def state(self, num_moe_layers, num_experts, pools):
            return state

    with pytest.raises(UsageError, match="NamedTuple"):
        ExpertCache(Odd(), 1, 2, [0], [1])
    with pytest.raises(UsageError, match="NamedTuple"):
        replay(made(*SHAPES[0]), Odd(), 1)


def test_a_popularity_that_is_no_number_is_refused():
    with pytest.raises(UsageError, match="finite"):
        Static(popularity=np.full((1, 2), np.nan)).state(1, 2, 1)
