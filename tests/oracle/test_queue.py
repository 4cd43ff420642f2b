"""The queue of the benchmark: what waits for what, and who wins."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from benchmarks.oracle import GUARDS, RATES, ROUTERS, Queue
from swapless.oracle.recipe import Recipe


def finish(out: Path, name: str, loss: float, changes: float = 5.0, experts: float = 4.0, joined: float = 4.0) -> None:
    (out / name).mkdir(parents=True)
    rates = {"changes_per_100": [changes] * 3, "experts_in_window": [experts] * 3}
    figures = {
        "held_out_loss": loss,
        "joined_loss": joined,
        "routing": rates,
        "routing_generated": rates,
        "routing_joined": rates,
    }
    (out / name / "result.json").write_text(json.dumps({"figures": figures}))


def test_a_queue_goes_from_rates_to_twins_to_seeds(tmp_path):
    queue = Queue(tmp_path, Recipe(steps=400, warmup_steps=40), seeds=2)
    runs = dict(queue.runs())
    assert list(runs)[:6] == [f"tune-{router}-{rate:g}" for rate in RATES for router in ("dense", "switch")]
    assert runs["tune-switch-0.02"].steps == 400 and runs["theme-gate"] is None and runs["winner-seed1"] is None
    for router, best in (("dense", RATES[2]), ("switch", RATES[0])):
        for rate in RATES:
            finish(tmp_path, f"tune-{router}-{rate:g}", 3.0 if rate == best else 3.5)
    runs = dict(queue.runs())
    assert runs["dense"].peak_lr == RATES[2] and {runs[name].peak_lr for name in ROUTERS if name != "dense"} == {RATES[0]}
    assert len({runs[name].warmup_key for name in ROUTERS if name not in ("dense", "oracle-switch-warmup")}) == 1
    for name, loss, changes, experts, joined in (
        ("switch", 2.0, 70, 8, 2.0),
        ("oracle", 2.1, 4, 4, 3.0),
        ("theme-gate", 2.08, 8, 4, 3.3),
        ("theme-gate-slow", 2.03, 8, 4, 3.6),
        ("soft-theme", 2.01, 3, 1.5, 3.0),
        ("switch-budget", 2.02, 10.5, 8, 3.0),
    ):
        finish(tmp_path, name, loss, changes, experts, joined)
    assert queue.winner() is None, "the guards are not known yet"
    for name in GUARDS:
        finish(tmp_path, name, 2.05, 1, 4, 3.5)
    assert queue.winner() == "theme-gate", "others lose to a guard on joined texts, keep to few experts, or change too many"
    runs = dict(queue.runs())
    assert runs["theme-gate-seed1"].seed == 1 and runs["theme-gate-seed1"].router == "theme-gate"


def test_every_recipe_of_the_queue_makes_a_model():
    queue = Queue(Path("nowhere"), Recipe(), seeds=1)
    for name in ROUTERS:
        recipe = queue.recipe(name)
        assert recipe.config().router == recipe.router and recipe.warmup_config().router in ("dense", "switch")


def test_a_tuned_run_is_not_trained_twice(tmp_path):
    queue = Queue(tmp_path, Recipe(steps=400, warmup_steps=40), seeds=1)
    recipe = queue.recipe("dense", peak_lr=RATES[1])
    finish(tmp_path, "tune-dense-0.02", 3.0)
    file = tmp_path / "tune-dense-0.02" / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"name": "tune-dense-0.02", "recipe": asdict(recipe)}))
    assert queue.take_over("switch", queue.recipe("switch", peak_lr=RATES[1])) is None
    taken = queue.take_over("dense", recipe)
    assert taken["name"] == "dense" and taken["figures"]["held_out_loss"] == 3.0
