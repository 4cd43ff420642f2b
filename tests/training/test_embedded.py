"""The shipped folder: small enough for a repository, complete, and described by a card that names every domain."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

FOLDER = Path(__file__).parents[2] / "src" / "swapless" / "embedded"


@pytest.fixture(scope="module")
def results():
    return json.loads((FOLDER / "results.json").read_text())


def test_the_folder_is_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) <= 12_000_000


def test_one_bfloat16_tensor_an_expert_in_one_shard():
    config = json.loads((FOLDER / "config.json").read_text())
    with safe_open(FOLDER / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
        assert all(weights.get_slice(name).get_dtype() == "BF16" for name in names)
    for block in range(config["num_hidden_layers"]):
        for expert in range(config["num_local_experts"]):
            for part in ("gate_proj", "up_proj", "down_proj"):
                assert f"model.layers.{block}.mlp.experts.{expert}.{part}.weight" in names


def test_the_card_names_every_domain_and_its_loss(results):
    card = (FOLDER / "MODEL_CARD.md").read_text()
    assert len(results["held_out"]) == 17
    for domain, loss in results["held_out"].items():
        assert f"| {domain} |" in card
        assert f"{loss['nats_per_token']:.3f}" in card
    assert "license: cc-by-sa-4.0" in card


def test_routing_is_balanced_and_local(results):
    assert min(results["routing"]["load_entropy_per_layer"]) >= 0.8
    assert results["routing"]["lru_lead"] >= 0.05


def test_continuations_stay_in_their_domain(results):
    assert min(results["continuations"]["accuracy"].values()) >= 0.8


def test_no_path_of_a_machine_in_any_text_file():
    for path in FOLDER.iterdir():
        if path.suffix in {".json", ".md", ".jinja"}:
            text = path.read_text()
            assert "/home/" not in text and "/work/" not in text, path.name
