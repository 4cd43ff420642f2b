"""``swapless predict`` as its users call it: train, measure, page, and every bad input with its own message."""

from __future__ import annotations

import csv
import json

import pytest

from swapless.predict.saved import load_predictor
from swapless.trace import Trace, TraceHeader, write_trace
from tests.predict.made import made_trace

TINY = ("--set", 'sizes={"width": 32, "hidden": 16, "step_hidden": 16, "window": 8, "heads": 2, "buckets": 64}')


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """A trace to learn from and one to measure on."""
    folder = tmp_path_factory.mktemp("traces")
    write_trace(folder / "train.parquet", made_trace())
    write_trace(folder / "test.parquet", made_trace(lengths=(21, 9), seed=5, domain=["a"] * 21 + ["b"] * 9))
    return folder


@pytest.fixture
def prior(traced, tmp_path, swapless):
    """A fitted token prior."""
    path = tmp_path / "prior"
    done = swapless("predict", "train", traced / "train.parquet", "--kind", "token_prior", "--out", path, "-q")
    assert done.exit_code == 0, done.stderr
    return path


@pytest.mark.slow
def test_train_and_measure_the_learned_one(traced, tmp_path, swapless):
    out, page = tmp_path / "learned", tmp_path / "page.html"
    arguments = ("predict", "train", traced / "train.parquet", "--out", out, "--epochs", 2, "--json", *TINY)
    done = swapless(*arguments, "--checkpoint", tmp_path / "c", "--seed", 3, "--threads", 1)
    assert done.exit_code == 0, done.stderr
    about = json.loads(done.stdout)
    assert about["predictor"] == "transformer" and about["epochs"] == 2 and about["file_bytes"] == out.stat().st_size
    assert (tmp_path / "c").exists()
    done = swapless("predict", "eval", out, traced / "test.parquet", "--lead", "1,3,token", "--json")
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)
    model = [row for row in rows if row["moe_layer"] is None and row["width"] == 2]
    assert [row["lead"] for row in model] == [1, 3, "token"]
    for row in rows:
        assert {"predictor", "lead", "moe_layer", "width", "recall", "precision", "tokens"} <= row.keys()
    assert {row["moe_layer"] for row in rows} == {None, 0, 1, 2, 3}
    layers = [row["recall"] for row in rows if row["moe_layer"] is not None and row["width"] == 2 and row["lead"] == 1]
    assert sum(layers) / 4 == pytest.approx(model[0]["recall"])
    assert [item["domain"] for item in model[0]["domains"]] == ["a", "b"]
    assert model[0]["moe_beyond"]["all_zeros_accuracy"] == 0.75
    done = swapless("predict", "eval", out, traced / "test.parquet", "--html", page)
    assert done.exit_code == 0 and "calibration error" in done.stdout
    assert "Which experts come next" in page.read_text(encoding="utf-8")


def test_skipped_positions_are_left_out(traced, prior, swapless):
    arguments = ("predict", "eval", prior, traced / "test.parquet", "--lead", "token", "--widths", "1,5", "--json")
    rows = json.loads(swapless(*arguments, "--skip-positions", 10).stdout)
    assert {row["tokens"] for row in rows} == {11} and {row["width"] for row in rows} == {1, 2, 5}


def write_prompt(path, words, shift):
    """A prompt as MoE-Beyond's code writes it: 26 MoE layers from block 1 on, a Python list of six ids out of 64."""
    columns = ["Layer ID", "Batch Number", "Token", "Activated Expert IDs"]
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(columns)
        for layer in range(1, 27):
            for word in words:
                ids = [(shift + layer + 7 * (len(word) + step)) % 64 for step in (4, 0, 2, 5, 1, 3)]
                rows.writerow([layer, 0, word, ids])


def test_a_folder_of_csv_files_is_measured_directly(tmp_path, swapless):
    learned, measured = tmp_path / "train", tmp_path / "test"
    words = ["<\uff5cbegin\u2581of\u2581sentence\uff5c>", "The", "\u0120cat", ",", '"', "\u0120sat", "\u010a", "\u0120\u4e94"]
    for folder, numbers in ((learned, (1, 2, 10)), (measured, (1, 11))):
        folder.mkdir()
        for number in numbers:
            write_prompt(folder / f"prompt_{number}.csv", words[: 3 + number], shift=3 if number == 11 else 0)
    out = tmp_path / "p"
    model = ("--model-id", "deepseek-ai/DeepSeek-V2-Lite-Chat")
    done = swapless("predict", "train", learned, "--kind", "token_prior", "--out", out, *model, "-q")
    assert done.exit_code == 0, done.stderr
    done = swapless("predict", "eval", out, measured, "--lead", "1,3,token", "--json")
    assert done.exit_code == 0, done.stderr
    assert done.stderr.count("names no model") == 1
    rows = json.loads(done.stdout)
    assert {row["moe_layer"] for row in rows} == {None, *range(26)} and {row["tokens"] for row in rows} == {4 + len(words)}
    whole = [row for row in rows if row["moe_layer"] is None and row["width"] == 6]
    assert [row["lead"] for row in whole] == [1, 3, "token"] and whole[0]["exact_set_rate"] < 1
    # One file alone: its tokens went where they went in training, those of prompt 11 did not.
    alone = json.loads(swapless("predict", "eval", out, measured / "prompt_1.csv", "--lead", "1", "--json").stdout)
    assert alone[0]["recall"] == 1 and 0 < whole[0]["recall"] < 1


