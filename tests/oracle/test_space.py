"""The oracle space: what it finds, that it is balanced, and that a gate can begin as the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from swapless.errors import UsageError
from swapless.oracle.space import LEAST_SHARE, MOST_SHARE, OracleSpace, fit_space
from tests.oracle.conftest import build


def blobs(sizes: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(len(sizes), 12)) * 4
    label = np.repeat(np.arange(len(sizes)), sizes)
    return centres[label] + rng.normal(size=(len(label), 12)) * 0.3, label


@pytest.mark.parametrize("centre", [False, True])
def test_regions_are_the_themes(centre):
    points, label = blobs([100] * 5)
    fitted = fit_space(points, num_experts=5, rank=4, centre=centre)
    space = OracleSpace(12, 4, 5)
    assert not space.fitted
    space.put(fitted)
    expert = space.scores(torch.from_numpy(points).float()[None])[0].argmax(dim=1).numpy()
    assert all(len(set(expert[label == theme])) == 1 for theme in range(5)) and len(set(expert)) == 5
    assert not fitted.bias.any() and fitted.shares.sum() == pytest.approx(1)


def test_a_crowded_region_pays():
    rng = np.random.default_rng(1)
    points = np.concatenate([rng.normal(size=(4000, 6)), rng.normal(size=(12, 6)) + 40 * np.eye(12, 6)])
    plain = fit_space(points, num_experts=8, rank=6, rounds=0)
    fair = fit_space(points, num_experts=8, rank=6)
    assert plain.shares.min() < LEAST_SHARE / 8
    assert fair.shares.min() >= LEAST_SHARE / 8 and fair.shares.max() <= MOST_SHARE / 8


def test_the_rank_may_exceed_what_the_points_span():
    points, _ = blobs([3, 3])
    assert fit_space(points, num_experts=2, rank=10).projection.shape == (12, 10)


def test_more_experts_than_themes():
    with pytest.raises(UsageError, match="3 themes, 4 experts"):
        fit_space(np.eye(3), num_experts=4, rank=2)


@pytest.mark.parametrize("centre", [False, True])
def test_a_gate_begins_as_the_oracle(centre):
    model = build("theme-gate", memory_tokens=8.0)
    points, _ = blobs([60] * 8)
    points = np.pad(points, ((0, 0), (0, 20)))
    fitted = fit_space(points, num_experts=8, rank=6, centre=centre)
    space, gate = OracleSpace(32, 6, 8), model.routers[0]
    space.put(fitted)
    gate.put(1.0, fitted)
    themes = torch.from_numpy(points).float()
    scores = torch.nn.functional.linear(torch.cat([themes, torch.randn_like(themes)], dim=1), gate.weight, gate.bias)
    assert torch.equal(scores.argmax(dim=1), space.scores(themes[None])[0].argmax(dim=1))
