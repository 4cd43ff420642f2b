"""The verb ``simulate``: rows, page, published protocol, and what it refuses."""

from __future__ import annotations

import csv
import json

import pytest
from typer.testing import CliRunner

from swapless.cache.replay import replay
from swapless.cache.sweep import Conditions, sweep
from swapless.cli.main import app
from swapless.trace import read_trace, write_trace
from tests.cache.made import made_trace


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("traces") / "made.parquet"
    write_trace(path, made_trace(scores=False))
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["simulate", *map(str, arguments)])


def test_rows_are_those_of_the_replay(file):
    result = run(file, "--policy", "lru,lfu", "--capacity", "0.1,0.5,3", "--documents", "0-1", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    trace = read_trace(file)
    trace = trace.rows(trace.document <= 1)
    assert [(row["policy"], row["capacity_experts"]) for row in rows] == [(p, c) for p in ("lru", "lfu") for c in (2, 4, 3)]
    for row in rows:
        found = replay(trace, row["policy"], row["capacity_experts"])
        assert (row["requests"], row["hits"], row["evictions"]) == (found.requests, found.hits, found.evictions)
        assert row["hit_rate"] == found.hit_rate and row["bytes_read_per_token"] == found.bytes_read_per_token
        assert row["pool"] == "layer" and row["request_model"] == "token" and row["tokens_per_s"] is None


def test_a_device_gives_time_and_floor_and_a_page(file, tmp_path):
    page = tmp_path / "page.html"
    result = run(file, "--policy", "lru,belady", "--capacity", "0.5", "--device", "sata", "--html", page)
    assert result.exit_code == 0, result.output
    assert "tokens per s" in result.stdout
    text = page.read_text(encoding="utf-8")
    assert "Where a token&#39;s time goes" in text and "http://" not in text.split("<script>")[0]
    rows = json.loads(run(file, "--policy", "lru", "--capacity", "0.5", "--device", "SATA", "--json").stdout)
    assert 1 / rows[0]["tokens_per_s"] >= rows[0]["floor_s_per_token"] - 1e-12


def test_the_published_protocol(tmp_path):
    """Two layers, two experts each, every prediction right: all hits but none earned."""
    with open(tmp_path / "1.csv", "w", encoding="utf-8", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(["Layer ID", "Token", "Activated Expert IDs", "Predicted Expert IDs"])
        for token in range(12):
            for layer in (1, 2):
                chosen = [(token + layer) % 64]
                writer.writerow([layer, token, chosen, chosen])
    result = run("--protocol", "moe-beyond", "--predictions", tmp_path, "--capacity", "0.1", "--json")
    assert result.exit_code == 0, result.output
    plain, foreseen = json.loads(result.stdout)
    assert (plain["requests"], plain["capacity_experts"]) == (4, 12)
    assert foreseen["hit_rate"] == 1.0 and foreseen["prediction_hits"] == 4
    assert plain["hit_rate"] < 1.0 and plain["loads_per_request"] == foreseen["loads_per_request"]


@pytest.mark.slow
def test_processes_change_nothing():
    trace = made_trace(scores=False)
    rows = [sweep(trace, ["lru", "belady"], [0.5, 3], Conditions(pool="shared"), jobs=jobs) for jobs in (1, 2)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--policy", "lur"], "Did you mean 'lru'"),
        (["--capacity", "1"], "out of range"),
        (["--capacity", "many"], "share or a count"),
        (["--policy", "score"], "record --scores"),
        (["--device", "floppy"], "Unknown device"),
        (["--pool", "heap"], "layer, shared, floor"),
        (["--request-model", "batch"], "token, single"),
        (["--protocol", "moe-beyond"], "--predictions DIR"),
        (["--protocol", "moe-beyond", "--predictions", ".", "--capacity", "166"], "takes shares"),
        (["--protocol", "moe-beyon"], "Did you mean 'moe-beyond'"),
    ],
)
def test_bad_input_is_refused(file, arguments, said):
    result = run(file, *arguments)
    assert result.exit_code in (1, 2)
    assert said in result.output and "Traceback" not in result.output