def test_a_predictor_is_tried_on_another_model_where_that_is_asked_for(traced, prior, tmp_path, swapless):
    test, other = traced / "test.parquet", tmp_path / "other.parquet"
    write_trace(other, made_trace(lengths=(21, 9), seed=5, model_id="made/moe-chat"))
    refused = swapless("predict", "eval", prior, other)
    assert refused.exit_code == 1 and "--other-model" in refused.stderr
    found, own = (swapless("predict", "eval", prior, *rest, "--json") for rest in ((other, "--other-model"), (test,)))
    assert found.exit_code == 0 and "fitted for made/moe, and is tried on made/moe-chat" in found.stderr
    assert [row["recall"] for row in json.loads(found.stdout)] == [row["recall"] for row in json.loads(own.stdout)]
    write_trace(other, made_trace(experts=16, model_id="made/moe-chat"))
    refused = swapless("predict", "eval", prior, other, "--other-model")
    assert refused.exit_code == 1 and "other experts" in refused.stderr


def test_a_column_of_tokens_that_says_nothing_is_none(traced, prior, tmp_path, swapless):
    empty = tmp_path / "empty.parquet"
    for nothing in ([None] * 30, [""] * 30):
        write_trace(empty, made_trace(lengths=(21, 9), seed=5, token=nothing))
        for refused in (
            swapless("predict", "eval", prior, empty),
            swapless("predict", "train", empty, "--kind", "token_prior", "--out", tmp_path / "new"),
        ):
            assert refused.exit_code == 1 and "tokens" in refused.stderr, refused.stderr
    write_trace(empty, made_trace(lengths=(21, 9), seed=5, token=[None] * 30, token_id=[1] * 30))
    assert swapless("predict", "train", empty, "--kind", "token_prior", "--out", tmp_path / "new", "-q").exit_code == 0
    assert load_predictor(tmp_path / "new").fitted_.vocabulary == "token_id"


def test_numbers_of_rows_are_no_tokens(tmp_path, swapless):
    """MoE-Beyond's predictions lie in files like its traces, whose column Token counts the rows."""
    texts, numbered = tmp_path / "formatted", tmp_path / "predicted"
    for folder, words in ((texts, ["a", "b", "c"]), (numbered, [0, 1, 2])):
        folder.mkdir()
        write_prompt(folder / "prompt_1.csv", [str(word) for word in words], shift=0)
    path = numbered / "prompt_1.csv"
    path.write_text(path.read_text().replace("Token,", "Token(index),"))
    for kind, code in (("token_prior", 1), ("popularity", 0)):
        out = tmp_path / kind
        assert swapless("predict", "train", texts, "--kind", kind, "--out", out, "-q").exit_code == 0
        done = swapless("predict", "eval", out, numbered, "--lead", "1", "--json")
        assert done.exit_code == code and "numbers of rows" in done.stderr, done.stderr
    assert "reads tokens" in swapless("predict", "eval", tmp_path / "token_prior", numbered).stderr


def test_bad_input_is_said_in_one_message(traced, prior, tmp_path, swapless):
    test, train = traced / "test.parquet", traced / "train.parquet"
    bare = tmp_path / "bare.parquet"
    header = TraceHeader(model_id="made/moe", num_experts=8, top_k=2, moe_blocks=(0, 1, 2, 3))
    write_trace(bare, Trace.from_arrays(header, expert_ids=made_trace().expert_ids))
    other = tmp_path / "other.parquet"
    write_trace(other, made_trace(model_id="made/other"))
    (tmp_path / "junk").write_bytes(b"no predictor")
    out = ("--out", tmp_path / "new")
    cases = {
        ("eval", prior, other): (1, "fitted for another model"),
        ("eval", prior, bare): (1, "reads tokens"),
        ("eval", prior, test, "--lead", "5"): (2, "1 to 4 (L)"),
        ("eval", prior, test, "--lead", "soon"): (2, "or token"),
        ("eval", prior, test, "--widths", "9"): (2, "1 to 8 (E)"),
        ("eval", prior, test, "--skip-positions", "21"): (2, "No token is left"),
        ("eval", prior, tmp_path / "nowhere"): (1, "No such trace"),
        ("eval", tmp_path / "nowhere", test): (1, "No such predictor"),
        ("eval", tmp_path / "junk", test): (1, "Not a predictor's file"),
        ("eval", prior, test, "--html", tmp_path / "no" / "page.html"): (2, "does not exist"),
        ("eval", prior, test, "--json", "--html", tmp_path / "page.html"): (2, "exclude each other"),
        ("train", train, *out, "--documents", "100-200"): (2, "No token of the trace"),
        ("train", bare, *out): (1, "reads tokens, and the trace has neither"),
        ("train", train, *out, "--kind", "lineer"): (2, "Did you mean 'linear'"),
        ("train", train, *out, "--kind", "eam", "--set", "neighbours=0"): (2, "neighbours"),
        ("train", train, *out, "--kind", "eam", "--epochs", "2"): (2, "epochs"),
        ("train", train, *out, "--set", "dropout"): (2, "NAME=VALUE"),
        ("train", train, *out, "--set", "dropout=7"): (2, "dropout"),
        ("train", train, *out, "--epochs", "2", "--minutes", "3"): (2, "exclude each other"),
        ("train", train, "--out", tmp_path / "no" / "p"): (2, "does not exist"),
    }
    for arguments, (code, words) in cases.items():
        done = swapless("predict", *arguments)
        assert done.exit_code == code, (arguments, done.stderr)
        assert done.stdout == "" and done.stderr.startswith("Error: ") and "Traceback" not in done.stderr, arguments
        assert words in done.stderr, (arguments, done.stderr)
    assert not (tmp_path / "new").exists()
