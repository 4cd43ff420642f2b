"""``swapless run``: the text, where it goes, and the figures beside it."""

from __future__ import annotations

import json

import pytest

from swapless.cli.session import ahead_line
from swapless.predict import make_predictor
from swapless.predict.saved import save_predictor
from swapless.runtime.stats import Stats
from tests.predict.made import made_trace

PROMPT = "Once upon a time"
FIELDS = {
    "text": str,
    "finish": str,
    "prompt_tokens": int,
    "new_tokens": int,
    "tokens_per_s": float,
    "first_token_s": float,
    "total_s": float,
    "requests": int,
    "hits": int,
    "hit_rate": float,
    "bytes_read": int,
    "decode_bytes_read": int,
    "bytes_read_per_token": float,
    "reads": int,
    "read_s": float,
    "stall_s": float,
    "compute_s": float,
    "stall_share": float,
    "prefetch_reads": int,
    "prefetch_useful": int,
    "prefetch_late": int,
    "prefetch_wasted": int,
    "prefetch_tokens": int,
    "prefetch_on": bool,
    "prefetch_recall": dict,
    "prefetch_own_s": float,
    "prefetch_own_s_per_token": float,
    "prefetch_with_s": type(None),
    "prefetch_without_s": type(None),
    "prefetch_times_off": int,
    "peak_memory_bytes": int,
    "peak_memory_source": str,
    "memory_budget_bytes": int,
    "slots": int,
    "checkpoint": str,
    "policy": str,
    "seed": int,
}


@pytest.fixture
def run(swapless, checkpoint):
    def call(*arguments, residency=("--resident", "25%"), **options):
        return swapless("run", checkpoint, *residency, "--threads", 1, "--max-new-tokens", 12, *arguments, **options)

    return call


