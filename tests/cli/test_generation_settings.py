"""generation_config.json as it is published, or as people edit it: one sequence is written, and what it cannot be is said."""

from __future__ import annotations

import json

import pytest

BASE = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.fixture
def run(copy, swapless):
    def call(settings, *more, config=None):
        (copy / "generation_config.json").write_text(json.dumps(BASE | settings))
        if config:
            whole = json.loads((copy / "config.json").read_text()) | config
            (copy / "config.json").write_text(json.dumps(whole))
        options = ("--resident", "100%", "--threads", 1, "--max-new-tokens", 8, "--prefetch", "none", "-q")
        return swapless("run", copy, "--prompt", "Once upon a time", *options, *more)

    return call


@pytest.fixture(scope="module")
def greedy(checkpoint):
    from typer.testing import CliRunner

    from swapless.cli.main import app

    options = ["--resident", "100%", "--threads", "1", "--max-new-tokens", "8", "--prefetch", "none", "-q"]
    return CliRunner().invoke(app, ["run", checkpoint, "--prompt", "Once upon a time", *options]).stdout


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_beams": 4}, "4 beams"),
        ({"num_beams": 4, "num_return_sequences": 2}, "4 beams, 2 answers"),
        ({"num_beams": 2, "do_sample": True, "temperature": 0.7}, "2 beams"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "4 beams"),
        ({"num_return_sequences": 2, "do_sample": True}, "2 answers"),
        ({"prompt_lookup_num_tokens": 3}, "drafts"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive"),
    ],
)
def test_one_greedy_sequence_and_a_warning(run, greedy, settings, said):
    done = run(settings)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == greedy
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("Warning: ") and said in done.stderr


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
        {"max_length": 20},
        {"eos_token_id": [2, 3, 4]},
        {"cache_implementation": "hybrid"},
        {"return_dict_in_generate": True, "output_scores": True},
        {"num_beams": 1, "num_return_sequences": 1, "early_stopping": False},
        {"thinking_budget": 3, "chat_format": "chatml"},
    ],
)
def test_what_changes_nothing_says_nothing(run, greedy, settings):
    done = run(settings)
    assert (done.exit_code, done.stdout, done.stderr) == (0, greedy, "")


def test_settings_that_do_not_fit_each_other_are_one_message(run):
    done = run({"cache_implementation": "no such cache"})
    assert done.exit_code in (0, 1) and "Traceback" not in done.stderr
    done = run({"suppress_tokens": ["a", "b"]})
    assert done.exit_code == 1 and done.stderr.startswith("Error: ") and "generation_config.json" in done.stderr


def test_settings_kept_in_the_configuration(run, greedy):
    done = run({}, config={"num_beams": 4, "repetition_penalty": 1.0})
    assert done.exit_code in (0, 1) and "Traceback" not in done.stderr and done.stderr.count("\n") <= 1
