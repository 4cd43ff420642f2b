"""Each compiled scan equals its slow twin, in one call and in pieces."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swapless.errors import UsageError
from swapless.oracle._kernels import choose, top_mass
from swapless.oracle.groups import extend_groups, group_ids, largest_threshold
from swapless.oracle.state import follow
from swapless.oracle.theme import mean_of_slots
from tests.oracle.twins import choose_twin, documents_twin, groups_twin, mean_twin, top_mass_twin

SEEDS = st.integers(0, 2**32 - 1)


def attention(rng: np.random.Generator, tokens: int, sharpness: float = 2.0) -> np.ndarray:
    logits = rng.normal(size=(tokens, tokens)) * sharpness
    logits[np.triu_indices(tokens, 1)] = -np.inf
    share = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (share / share.sum(axis=1, keepdims=True)).astype(np.float32)


@given(SEEDS, st.integers(1, 24), st.sampled_from((0.5, 0.9, 1.0)), st.booleans(), st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_groups_equal_their_twin(seed, tokens, fraction, relative, sink):
    scores = attention(np.random.default_rng(seed), tokens)
    threshold = 0.5 if relative else 0.05
    fast = group_ids(scores[None], threshold, relative=relative, fraction=fraction, sink=sink)[0]
    assert fast.tolist() == groups_twin(scores, threshold, relative=relative, fraction=fraction, sink=sink)


@given(SEEDS, st.integers(2, 20), st.data())
@settings(max_examples=40, deadline=None)
def test_groups_of_a_prefix_are_the_prefix_of_groups_and_calls_may_be_cut(seed, tokens, data):
    cut = data.draw(st.integers(1, tokens - 1))
    rng = np.random.default_rng(seed)
    scores = attention(rng, tokens)[None]
    whole = group_ids(scores, 0.5)
    assert group_ids(scores[:, :cut, :cut], 0.5).tolist() == whole[:, :cut].tolist()
    ids, valid = torch.full((1, tokens), 5), torch.ones((1, tokens), dtype=torch.bool)
    state, known, parts = {}, None, []
    for begin, end in ((0, cut), (cut, tokens)):
        documents, known = follow(ids[:, begin:end], valid[:, begin:end], None, begin, known)
        parts.append(extend_groups(scores[:, begin:end, :end].copy(), documents, 0.5 / documents.rank, 0.9, state))
    assert np.concatenate(parts, axis=1).tolist() == whole.tolist()


def test_the_clique_shatters_where_the_fraction_does_not():
    rng = np.random.default_rng(0)
    scores = attention(rng, 128, sharpness=0.7)[None]
    strict, loose = (group_ids(scores, 0.3, fraction=f).max() + 1 for f in (1.0, 0.8))
    assert loose < strict / 2


def test_wrong_scores_are_refused():
    with pytest.raises(UsageError, match="square"):
        group_ids(np.zeros((1, 3, 4), np.float32), 0.1)
    with pytest.raises(UsageError, match="share of members"):
        group_ids(np.zeros((1, 3, 3), np.float32), 0.1, fraction=0)


def test_the_largest_threshold_that_leaves_few_groups():
    counts = np.array([[1, 2, 1], [4, 5, 3], [9, 8, 9]])
    assert largest_threshold(counts, np.array([0.1, 0.2, 0.3]), 4) == 0.2
    assert largest_threshold(counts, np.array([0.1, 0.2, 0.3]), 0.5) == 0.1


@pytest.mark.slow
@given(SEEDS, st.integers(1, 12), st.sampled_from((1.0, 0.8)))
@settings(max_examples=40, deadline=None)
def test_running_means_equal_their_twin_whole_and_token_by_token(seed, tokens, decay):
    rng = np.random.default_rng(seed)
    h = torch.from_numpy(rng.normal(size=(2, tokens, 3)).astype(np.float32))
    slot = rng.integers(-1, 3, (2, tokens))
    whole = mean_of_slots(h, slot, {}, "m", decay)
    for b in range(2):
        np.testing.assert_allclose(whole[b], mean_twin(h[b].numpy(), slot[b], decay), atol=1e-5)
    state = {}
    steps = [mean_of_slots(h[:, n : n + 1], slot[:, n : n + 1], state, "m", decay) for n in range(tokens)]
    assert torch.equal(torch.cat(steps, dim=1), whole)


@pytest.mark.slow
def test_the_gradient_of_running_means():
    rng = np.random.default_rng(3)
    h = torch.from_numpy(rng.normal(size=(2, 7, 3)).astype(np.float32)).requires_grad_()
    slot = rng.integers(-1, 3, (2, 7))
    pull = torch.from_numpy(rng.normal(size=(2, 7, 3)).astype(np.float32))
    (mean_of_slots(h, slot, {}, "m", 0.8) * pull).sum().backward()
    step = 1e-2
    for place in np.ndindex(2, 7, 3):
        moved = h.detach().clone()
        moved[place] += step
        ahead = sum(float((torch.from_numpy(mean_twin(moved[b].numpy(), slot[b], 0.8)) * pull[b]).sum()) for b in range(2))
        moved[place] -= 2 * step
        behind = sum(float((torch.from_numpy(mean_twin(moved[b].numpy(), slot[b], 0.8)) * pull[b]).sum()) for b in range(2))
        assert h.grad[place].item() == pytest.approx((ahead - behind) / (2 * step), abs=1e-3)


@given(SEEDS, st.integers(1, 20), st.sampled_from((0.0, 0.7)), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_sticky_choices_equal_their_twin(seed, tokens, stay, top_k):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(1, tokens, 5)).astype(np.float32)
    restart = rng.choice([-1, 0, 0, 0, 1], (1, tokens))
    ids, previous = np.empty((1, tokens, top_k), np.int64), np.full((1, top_k), -1)
    choose(scores, restart, stay, previous, ids)
    assert ids[0].tolist() == choose_twin(scores[0].astype(float), restart[0], stay, top_k)


@given(SEEDS, st.integers(1, 20), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_top_mass_equals_its_twin(seed, tokens, low):
    scores = attention(np.random.default_rng(seed), tokens)[None]
    fast = scores.copy()
    start = np.minimum(np.full((1, tokens), low), np.arange(tokens))
    top_mass(fast, start, 0, 0.75)
    for i in range(tokens):
        np.testing.assert_allclose(fast[0, i], top_mass_twin(scores[0, i], start[0, i], i, 0.75), atol=2e-5)


@given(SEEDS, st.integers(1, 20), st.integers(0, 6))
@settings(max_examples=40, deadline=None)
def test_documents_equal_their_twin_with_padding_on_the_left(seed, tokens, padding):
    rng = np.random.default_rng(seed)
    ids = torch.from_numpy(rng.integers(0, 4, (1, tokens)))
    valid = torch.arange(tokens)[None] >= padding
    documents, _ = follow(ids, valid, 2, 0, None)
    found = list(zip(documents.number[0].tolist(), documents.start[0].tolist(), documents.rank[0].tolist(), strict=True))
    assert found == documents_twin(ids[0].tolist(), valid[0].tolist(), 2)
