"""What every registered policy must do; a new one is enrolled by being registered."""

from __future__ import annotations

import numpy as np
import pytest

from swapless.cache import POLICIES
from swapless.cache.replay import replay
from swapless.cache.residency import layer_pools
from swapless.cache.serve import ExpertCache
from swapless.errors import UnsupportedOperationError
from swapless.notation import Phase
from tests.cache.made import made_trace
from tests.cache.twins import TWINS, slow_hits

NAMES = POLICIES.names()
# A policy takes longer to compile than to test: these are tested every time, the others with `make test-slow`.
EVERY_TIME = {"lru"}
POOLS = [("layer", 3), ("shared", 9), ("shared", 4), ("floor", 9)]


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name in EVERY_TIME else pytest.mark.slow) for name in NAMES],
    ids=str,
)
def name(request):
    """A policy. The scope keeps its tests together, so that each is compiled once however many workers test."""
    return request.param


@pytest.fixture(scope="module")
def trace():
    return made_trace()


def test_every_policy_has_a_slow_twin_that_agrees(name, trace):
    assert name in TWINS, "write the policy's twin in twins.py"
    for pool, capacity in POOLS:
        for single in (False, True):
            found = replay(trace, name, capacity, pool=pool, request_model="single" if single else "token")
            assert found.tally.hits.tolist() == slow_hits(name, trace, found.pools, single=single), (pool, capacity, single)


def test_counts_add_up_and_capacity_is_kept(name, trace):
    for pool, capacity in POOLS:
        found = replay(trace, name, capacity, pool=pool)
        row = found.row()
        assert row["requests"] == trace.expert_ids.size
        misses = row["requests"] - row["hits"]
        assert row["bytes_read_per_token"] == misses * 3 * 8 * 4 * 2 / len(trace)
        held = misses - row["evictions"] - row["streamed"]  # inserted and still there
        assert 0 < held <= sum(found.pools.pool_slots)


def test_nothing_beats_the_optimum_of_its_request_model(name, trace):
    for model in ("token", "single"):
        for pool, capacity in (("layer", 2), ("layer", 4), ("shared", 12)):
            best = replay(trace, "belady_bypass", capacity, pool=pool, request_model=model).hits
            forced = replay(trace, "belady", capacity, pool=pool, request_model=model).hits
            assert forced <= best
            if name != "belady_bypass":
                assert replay(trace, name, capacity, pool=pool, request_model=model).hits <= forced


def test_room_for_all_leaves_only_first_touches(name, trace):
    touched = sum(len(np.unique(trace.expert_ids[:, layer])) for layer in range(trace.num_moe_layers))
    for pool in ("layer", "shared"):
        found = replay(trace, name, 1.0, pool=pool)
        assert found.requests - found.hits == touched
        assert found.evictions == 0


def test_a_second_replay_and_a_reset_are_fresh(name, trace):
    first, second = (replay(trace, name, 3) for _ in range(2))
    assert np.array_equal(first.tally.hits, second.tally.hits)
    whole = replay(trace, name, 3, state="reset").tally.hits
    alone = [replay(trace.rows(trace.document == number), name, 3).tally.hits for number in np.unique(trace.document)]
    assert np.array_equal(whole, np.concatenate(alone))


def test_the_engine_serves_what_the_replay_says(name):
    """The engine's own cache, fed call by call (prefill, then batches), against the replay of the trace it would record."""
    if getattr(POLICIES.get(name), "optimum", False):
        with pytest.raises(UnsupportedOperationError, match="knows the future"):
            ExpertCache(POLICIES.get(name)(), 3, 8, *layer_pools(3, 8, 9))
        return
    trace, step, phase = made_trace(tokens=60, documents=2, seed=4), [], []
    while len(step) < len(trace):
        number = (step[-1] + 1) if step else 0
        rows = 9 if number in (0, 7) else 2 if number % 3 == 0 else 1
        step += [number] * rows
        phase += [Phase.PREFILL if rows == 9 else Phase.DECODE] * rows
    step, phase = np.array(step[: len(trace)], np.int32), np.array(phase[: len(trace)])
    recorded = type(trace).from_arrays(
        trace.header,
        expert_ids=trace.expert_ids,
        step=step,
        phase=phase,
        document=np.zeros(len(step), np.int32),
        position=np.arange(len(step)),
        router_scores=trace.router_scores,
    )
    cache = ExpertCache(POLICIES.get(name)(), trace.num_moe_layers, trace.num_experts, *layer_pools(3, 8, 9))
    cache.begin_document()
    hits, waves = [], 0
    for number in range(step.max() + 1):
        rows = step == number
        for layer in range(trace.num_moe_layers):
            scores = trace.router_scores[rows, layer].astype(np.float32)
            ids = trace.expert_ids[rows, layer].astype(np.int64)
            served = cache.request(layer, ids, Phase(phase[rows][0]), scores=scores)
            hits.append(int(served.hit.sum()))
            waves = max(waves, served.waves)
            assert len(served.experts) == len(np.unique(ids))
    found = replay(recorded, name, 3)
    assert found.tally.hits.reshape(-1).tolist() == hits
    assert waves > 1
    fresh = hits[0]
    cache.reset()
    assert fresh == 0 and not (cache.residency.key_of_slot >= 0).any()


def test_slots_that_are_withheld_hold_nothing_until_they_are_given_back(name, trace):
    try:
        cache = ExpertCache(POLICIES.get(name)(), trace.num_moe_layers, trace.num_experts, *layer_pools(3, 8, 12))
    except UnsupportedOperationError:
        pytest.skip("it needs the future")
    rng = np.random.default_rng(0)
    for step, ids in enumerate(trace.expert_ids.astype(np.int64)):
        if step % 5 == 0:
            # Of each pool of four at least one stays, but in prefill, which does without.
            prefill = step % 15 == 10
            kept = rng.integers(0, 4, 3) + np.arange(3) * 4
            out = set(range(12)) if prefill and step % 2 else set(rng.permutation(12)[: rng.integers(0, 10)].tolist())
            cache.withhold(out if prefill else out - set(kept.tolist()))
        phase = Phase.PREFILL if step % 15 >= 10 else Phase.DECODE
        if phase is Phase.DECODE and len(cache.withheld) == 12:
            cache.withhold([])
        for layer in range(trace.num_moe_layers):
            served = cache.request(layer, ids[layer], phase)
            slots = set(served.slot.tolist())
            assert not slots & cache.withheld
            assert phase is Phase.PREFILL or -1 not in slots
            for expert, slot in zip(served.experts.tolist(), served.slot.tolist(), strict=True):
                if slot >= 0 and served.waves == 1:
                    assert cache.residency.key_of_slot[slot] == layer * 8 + expert and cache.resident(layer, expert)
        residency = cache.residency
        resident = residency.slot_of_key[residency.slot_of_key >= 0]
        assert not set(resident.tolist()) & cache.withheld and len(set(resident.tolist())) == len(resident)
        assert len(resident) + residency.free_count.sum() + len(cache.withheld) == 12
    cache.withhold([])
    before = set(cache.residency.slot_of_key[cache.residency.slot_of_key >= 0].tolist())
    assert residency.free_count.sum() == 12 - len(before), "all are in use again"