@pytest.fixture(scope="module")
def reference(checkpoint):
    """What transformers itself writes: eager experts, all weights in memory, one thread, the likeliest token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, experts_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    torch.set_num_threads(threads)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_text_is_the_reference_text_and_the_summary_stands_aside(run, reference):
    done = run("--prompt", PROMPT)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == reference + "\n"
    for word in ("tok/s", "hit rate", "read a token", "waiting for reads", "peak memory"):
        assert word in done.stderr


def test_reading_ahead_changes_nothing_but_the_reads(run, reference):
    done = run("--prompt", PROMPT, "--prefetch", "gate")
    assert done.exit_code == 0, done.stderr
    assert done.stdout == reference + "\n"
    assert "read ahead" in done.stderr and "at lead 1" in done.stderr
    assert "at lead 1" in run("--prompt", PROMPT).stderr, "as by itself"
    assert "read ahead" not in run("--prompt", PROMPT, "--prefetch", "none").stderr


@pytest.mark.slow
def test_a_predictor_of_this_model_reads_ahead_and_one_of_another_is_refused(run, reference, checkpoint, swapless, tmp_path):
    prompts, trace, saved = tmp_path / "prompts.txt", tmp_path / "t.parquet", tmp_path / "p"
    prompts.write_text("The cat sat on the mat. The dog saw the cat.\nOne and one is two.\n", encoding="utf-8")
    for command in (
        ("record", checkpoint, "--prompts", prompts, "--decode", 20, "--out", trace),
        ("predict", "train", trace, "--kind", "linear", "--out", saved),
    ):
        assert swapless(*command, "-q").exit_code == 0
    done = run("--prompt", PROMPT, "--prefetch", saved)
    assert done.exit_code == 0 and done.stdout == reference + "\n"
    assert "at lead 2" in done.stderr and "ms a token to foresee" in done.stderr and "still on trial" in done.stderr
    shown = json.loads(run("--prompt", PROMPT, "--prefetch", saved, "--json").stdout)
    assert shown["text"] == reference and shown["prefetch_tokens"] > 0 and shown["prefetch_own_s_per_token"] > 0
    assert shown["prefetch_useful"] + shown["prefetch_late"] + shown["prefetch_wasted"] <= shown["prefetch_reads"]

    assert swapless("predict", "train", trace, "--kind", "eam", "--out", tmp_path / "eam", "-q").exit_code == 0
    save_predictor(tmp_path / "other", make_predictor("popularity").fit(made_trace(layers=6, experts=16)))
    for file, code, said in (
        ("other", 1, "fitted for another model. Where"),
        ("eam", 2, "Allowed: linear"),
        ("nowhere", 2, "no file of that name"),
    ):
        done = run("--prompt", PROMPT, "--prefetch", tmp_path / file)
        assert done.exit_code == code and said in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("with_s", "without_s", "said"),
    [
        (None, None, "still on trial"),
        (0.05, 0.04, "switched off, as it does not pay: 50.00 ms a token with it, 40.00 ms without"),
        (0.03, 0.04, "kept, as it pays: 30.00 ms a token with it, 40.00 ms without"),
    ],
)
def test_the_summary_says_whether_reading_ahead_pays(with_s, without_s, said):
    stats = Stats(prefetch_tokens=32, prefetch_own_s=0.016, prefetch_with_s=with_s, prefetch_without_s=without_s)
    lines = dict(ahead_line(stats.to_dict()))
    assert lines["reading ahead"] == said
    assert lines["foreseen"] == "-; 0.50 ms a token to foresee them"
    assert ahead_line(Stats().to_dict()) == []


def test_json_is_one_document_with_every_field(run, reference, checkpoint):
    done = run("--prompt", PROMPT, "--json", "--quiet")
    assert done.exit_code == 0 and done.stderr == ""
    shown = json.loads(done.stdout)
    assert {name: type(value) for name, value in shown.items()} == FIELDS
    assert shown["text"] == reference
    assert shown["checkpoint"] == checkpoint
    assert shown["hits"] <= shown["requests"] and shown["hit_rate"] == shown["hits"] / shown["requests"]
    assert 0 < shown["decode_bytes_read"] <= shown["bytes_read"]
    assert shown["peak_memory_bytes"] > 0
    assert shown["new_tokens"] <= 12


def test_a_budget_in_bytes_is_kept(run, ample_memory):
    done = run("--prompt", PROMPT, "--json", residency=("--memory", ample_memory))
    assert done.exit_code == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["memory_budget_bytes"] == int(ample_memory.removesuffix("MiB")) * 2**20
    assert shown["hit_rate"] > 0


def test_the_prompt_comes_from_stdin(run, reference):
    assert run("--prompt", "-", "--quiet", input=PROMPT + "\n").stdout == reference + "\n"


def test_a_seed_repeats_a_sample_and_another_one_differs(run):
    first, again, other = (
        run("--prompt", PROMPT, "-q", "--temperature", 1, "--top-p", 0.95, "--seed", seed).stdout for seed in (1, 1, 2)
    )
    assert first == again != other


def test_it_ends_before_a_stop_string(run, reference):
    stop = reference[5:7]
    done = json.loads(run("--prompt", PROMPT, "--json", "--stop", stop, "--stop", "\x00").stdout)
    assert done["finish"] == "stop"
    assert done["text"] == reference[: reference.index(stop)]


def test_the_answer_ends_where_the_context_does(run):
    done = json.loads(run("--prompt", PROMPT, "--json", "--context", 8).stdout)
    assert done["finish"] in ("context", "eos")
    assert done["prompt_tokens"] + done["new_tokens"] <= 8


def test_it_records_a_trace(run, tmp_path):
    from swapless.trace import read_trace

    done = run("--prompt", PROMPT, "--json", "--record", tmp_path / "t.parquet")
    assert done.exit_code == 0, done.stderr
    shown = json.loads(done.stdout)
    trace = read_trace(tmp_path / "t.parquet")
    assert len(trace) == shown["prompt_tokens"] + shown["new_tokens"] - 1


def test_one_message_through_the_chat_template(run):
    done = run("--chat", "--prompt", "Hello", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["prompt_tokens"] > 0


def test_a_conversation_until_exit(run):
    done = run("--chat", input="Hello\n\n/clear\nAnd now?\n/exit\nnever read\n")
    assert done.exit_code == 0, done.stderr
    assert "The last answer" in done.stderr
    again = run("--chat", input="And now?\n")
    assert done.stdout.endswith(again.stdout)


def test_an_earlier_turn_is_remembered(run):
    with_it = run("--chat", "-q", input="The cat is red.\nAnd now?\n").stdout
    without = run("--chat", "-q", input="And now?\n").stdout
    assert not with_it.endswith(without)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "nothing to continue"),
        (("--chat", "--json"), "--json"),
        (("--prompt", "x", "--memory", "1GiB"), "exclude each other"),
        (("--prompt", "x", "--policy", "lur"), "Did you mean 'lru'?"),
        (("--prompt", "x", "--record", "no/such/folder/t.parquet"), "--record"),
        (("--prompt", "x", "--max-new-tokens", "0"), "--max-new-tokens"),
        (("--prompt", "x", "--top-p", "1.5"), "--top-p"),
        (("--promt", "x"), "--prompt"),
    ],
)
def test_wrong_usage_exits_with_2(run, arguments, words):
    done = run(*arguments)
    assert done.exit_code == 2
    assert words in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("size", ["8G", "lots", "-1GiB", "0B"])
def test_a_size_needs_its_unit(run, size):
    done = run("--prompt", "x", residency=("--memory", size))
    assert done.exit_code == 2 and "size" in done.stderr


@pytest.mark.parametrize("share", ["0", "120%", "much"])
def test_a_share_lies_in_its_range(run, share):
    done = run("--prompt", "x", residency=("--resident", share))
    assert done.exit_code == 2 and "25% or 0.25" in done.stderr


def test_stdin_that_is_no_text_is_refused(run):
    done = run("--prompt", "-", input=b"\xff\xfe\x00")
    assert done.exit_code == 2 and "UTF-8" in done.stderr
