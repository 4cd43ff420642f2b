"""``plan`` and ``doctor`` as they are typed: on the embedded model, with what was kept of a machine, and with wrong input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from swapless.cli.main import app
from swapless.trace import Trace, TraceHeader, write_trace


def swapless(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace in the shape of the embedded model."""
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((200, 6, 16)), axis=2)[:, :, :2].astype(np.int16)
    header = TraceHeader(model_id="embedded", num_experts=16, top_k=2, moe_blocks=tuple(range(6)))
    path = tmp_path_factory.mktemp("trace") / "mine.parquet"
    write_trace(path, Trace.from_arrays(header, expert_ids=ids))
    return path


@pytest.mark.slow
def test_a_table_and_what_to_type(checkpoint: Path, kept_machine: Path) -> None:
    done = swapless("plan", checkpoint, "--memory", "600MiB")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert "6 MoE layers of 16 experts, 2 a token" in lines[0]
    assert any("no trace of this model given" in line for line in lines)
    assert [line.split()[0] for line in lines if line.split()[1:4] == ["bits", "16", "bits"]] == ["16", "8", "4"]
    assert f"  swapless run {checkpoint} --memory 600MiB --prompt ..." in lines


@pytest.mark.slow
def test_json_is_one_document(checkpoint: Path, kept_machine: Path, trace: Path) -> None:
    done = swapless("plan", checkpoint, "--memory", "600MiB", "--trace", trace, "--context", 128, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["context_tokens"] == 128 and "mine.parquet" in found["hits_from"] and found["here"]
    row = found["set_ups"][found["lossless"]]
    assert row["slots"] == 96 and row["hit_rate"] > 0.9 and row["tokens_per_s"] > 0
    assert row["budget"]["parts"]["non_expert"] > 0


def test_the_machine(kept_machine: Path) -> None:
    done = swapless("doctor")
    assert done.exit_code == 0 and "expert int4" in done.stdout and "14.00 G" in done.stdout
    found = json.loads(swapless("doctor", "--json").stdout)
    assert found["weights_per_s"]["bf16"] == 8e9 and found["now"]["available_bytes"] > 0


@pytest.mark.parametrize(
    "given, code, told",
    [
        (["--memory", "100MiB"], 1, "at least"),
        (["--memory", "8G"], 2, "8GiB"),
        ([], 2, "--memory"),
        (["--memory", "600MiB", "--context", "5000"], 2, "1 to 1024"),
        (["--memory", "600MiB", "--policy", "arc"], 2, "next_use"),
        (["--memory", "600MiB", "--policy", "lur"], 2, "lru"),
        (["--memory", "600MiB", "--trace", "nowhere.parquet"], 1, "nowhere.parquet"),
    ],
)
def test_wrong_input(given: list[str], code: int, told: str, checkpoint: Path, kept_machine: Path) -> None:
    done = swapless("plan", checkpoint, *given)
    assert done.exit_code == code, done.output
    assert told in done.output


def test_a_trace_of_another_model(checkpoint: Path, kept_machine: Path) -> None:
    sample = Path(__file__).parents[1] / "data" / "gpt-oss-20b.sample.parquet"
    done = swapless("plan", checkpoint, "--memory", "600MiB", "--trace", sample)
    assert done.exit_code == 1 and "another model" in done.output


def test_no_such_folder(kept_machine: Path, tmp_path: Path) -> None:
    done = swapless("plan", tmp_path / "nothing", "--memory", "600MiB")
    assert done.exit_code == 1 and "cannot be read" in done.output
