"""Help, ``info``, ``verify`` and ``demo``."""

from __future__ import annotations

import json

import pytest

from swapless import __version__
from swapless.cli.main import VERBS


def test_the_version(swapless):
    assert swapless("--version").stdout == f"swapless {__version__}\n"


def test_help_lists_the_verbs(swapless):
    for arguments in (("--help",), ()):
        shown = swapless(*arguments)
        assert all(verb in shown.output for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_explains_itself(swapless, verb):
    done = swapless(verb, "--help")
    assert done.exit_code == 0
    assert f"Usage: swapless {verb}" in done.stdout.replace("Usage: root", "Usage: swapless")


def test_an_unknown_verb_is_wrong_usage(swapless):
    done = swapless("rum")
    assert done.exit_code == 2 and "run" in done.stderr


def test_info_of_a_checkpoint(swapless, checkpoint):
    shown = json.loads(swapless("info", checkpoint, "--json").stdout)
    assert shown["token_cycle_bytes"] == shown["num_moe_layers"] * shown["top_k"] * shown["expert_bytes"]
    routed_bytes = shown["num_moe_layers"] * shown["num_experts"] * shown["expert_bytes"]
    assert routed_bytes + shown["non_expert_bytes"] == shown["total_bytes"]
    assert shown["smallest_budget_bytes"] > shown["non_expert_bytes"]
    text = swapless("info", checkpoint).stdout
    assert shown["family"] in text and "smallest useful budget" in text


def test_info_goes_by_content_and_not_by_name(swapless, checkpoint, tmp_path):
    from swapless.trace import write_trace

    trace = _small_trace()
    disguised = tmp_path / "checkpoint.bin"
    write_trace(disguised, trace)
    done = swapless("info", disguised, "--json")
    assert done.exit_code == 0, done.stderr
    assert "num_experts" in done.stdout


def _small_trace():
    import numpy as np

    from swapless.trace import Trace, TraceHeader

    header = TraceHeader(model_id="small", num_experts=4, top_k=1, moe_blocks=(0, 1))
    return Trace.from_arrays(header=header, expert_ids=np.zeros((5, 2, 1), np.int16))


@pytest.mark.parametrize("make", ["missing", "text"])
def test_info_of_something_else(swapless, tmp_path, make):
    path = tmp_path / "thing.txt"
    if make == "text":
        path.write_text("hello")
    done = swapless("info", path)
    assert done.exit_code == 1 and done.stderr.startswith("Error: ") and str(path) in done.stderr


def test_verify_compares_every_layer(swapless, checkpoint, ample_memory):
    done = swapless("verify", checkpoint, "--memory", ample_memory, "--json")
    assert done.exit_code == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["identical"] and [layer["moe_layer"] for layer in shown["layers"]] == list(range(6))
    assert all(layer["max_abs_difference"] == 0 and layer["experts_compared"] > 0 for layer in shown["layers"])


def test_verify_exits_with_1_on_any_difference(swapless, checkpoint, monkeypatch, ample_memory):
    from swapless import runtime

    layers = list(runtime.verify(checkpoint, memory=ample_memory))
    from dataclasses import replace

    layers[2] = replace(layers[2], identical=False, max_abs_difference=1e-3)
    monkeypatch.setattr(runtime, "verify", lambda *_, **__: iter(layers), raising=False)
    done = swapless("verify", checkpoint, "--memory", ample_memory)
    assert done.exit_code == 1
    assert "DIFFERENT, by up to 0.001" in done.stdout and "MoE layer 2" in done.stderr


@pytest.mark.slow
def test_demo_shows_three_residencies_of_one_text(swapless):
    done = swapless("demo")
    assert done.exit_code == 0, done.stderr
    for words in (
        "25% of the experts",
        "50% of the experts",
        "100% of the experts",
        "The three texts are the same",
        "experts swapped",
    ):
        assert words in done.stdout


@pytest.mark.slow
def test_demo_as_json(swapless):
    shown = json.loads(swapless("demo", "--json").stdout)
    assert shown["identical"]
    assert [run["resident"] for run in shown["runs"]] == [0.25, 0.5, 1.0]
    read = [run["bytes_read_per_token"] for run in shown["runs"]]
    assert read == sorted(read, reverse=True) and read[0] > read[-1]
    assert len({run["text"] for run in shown["runs"]}) == 1
    assert len(shown["runs"][0]["text"]) > 40
    token, theme = shown["twins"]
    assert (token["router"], theme["router"]) == ("switch", "theme-gate") and token["slots"] == theme["slots"] == 3
    swapped = [twin["requests"] - twin["hits"] for twin in (token, theme)]
    assert swapped[0] > 5 * swapped[1] and token["decode_bytes_read"] > 5 * theme["decode_bytes_read"]
