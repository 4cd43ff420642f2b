"""What a caller may hand to a model of the family: masks and caches of another shape are refused before any scan walks them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from swapless.errors import UsageError
from swapless.oracle import OracleCache
from swapless.oracle.config import OracleMoeConfig
from swapless.oracle.groups import extend_groups, group_ids
from swapless.oracle.state import follow
from swapless.oracle.theme import mean_of_slots
from tests.oracle.conftest import build, text


@pytest.mark.parametrize("shape", [(0, 0, 0), (1, 0, 0), (1, 1, 1), (2, 1, 1)])
def test_groups_of_the_shortest_sequences(shape):
    assert group_ids(np.zeros(shape), 0.5).tolist() == [[0] * shape[1]] * shape[0]


@pytest.mark.parametrize("scores", [np.zeros((1, 2, 2), np.int64), np.zeros((1, 2, 2), np.float16), np.zeros((1, 2, 3))])
def test_scores_of_another_type_or_shape_are_refused(scores):
    with pytest.raises(UsageError):
        group_ids(scores, 0.5)


@pytest.mark.parametrize("mask", [(2, 5), (1, 6), (2, 7), (2, 3)])
def test_a_mask_of_another_shape_is_refused(mask):
    ids = text(0, 6, rows=2)
    with pytest.raises(UsageError, match="wrong shape"):
        follow(ids, torch.ones(mask, dtype=torch.bool), None, 0, None)
    assert follow(ids, torch.ones((2, 6), dtype=torch.bool), None, 0, None)[0].number.shape == (2, 6)


def test_a_state_of_another_batch_is_refused():
    documents, state = follow(text(0, 6, rows=2), torch.ones((2, 6), dtype=torch.bool), None, 0, None)
    with pytest.raises(UsageError, match="documents so far"):
        follow(text(0, 6), torch.ones((1, 6), dtype=torch.bool), None, 6, state)
    limit = np.full((2, 6), 0.5)
    for scores, known in (
        (np.zeros((2, 6, 5), np.float32), {}),
        (np.zeros((1, 6, 6), np.float32), {}),
        (np.zeros((2, 6, 6), np.float32), {"groups": torch.zeros(1, dtype=torch.int64)}),
    ):
        with pytest.raises(UsageError):
            extend_groups(scores, documents, limit, 0.9, known)
    with pytest.raises(UsageError, match="slot"):
        mean_of_slots(torch.zeros(2, 6, 4), np.zeros((2, 5), np.int64), {}, "mean")


@pytest.mark.slow
def test_a_cache_of_a_model_with_more_experts_is_refused():
    model = build("theme-gate")
    cache = OracleCache(model.config)
    with torch.no_grad():
        model(text(0, 6), past_key_values=cache)
        for state in cache.routers:
            state["chosen"] += 1000
        with pytest.raises(UsageError, match="out of range"):
            model(text(1, 1), past_key_values=cache)


def test_a_twin_is_loaded_and_used_at_all_its_positions(tmp_path):
    """Learned positions end with the context: nothing that is tried out before goes beyond it."""
    import swapless
    from swapless.oracle import OracleMoeForCausalLM, of_size

    config = of_size("tiny", router="switch", vocab_size=96, max_position_embeddings=48)
    OracleMoeForCausalLM(config).save_pretrained(tmp_path)
    with swapless.load(tmp_path, resident=0.5) as model:
        assert model.swapless.budget.context_tokens == 48
        assert model.generate(torch.ones((1, 40), dtype=torch.long), max_new_tokens=8, min_new_tokens=8).shape == (1, 48)


@pytest.mark.parametrize("name", ["layer_norm_eps", "soft_tokens", "change_budget", "memory_tokens"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_settings_that_are_no_numbers_are_refused(name, value):
    with pytest.raises(UsageError, match=name):
        OracleMoeConfig(**{name: value})
