"""Reuse, balance, specialization, chance and verdict against plain definitions and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from swapless.cache.curves import hit_rate_curves
from swapless.errors import UnknownNameError, UsageError
from swapless.locality import (
    balance,
    domain_specialization,
    floor_srp,
    reuse,
    sch_lookahead,
    sch_static,
    shuffled_trace,
    srp,
    uniform_srp,
    uniform_trace,
    vocabulary_specialization,
)
from swapless.locality.chance import uniform_working_set
from swapless.locality.verdict import judge, knee_of
from swapless.testing import random_trace, traces
from swapless.trace import Trace, TraceFile, TraceHeader, write_trace
from tests.locality.twins import document_tokens

SPEC_TABLE = {
    (1, 4): (40.0, 56.5, 45.2, 40.9, 40.0),
    (1, 5): (33.3, 51.3, 40.0, 34.9, 33.5),
    (1, 8): (22.2, 46.4, 32.1, 25.3, 22.9),
    (3, 32): (17.1, 44.7, 28.1, 21.0, 18.3),
    (1, 15): (12.5, 43.3, 24.1, 17.1, 14.0),
    (1, 16): (11.8, 43.1, 23.7, 16.5, 13.4),
    (1, 64): (3.1, 40.8, 16.1, 8.5, 5.3),
    (1, 128): (1.6, 40.4, 12.4, 6.3, 3.7),
}


@pytest.mark.parametrize(("ratio", "figures"), SPEC_TABLE.items())
def test_chance_is_the_published_table(ratio, figures):
    top_k, experts = ratio
    ours = [floor_srp(experts, top_k), *(float(uniform_srp(m, experts, top_k).value) for m in (4, 16, 64, 256))]
    assert [100 * value for value in ours] == pytest.approx(figures, abs=0.051)


def test_a_random_trace_scores_chance():
    header = TraceHeader(model_id=None, num_experts=16, top_k=4, moe_blocks=(0, 1))
    trace = uniform_trace(header, np.full(8, 500), rng=np.random.default_rng(0))
    for result in srp(trace, [1, 4, 16, 64]):
        expected = uniform_srp(result.segment_tokens, 16, 4)
        assert float(result.model.value) == pytest.approx(float(expected.value), abs=0.01)
        assert np.allclose(result.expert.value, expected.value, atol=0.04)
    assert reuse(trace).overlap == pytest.approx(0.25, abs=0.01)
    assert reuse(trace, 4).working_set == pytest.approx(uniform_working_set(4, 16, 4), abs=0.05)
    curve = hit_rate_curves(trace, ["lru"])[0].rate("miss")[0]
    assert curve[7] == pytest.approx(8 / 16, abs=0.02)
    mixed = shuffled_trace(trace, rng=np.random.default_rng(1))
    assert np.array_equal(np.bincount(mixed.expert_ids.ravel()), np.bincount(trace.expert_ids.ravel()))


def test_srp_of_one_token_is_perfect_and_a_silent_expert_scores_zero():
    header = TraceHeader(model_id=None, num_experts=4, top_k=1, moe_blocks=(0,))
    trace = Trace.from_arrays(header, expert_ids=[[[0]], [[1]], [[0]], [[-1]]])
    one, long = srp(trace, [1, 9])
    assert float(one.model.value) == 1.0
    assert (one.expert.value[0, 2], one.expert.relative_size[0, 2]) == (0, 0)
    assert long.windows == 0
    assert (float(long.model.value), np.isnan(long.model.activation)) == (0.0, True)
    assert np.isnan(sch_static(trace, 9)[0].rate()).all()


def test_documented_regression_figures_on_the_sample():
    """Literals of the shipped sample, so that no figure drifts unseen."""
    from pathlib import Path

    from swapless.trace import read_trace

    trace = read_trace(Path(__file__).resolve().parents[1] / "data" / "gpt-oss-20b.sample.parquet")
    result = srp(trace, 16)[0]
    ahead = sch_lookahead(trace, 16)[0].rate()[:, 7].mean()
    curves = {c.variant: c.rate("miss")[:, 7].mean() for c in hit_rate_curves(trace)}
    figures = [float(result.model.value), float(result.model.relative_size), ahead, *curves.values()]
    assert figures == pytest.approx(LITERALS, abs=1e-12)


LITERALS = [
    0.5342091461733991,
    1.2488292011019284,
    0.7497751798561151,
    0.6348471223021582,
    0.6201438848920863,
    0.7677308153477217,
]


@settings(max_examples=60, deadline=None)
@given(traces())
def test_reuse_and_balance_by_counting(trace):
    result, even = reuse(trace, [1, 3]), balance(trace, [1, 3])
    for layer in range(trace.num_moe_layers):
        shared = could = uses = 0
        gaps, windows, spreads, entropies = {}, [], [], []
        load = np.zeros(trace.num_experts)
        for tokens in document_tokens(trace, layer):
            for i, token in enumerate(tokens):
                uses += len(token)
                shared += len(set(token) & set(tokens[i - 1])) if i else 0
                could += len(token) if i else 0
                for at, expert in token:
                    load[expert] += 1
                    before = [i - b for b in range(i) if (at, expert) in tokens[b]]
                    if before:
                        gaps[min(before)] = gaps.get(min(before), 0) + 1
            for start in range(len(tokens) - 2):
                part = [expert for token in tokens[start : start + 3] for _, expert in token]
                windows.append(len(set(part)))
                counts = np.bincount(part, minlength=trace.num_experts) if part else np.zeros(trace.num_experts)
                if part:
                    spreads.append(counts.std() / counts.mean())
                    share = counts[counts > 0] / counts.sum()
                    entropies.append(-(share * np.log(share)).sum() / np.log(max(trace.num_experts, 2)))
        assert (result.shared[layer], result.could_share[layer], result.uses[layer]) == (shared, could, uses)
        assert {gap + 1: n for gap, n in enumerate(result.distance[layer].tolist()) if n} == gaps
        close = sum(n for gap, n in gaps.items() if gap <= 3)
        assert result.within[layer, 1] == pytest.approx(close / uses if uses else np.nan, nan_ok=True)
        assert result.working_set[layer, 1] == pytest.approx(np.mean(windows) if windows else np.nan, nan_ok=True)
        assert even.load[layer].tolist() == load.tolist()
        assert even.window_variation[layer, 1] == pytest.approx(np.mean(spreads) if spreads else np.nan, nan_ok=True, abs=1e-6)
        if trace.num_experts > 1:
            expected = np.mean(entropies) if entropies else np.nan
            assert even.window_entropy[layer, 1] == pytest.approx(expected, nan_ok=True, abs=1e-9)
    activation = np.nan_to_num(srp(trace, 3)[0].expert.activation)
    assert np.allclose(np.nan_to_num(even.activation[:, :, 1]), activation)


def test_entropy_and_variation_of_known_loads():
    header = TraceHeader(model_id=None, num_experts=4, top_k=1, moe_blocks=(0, 1))
    ids = [[[t % 4], [0]] for t in range(8)]
    even = balance(Trace.from_arrays(header, expert_ids=ids), [4])
    assert even.entropy == pytest.approx([1, 0])
    assert even.variation == pytest.approx([0, np.sqrt(3)])
    assert even.window_entropy[:, 0] == pytest.approx([1, 0])
    assert even.deviation[0] == pytest.approx(np.std([0.25] * 4 + [1, 0, 0, 0], ddof=1))


def test_domain_specialization_by_hand():
    header = TraceHeader(model_id=None, num_experts=3, top_k=1, moe_blocks=(0,))
    ids = [[[e]] for e in (0, 0, 0, 1, 0, 1, 1, 1)]
    trace = Trace.from_arrays(header, expert_ids=ids, document=[0] * 4 + [1] * 4, domain=["a"] * 4 + ["b"] * 4)
    result = domain_specialization(trace, 1)
    assert result.activation[:, 0].tolist() == [[0.75, 0.25, 0], [0.25, 0.75, 0]]
    assert result.expert[0, :2] == pytest.approx(np.std([0.75, 0.25], ddof=1) / 0.5)
    assert np.isnan(result.expert[0, 2])
    twin = srp(trace.rows(trace.domain == 0), 3)[0].expert.activation
    assert domain_specialization(trace, 3).activation[0] == pytest.approx(twin)


def test_vocabulary_specialization_by_hand():
    header = TraceHeader(model_id=None, num_experts=3, top_k=2, moe_blocks=(0,), expert_order="descending gate weight")
    ids = [[[0, 1]]] * 15 + [[[1, 0]]] * 5 + [[[2, 0]]] * 20 + [[[2, 1]]] * 19
    words = ["x"] * 20 + ["y"] * 20 + ["rare"] * 19
    trace = Trace.from_arrays(header, expert_ids=ids, token=words)
    result = vocabulary_specialization(trace)
    assert result.vocabulary == 2
    assert result.expert[0].tolist()[::2] == [0.75, 1.0]
    assert np.isnan(result.expert[0, 1])
    weighted = Trace.from_arrays(header, expert_ids=ids, token=words, gate_weights=np.tile([0.1, 0.9], (59, 1, 1)))
    assert vocabulary_specialization(weighted).expert[0] == pytest.approx([1.0, 0.75, np.nan], nan_ok=True)
    after = vocabulary_specialization(trace, "out")
    assert after.vocabulary == 1
    plain = TraceHeader(model_id=None, num_experts=3, top_k=2, moe_blocks=(0,))
    with pytest.raises(UsageError, match="which of a token's experts"):
        vocabulary_specialization(Trace.from_arrays(plain, expert_ids=ids, token=words))
    with pytest.raises(UsageError, match="no tokens"):
        vocabulary_specialization(Trace.from_arrays(header, expert_ids=ids))


def test_a_file_measures_like_the_trace(tmp_path):
    trace = random_trace(np.random.default_rng(5), lengths=(9, 30, 1, 12), domains=("a", "b"))
    write_trace(tmp_path / "t.parquet", trace, row_group_tokens=8)
    with TraceFile(tmp_path / "t.parquet") as file:
        ours, whole = srp(file, [3, 16], replicates=20), srp(trace, [3, 16], replicates=20)
        for a, b in zip(ours, whole):
            assert np.array_equal(a.expert.value, b.expert.value)
            assert a.model_interval == b.model_interval
            assert a.domains == b.domains
        assert np.array_equal(sch_lookahead(file, 4)[0].rate(), sch_lookahead(trace, 4)[0].rate())
        assert np.array_equal(hit_rate_curves(file, level="model")[1].rate(), hit_rate_curves(trace, level="model")[1].rate())
        assert np.array_equal(reuse(file, 4).working_set, reuse(trace, 4).working_set)
        assert balance(file, 4).window_entropy == pytest.approx(balance(trace, 4).window_entropy, rel=1e-12)


def test_domains_add_up_to_the_whole():
    trace = random_trace(np.random.default_rng(6), lengths=(9, 30, 8, 12), domains=("a", "b"))
    curves = sch_lookahead(trace, 4, marks=[2, 3])[0]
    assert curves.domains == ("a", "b")
    part = sch_lookahead(trace.rows(trace.domain == 1), 4)[0]
    assert np.array_equal(curves.rate("free", "b"), part.rate())
    assert np.array_equal(curves.document_hits[:, 0].sum(axis=0), curves.hits()[:, [1, 2]])
    result = srp(trace, 4)[0]
    assert result.domain_model.value[1] == srp(trace.rows(trace.domain == 1), 4)[0].model.value


def test_intervals_hold_the_value_and_need_two_documents():
    trace = random_trace(np.random.default_rng(7), lengths=(20,) * 30)
    result = srp(trace, 4, replicates=200)[0]
    low, high = result.model_interval
    assert low < result.model.value < high
    assert high - low < 0.2
    assert np.isnan(srp(trace.rows(trace.document == 0), 4, replicates=200)[0].model_interval.low)


def test_wrong_arguments():
    trace = random_trace(np.random.default_rng(8))
    for segments in (0, [], [4, 1.5], True):
        with pytest.raises(UsageError, match="Segment lengths"):
            srp(trace, segments)
    with pytest.raises(UnknownNameError, match="belady, lfu, lru"):
        hit_rate_curves(trace, ["lur"])
    with pytest.raises(UsageError, match="request model"):
        hit_rate_curves(trace, requests="all")
    with pytest.raises(UsageError, match="level"):
        hit_rate_curves(trace, level="block")
    with pytest.raises(UsageError, match="capacity"):
        sch_lookahead(trace, 4, marks=[9])


def test_the_verdict_follows_the_curve():
    capacity = np.arange(1, 17) / 16
    local = np.minimum(1, capacity**0.4)
    assert judge(local, local, capacity, top_k=2).suits == "suits"
    assert judge(capacity, local, capacity, top_k=2).suits == "does not suit"
    verdict = judge(capacity + 0.15 * (1 - capacity), local, capacity, top_k=2)
    assert verdict.suits == "suits in part"
    assert verdict.miss_factor == pytest.approx(0.85)
    assert "4 of 16" in verdict.sentence(16)
    assert knee_of(capacity, 2) == 2
    assert knee_of(np.array([0.5]), 1) == 1


def test_a_short_trace_gets_figures_and_no_judgement():
    local = np.minimum(1, (np.arange(1, 65) / 64) ** 0.4)
    for tokens, top_k, few in ((20, 6, True), (106, 6, True), (107, 6, False), (99, 64, True), (100, 64, False)):
        verdict = judge(local, local, local * 0.5, top_k=top_k, tokens=tokens)
        assert (verdict.suits == "too few tokens") == few, (tokens, top_k)
        assert verdict.sentence(64).startswith(f"{tokens} tokens are too few" if few else "This model ")
        assert "LRU serves" in verdict.sentence(64)
