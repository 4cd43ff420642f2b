"""Kernels against the slow twins on random traces: ties, short documents, absent experts, unused places."""

from __future__ import annotations

import numpy as np
import pytest

from swapless.cache.curves import POLICIES, hit_rate_curves
from swapless.locality import sch_lookahead, sch_static, srp
from swapless.testing import random_trace
from tests.locality.twins import all_experts, simulate, srp_by_search, static_by_sorting

SEEDS = [pytest.param(seed, marks=() if seed < 36 else pytest.mark.slow) for seed in range(120)]


def trace_of(seed):
    rng = np.random.default_rng(seed)
    experts = int(rng.integers(1, 9))
    return random_trace(
        rng,
        num_moe_layers=int(rng.integers(1, 4)),
        num_experts=experts,
        top_k=int(rng.integers(1, min(4, experts) + 1)),
        lengths=tuple(int(n) for n in rng.integers(1, 16, size=rng.integers(1, 5))),
        inertia=float(rng.choice([0.0, 0.6, 0.95])),
        skew=float(rng.choice([0.0, 1.0, 4.0])),
        missing=float(rng.choice([0.0, 0.0, 0.25])),
    )


def levels(trace):
    return [("moe_layer", layer) for layer in range(trace.num_moe_layers)] + [("model", None)]


def same(ours, theirs):
    assert (np.isnan(ours) and np.isnan(theirs)) or ours == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_srp_is_the_best_threshold_found_by_search(seed):
    trace = trace_of(seed)
    segments = [1, 2, 3, 4, 7, 16]
    for segment, result in zip(segments, srp(trace, segments)):
        whole = [((), None, result.model)]
        whole += [((layer,), layer, result.moe_layer) for layer in range(trace.num_moe_layers)]
        whole += [((0, e), (0, e), result.expert) for e in range(trace.num_experts)]
        for place, which, ours in whole:
            experts = [which] if isinstance(which, tuple) else all_experts(trace, which)
            value, relative, threshold = srp_by_search(trace, segment, experts)
            assert ours.value[place] == pytest.approx(float(value), abs=1e-14)
            assert ours.relative_size[place] == pytest.approx(float(relative), abs=1e-12)
            assert ours.threshold[place] == threshold


@pytest.mark.parametrize("seed", SEEDS)
def test_sch_lookahead_is_the_set_simulation(seed):
    trace, rng = trace_of(seed), np.random.default_rng(seed + 1000)
    for level, layer in levels(trace):
        for curves in sch_lookahead(trace, [1, 2, 3, 5, 40], level=level):
            for cold in ("free", "miss"):
                rates = curves.rate(cold)[layer or 0]
                for capacity in {1, len(rates), int(rng.integers(1, len(rates) + 1)), int(rng.integers(1, len(rates) + 1))}:
                    twin = simulate(trace, capacity, layer, "lookahead", segment=curves.segment_tokens, cold=cold)
                    same(rates[capacity - 1], twin)


@pytest.mark.parametrize("seed", SEEDS)
def test_sch_static_is_the_sorted_windows(seed):
    trace = trace_of(seed)
    for level, layer in levels(trace):
        for curves in sch_static(trace, [1, 3, 4, 16], level=level):
            rates = curves.rate()[layer or 0]
            for capacity in {1, min(2, len(rates)), len(rates)}:
                same(rates[capacity - 1], static_by_sorting(trace, curves.segment_tokens, capacity, layer))


@pytest.mark.parametrize("requests", ["snapshot", "single", "token"])
@pytest.mark.parametrize("seed", SEEDS)
def test_curves_are_the_set_simulation(seed, requests):
    trace, rng, kept = trace_of(seed), np.random.default_rng(seed + 2000), seed % 3 == 0
    for level, layer in levels(trace):
        for policy, curves in zip(POLICIES, hit_rate_curves(trace, level=level, requests=requests, kept=kept)):
            assert curves.variant == policy
            least = trace.top_k if requests == "token" else 1
            width = curves.repeated_hits.shape[-1]
            for capacity in {least, width, int(rng.integers(least, width + 1))}:
                for cold in ("free", "miss"):
                    twin = simulate(trace, capacity, layer, policy, cold=cold, requests=requests, kept=kept)
                    same(curves.rate(cold)[layer or 0][capacity - 1], twin)
