"""The chain that the README prints: record, then simulate, then simulate on a device; and what cannot be judged."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from swapless.notation import Phase
from swapless.trace import read_trace

TEXT = "The cat sat on the mat. The cat saw the dog. The dog saw the cat. The cat sat on the dog. " * 3


@pytest.fixture(scope="module")
def recorded(checkpoint, tmp_path_factory, ample_memory):
    """A trace as ``swapless record CHECKPOINT --text FILE --out T.parquet`` makes it."""
    from typer.testing import CliRunner

    from swapless.cli.main import app

    folder = tmp_path_factory.mktemp("chain")
    (folder / "text.txt").write_text(TEXT)
    arguments = ["record", checkpoint, "--text", folder / "text.txt", "--out", folder / "t.parquet", "--memory", ample_memory]
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.stderr
    return folder / "t.parquet"


def test_every_token_but_the_first_is_a_decode_step(recorded):
    trace = read_trace(recorded)
    assert len(trace) > 50
    assert trace.phase.tolist() == [Phase.PREFILL] + [Phase.DECODE] * (len(trace) - 1)
    assert trace.position.tolist() == list(range(len(trace))) and set(trace.document.tolist()) == {0}


def test_the_header_says_what_an_expert_is(recorded, checkpoint, swapless):
    header = read_trace(recorded).header
    config = json.loads((Path(checkpoint) / "config.json").read_text())
    assert (header.hidden_size, header.moe_intermediate_size) == (config["hidden_size"], config["moe_intermediate_size"])
    assert header.expert_bytes == json.loads(swapless("info", checkpoint, "--json").stdout)["expert_bytes"]


def test_simulate_judges_it(recorded, swapless):
    done = swapless("simulate", recorded, "--policy", "lru,lfu", "--json")
    assert done.exit_code == 0, done.stderr
    for row in json.loads(done.stdout):
        assert row["requests"] > 0 and 0 <= row["hit_rate"] <= 1 and row["bytes_read_per_token"] is not None
    assert " - " not in swapless("simulate", recorded, "--policy", "lru,lfu", "--device", "NVMe Gen4").stdout


def test_simulate_times_it_on_a_device(recorded, swapless):
    done = swapless("simulate", recorded, "--policy", "lru,belady", "--device", "NVMe Gen4", "--json")
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)
    assert all(row["tokens_per_s"] > 0 and row["floor_s_per_token"] >= 0 for row in rows)


@pytest.mark.slow
def test_a_packed_store_is_recorded_with_its_own_bytes(checkpoint, recorded, tmp_path, swapless):
    assert swapless("pack", checkpoint, "--out", tmp_path / "packed", "--bits", 4).exit_code == 0
    (tmp_path / "text.txt").write_text(TEXT)
    options = ("--text", tmp_path / "text.txt", "--max-tokens", 8, "--resident", "50%", "--out", tmp_path / "t.parquet")
    done = swapless("record", tmp_path / "packed", *options)
    assert done.exit_code == 0, done.stderr
    plain, packed = read_trace(recorded).header, read_trace(tmp_path / "t.parquet").header
    assert packed.moe_intermediate_size == plain.moe_intermediate_size
    assert packed.expert_bytes < plain.expert_bytes


@pytest.fixture(scope="module")
def prefilled(checkpoint, recorded):
    """A trace without decode steps, on request."""
    from typer.testing import CliRunner

    from swapless.cli.main import app

    out = recorded.with_name("prefilled.parquet")
    arguments = [
        "record",
        checkpoint,
        "--text",
        recorded.with_name("text.txt"),
        "--decode",
        0,
        "--out",
        out,
        "--resident",
        "50%",
    ]
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0 and "no decode steps" in done.stderr
    return out


def test_decoding_takes_the_experts_that_reading_takes(recorded, prefilled):
    step_by_step, at_once = (np.sort(read_trace(path).expert_ids, axis=2) for path in (recorded, prefilled))
    assert step_by_step.shape == at_once.shape
    assert (step_by_step == at_once).mean() > 0.99  # other products, other last bits, and now and then another expert


@pytest.mark.parametrize("more", [(), ("--device", "NVMe Gen4"), ("--policy", "lru"), ("--json",)])
def test_nothing_to_judge_is_one_message(prefilled, swapless, more):
    done = swapless("simulate", prefilled, *more)
    assert (done.exit_code, done.stdout) == (1, ""), done.stderr
    assert done.stderr.count("\n") == 1 and "no decode steps" in done.stderr and "--decode" in done.stderr


def test_a_plan_from_it_is_refused_too(prefilled, checkpoint, swapless):
    done = swapless("plan", checkpoint, "--memory", "2GiB", "--trace", prefilled)
    assert (done.exit_code, done.stdout) == (1, ""), done.stderr
    assert "no decode steps" in done.stderr


def test_a_warm_up_as_long_as_the_trace(recorded, swapless):
    done = swapless("simulate", recorded, "--warmup", 100_000)
    assert (done.exit_code, done.stdout) == (1, ""), done.stderr
    assert "warm-up leaves no decode step" in done.stderr


def test_a_trace_that_does_not_say_how_large_an_expert_is(tmp_path, swapless):
    from swapless.trace import Trace, TraceHeader, write_trace

    header = TraceHeader(model_id="m", num_experts=4, top_k=1, moe_blocks=(0,))
    ids = np.arange(40, dtype=np.int16).reshape(40, 1, 1) % 4
    write_trace(tmp_path / "t.parquet", Trace.from_arrays(header, expert_ids=ids, phase="decode"))
    done = swapless("simulate", tmp_path / "t.parquet", "--device", "NVMe Gen4", "--policy", "lru")
    assert done.exit_code == 2 and "--expert-bytes" in done.stderr
    options = ("--device", "NVMe Gen4", "--policy", "lru", "--expert-bytes", "6MiB", "--json")
    done = swapless("simulate", tmp_path / "t.parquet", *options)
    assert done.exit_code == 0 and json.loads(done.stdout)[0]["expert_bytes"] == 6 << 20


def test_a_document_longer_than_the_context_is_said(checkpoint, recorded, tmp_path, swapless, caplog):
    text = recorded.with_name("text.txt")
    options = ("--text", text, "--context", 16, "--resident", "50%", "--decode", 0)
    with caplog.at_level(logging.WARNING, "swapless"):
        done = swapless("record", checkpoint, *options, "--out", tmp_path / "a.parquet", "--quiet")
    assert done.exit_code == 0 and len(read_trace(tmp_path / "a.parquet")) == 16
    assert "Warning: 1 document was cut at the context of 16 tokens" in done.stderr
    done = swapless("record", checkpoint, *options, "--out", tmp_path / "b.parquet", "--max-tokens", 16)
    assert "Warning" not in done.stderr


def test_generating_after_documents_ignores_beams(copy, tmp_path, swapless):
    settings = json.loads((copy / "generation_config.json").read_text()) | {"num_beams": 3, "num_return_sequences": 2}
    (copy / "generation_config.json").write_text(json.dumps(settings))
    (tmp_path / "text.txt").write_text("Once upon a time")
    options = ("--text", tmp_path / "text.txt", "--decode", 4, "--resident", "50%", "--out", tmp_path / "t.parquet")
    done = swapless("record", copy, *options)
    assert done.exit_code == 0, done.stderr
    trace = read_trace(tmp_path / "t.parquet")
    assert (trace.phase == Phase.DECODE).sum() == 4 and set(trace.document.tolist()) == {0}
