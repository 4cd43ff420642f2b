"""Expected hit rates: from a trace exactly what the engine would do, else from a stored curve, and which is said."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from swapless.cache.replay import replay
from swapless.errors import TraceMismatchError, UnknownNameError
from swapless.plan.curves import nearest_curve, stored_curves
from swapless.plan.hits import CurveHits, TraceHits
from tests.cache.made import made_trace


def model(layers=3, experts=8, top_k=2):
    """What hits ask of an opened checkpoint: its shape."""
    moe_layers = [SimpleNamespace(num_experts=experts)] * layers
    return SimpleNamespace(layout=SimpleNamespace(moe_layers=moe_layers), experts_a_token=layers * top_k)


@pytest.fixture(scope="module")
def trace():
    return made_trace(tokens=400, scores=False)


def test_a_trace_gives_what_its_replay_gives(trace):
    found = TraceHits(trace, model(), "lru").of(12)
    expected = replay(trace, "lru", 4, warmup_tokens=40)
    assert found.hit_rate == expected.hit_rate
    assert found.misses.sum() == pytest.approx(1)
    assert found.misses @ np.arange(3) == pytest.approx(2 * (1 - expected.hit_rate))


def test_slots_that_do_not_divide_evenly_and_slots_below_one_token(trace):
    hits = TraceHits(trace, model(), "lru")
    rates = [hits.of(slots).hit_rate for slots in (2, 5, 6, 12, 13, 14, 15, 24)]
    assert rates == sorted(rates) and rates[0] < 0.1 and rates[-1] > 0.9


def test_the_source_names_the_trace_and_how_much_of_it(trace):
    assert "mine.parquet" in TraceHits(trace, model(), name="mine.parquet").source
    assert "400 of its 400 tokens" in TraceHits(trace, model()).source


@pytest.mark.parametrize("shape", [{"layers": 4}, {"experts": 16}, {"top_k": 1}])
def test_a_trace_of_another_model_is_refused(trace, shape):
    with pytest.raises(TraceMismatchError, match="in the checkpoint"):
        TraceHits(trace, model(**shape))


@pytest.mark.parametrize("curve", stored_curves(), ids=lambda curve: curve.model_id)
def test_stored_curves_are_whole(curve):
    assert curve.capacity_experts[0] == curve.top_k and curve.capacity_experts[-1] == curve.num_experts
    for rates in curve.hit_rate.values():
        assert len(rates) == len(curve.capacity_experts)
        assert list(rates) == sorted(rates) and rates[0] > 0 and rates[-1] == 1
    assert all(ours >= lru for ours, lru in zip(curve.hit_rate["next_use"], curve.hit_rate["lru"]))


def test_a_curve_meets_its_own_points_and_the_ends_of_other_models():
    curve = nearest_curve(64, 6)
    assert curve.rate("lru", 13, 64, 6) == curve.hit_rate["lru"][1]
    assert curve.rate("lru", 128, 128, 8) == 1.0
    assert curve.rate("lru", 8, 128, 8) == curve.hit_rate["lru"][0]
    assert curve.rate("lru", 4, 128, 8) == pytest.approx(curve.hit_rate["lru"][0] / 2)
    rates = [curve.rate("next_use", capacity, 128, 8) for capacity in range(1, 129)]
    assert rates == sorted(rates)


def test_the_nearest_curve_is_that_of_the_nearest_shape():
    assert nearest_curve(64, 8).num_experts == 64
    assert nearest_curve(128, 8).num_experts == 64
    assert nearest_curve(8, 2).num_experts == 32


def test_a_policy_without_a_curve_needs_a_trace():
    with pytest.raises(UnknownNameError, match="next_use"):
        CurveHits(model(), "arc")
    found = CurveHits(model(experts=64, top_k=6), "lru")
    assert found.of(3 * 64).hit_rate == 1.0 and "no trace" in found.source
