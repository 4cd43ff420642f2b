"""``swapless oracle``: from a corpus to a trained, fitted, compared pair."""

from __future__ import annotations

import json

import pytest

from tests.oracle.corpus import MOE, RECIPE, SMALL, write_corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("twins")
    write_corpus(path / "corpus.parquet")
    (path / "recipe.json").write_text(json.dumps(RECIPE | {"changes": SMALL | MOE}))
    (path / "dense.json").write_text(json.dumps(RECIPE | {"changes": SMALL}))
    return path


@pytest.mark.slow
def test_train_fit_compare(swapless, folder):
    corpus = ("--corpus", folder / "corpus.parquet")
    for router in ("dense", "switch", "oracle"):
        recipe = folder / ("dense.json" if router == "dense" else "recipe.json")
        done = swapless("oracle", "train", folder / router, *corpus, "--router", router, "--recipe", recipe, "--threads", 1)
        assert done.exit_code == 0, done.output
        assert done.stdout.strip() == str(folder / router / "model")

    done = swapless("oracle", "fit", folder / "dense" / "model", *corpus, "--out", folder / "fitted", "--num-experts", 4,
                    "--windows", 24, "--json")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert [row["moe_layer"] for row in json.loads(done.stdout)] == [0, 1]

    runs = [folder / name for name in ("dense", "switch", "oracle")]
    done = swapless("oracle", "compare", *runs, *corpus, "--json")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert [row["name"] for row in rows] == ["dense", "switch", "oracle"]
    assert rows[0].get("routing_changes_per_100") is None
    assert all(0 < row["routing_changes_per_100"] <= 100 for row in rows[1:])
    done = swapless("oracle", "compare", *runs, "--html", folder / "page.html")
    assert done.exit_code == 0 and "changes/100" in done.stdout
    page = (folder / "page.html").read_text()
    assert page.count("<svg") == 2 and "block 1" in page and "<script" not in page


def test_bad_input(swapless, folder, tmp_path, checkpoint):
    corpus = ("--corpus", folder / "corpus.parquet")
    cases = [
        (("train", tmp_path / "x", *corpus, "--router", "orakle"), 2, "Did you mean 'oracle'"),
        (("train", tmp_path / "x", "--corpus", tmp_path / "none.parquet"), 2, "corpus cannot be read"),
        (("train", tmp_path / "x", *corpus, "--steps", 5, "--warmup-steps", 9), 2, "after the warm-up"),
        (("fit", tmp_path, *corpus, "--out", tmp_path / "y"), 1, "no trained model"),
        (("fit", checkpoint, *corpus, "--out", tmp_path / "y"), 2, "qwen3_moe"),
        (("compare", tmp_path), 1, "no result"),
    ]
    for arguments, code, words in cases:
        done = swapless("oracle", *arguments)
        assert (done.exit_code, words in done.stderr) == (code, True), (arguments, done.output)
        assert done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(
    "config", ["{", "[]", '{"model_type": 3}', '{"model_type": "oracle_moe", "num_experts": "many"}', "{}"]
)
def test_a_model_that_cannot_be_loaded_is_one_message(swapless, folder, tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    done = swapless("oracle", "fit", tmp_path, "--corpus", folder / "corpus.parquet", "--out", tmp_path / "y")
    assert done.exit_code in (1, 2) and str(tmp_path) in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_fitting_before_the_warm_up(swapless, folder, tmp_path):
    from transformers import AutoTokenizer

    from swapless import embedded
    from swapless.oracle import OracleMoeForCausalLM, of_size

    fresh = OracleMoeForCausalLM(of_size("tiny", router="dense", **SMALL))
    fresh.save_pretrained(tmp_path / "fresh")
    AutoTokenizer.from_pretrained(embedded.path()).save_pretrained(tmp_path / "fresh")
    done = swapless("oracle", "fit", tmp_path / "fresh", "--corpus", folder / "corpus.parquet", "--out", tmp_path / "y")
    assert done.exit_code == 2 and "after the warm-up" in done.stderr
