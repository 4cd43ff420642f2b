"""The measures and the table, at values known by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from swapless.errors import CheckpointMissingError, TraceMismatchError, UsageError
from swapless.oracle.compare import read_result, recovered, rows_of
from swapless.oracle.evaluate import evaluate, held_out, routing_figures, seam_losses, trace_of
from tests.oracle.conftest import END, build

pytestmark = pytest.mark.slow


def streams(tokens: int = 400) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.integers(low, low + 30, tokens).astype(np.int32) for name, low in (("a", 3), ("b", 33), ("c", 63))}


def test_joined_texts_change_domain_at_their_seams():
    data = held_out(streams(), window_tokens=60, end=END, windows=3, joined=7)
    assert {name: ids.shape for name, ids in data.domains.items()} == dict.fromkeys("abc", (3, 61))
    low = {"a": 3, "b": 33, "c": 63}
    for ids, seams, parts in zip(data.joined, data.seams, data.parts, strict=True):
        assert sorted(parts) == ["a", "b", "c"]
        for piece, part in zip(np.split(ids, seams), parts, strict=True):
            assert len(piece) >= 10 and (piece >= low[part]).all() and (piece < low[part] + 30).all()
    again = held_out(streams(), window_tokens=60, end=END, windows=3, joined=7)
    assert (again.joined == data.joined).all()


def test_too_little_text_is_refused():
    with pytest.raises(UsageError, match="under 401 tokens"):
        held_out(streams(), window_tokens=400, end=END)


def test_loss_behind_a_seam():
    losses = np.zeros((1, 100))
    losses[0, 29] = 1.0  # predicts token 30, the first behind the seam
    found = seam_losses(losses, np.array([[30, 60]]))
    assert found == {"0-16": pytest.approx(1 / 32), "16-64": 0.0, "64-512": None}


def test_routing_figures_of_a_known_trace():
    model = build("switch")
    experts = np.zeros((2, 300, 3, 1), np.int16)
    experts[:, 150:, 1] = 4  # one change a window
    experts[:, ::2, 2] = 1  # a change every token
    found = routing_figures(trace_of(model, experts, ["a", "b"]), bytes_an_expert=10)
    assert found["changes_per_100"] == pytest.approx([0, 100 / 299, 100])
    assert found["experts_in_256"][0] == 1 and found["experts_in_256"][2] == 2 and found["experts_in_window"][1] == 2
    assert found["load_entropy"][0] == 0 and found["load_entropy"][1] == pytest.approx(1 / 3)
    one, *_, everything = found["lru"]
    assert one["experts_a_layer"] == 1 and one["bytes_a_token"] == pytest.approx((1 + 4 + 600) * 10 / 600, rel=0.01)
    assert everything["share"] == 1 and everything["misses_a_token"] == pytest.approx((1 + 2 + 2) / 600)


@pytest.mark.parametrize("router", ["oracle", "dense"])
def test_a_model_is_measured(router):
    model = build(router) if router == "oracle" else build("dense", moe_blocks=[])
    data = held_out(streams(), window_tokens=60, end=END, windows=2, joined=3)
    found = evaluate(model, data, prompt_tokens=8, new_tokens=10)
    json.dumps(found)
    assert found["held_out_loss"] == pytest.approx(np.mean(list(found["held_out_losses"].values())))
    assert 3 < found["held_out_loss"] < 12
    if router == "oracle":
        assert {"routing", "routing_joined", "routing_generated", "strip"} <= set(found)
        assert np.shape(found["strip"]["experts"]) == (3, 60)


def result(name: str, loss: float, *, router: str | None = None, seed: int = 0, **shape) -> dict:
    return {
        "name": name,
        "recipe": {"router": router or name, "seed": seed},
        "shape": {"num_experts": 8, "moe_blocks": [1, 2, 3]} | shape,
        "tokens": 100,
        "figures": {"held_out_loss": loss, "joined_loss": loss, "joined_loss_after_seam": {"0-16": loss}},
    }


def test_rows_put_seeds_together():
    rows = rows_of(
        [result("switch", 2.0), result("dense", 2.2), result("oracle", 2.1), result("oracle-1", 2.14, router="oracle", seed=1)]
    )
    assert [row["seeds"] for row in rows] == [1, 1, 2]
    assert rows[2]["held_out_loss"] == pytest.approx(2.12) and rows[2]["standard_error"] == pytest.approx(0.02)
    assert recovered(rows) == {"switch": 1.0, "dense": 0.0, "oracle": pytest.approx(0.4)}
    assert recovered(rows[1:]) == {}


def test_models_of_different_shapes_are_not_compared():
    with pytest.raises(TraceMismatchError, match="num_experts=4"):
        rows_of([result("oracle", 1.0), result("switch", 1.0, num_experts=4)])
    with pytest.raises(TraceMismatchError, match="same number of tokens"):
        rows_of([result("oracle", 1.0), result("switch", 1.0) | {"tokens": 7}])


def test_results_that_are_none(tmp_path):
    with pytest.raises(CheckpointMissingError):
        read_result(tmp_path)
    for wrong in ("{", "[]", '{"name": 1}'):
        (tmp_path / "result.json").write_text(wrong)
        with pytest.raises(UsageError, match="no result"):
            read_result(tmp_path)
