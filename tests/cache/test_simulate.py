"""The verb ``simulate``: rows, page, published protocol, and what it refuses."""

from __future__ import annotations

import csv
import json

import pytest
from typer.testing import CliRunner

from swapless.cache.capacity import pools_for
from swapless.cache.devices import device_profile
from swapless.cache.foresight import Foresight, clairvoyant, levels_of
from swapless.cache.replay import replay
from swapless.cache.sweep import Conditions, sweep
from swapless.cache.timeline import timeline
from swapless.cli.main import app
from swapless.errors import PredictorError
from swapless.predict import make_predictor
from swapless.predict.evaluate import scores_of
from swapless.predict.saved import load_predictor, save_predictor
from swapless.report.prefetch import losses
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


@pytest.mark.slow
def test_a_device_gives_time_and_floor_and_a_page(file, tmp_path):
    page = tmp_path / "page.html"
    result = run(file, "--policy", "lru,belady", "--capacity", "0.5", "--device", "sata", "--html", page)
    assert result.exit_code == 0, result.output
    assert "tokens per s" in result.stdout
    text = page.read_text(encoding="utf-8")
    assert "Where a token&#39;s time goes" in text and "http://" not in text.split("<script>")[0]
    rows = json.loads(run(file, "--policy", "lru", "--capacity", "0.5", "--device", "SATA", "--json").stdout)
    assert 1 / rows[0]["tokens_per_s"] >= rows[0]["floor_s_per_token"] - 1e-12


@pytest.fixture(scope="module")
def predictor(file, tmp_path_factory):
    path = tmp_path_factory.mktemp("predictors") / "previous.predictor"
    save_predictor(path, make_predictor("previous_token").fit(read_trace(file)))
    return path


@pytest.mark.slow
def test_reading_ahead_stands_beside_not_reading_ahead(file, predictor, tmp_path):
    given = (file, "--policy", "lru,lfu", "--capacity", "0.5,3", "--device", "SATA")
    plain = json.loads(run(*given, "--json").stdout)
    result = run(*given, "--prefetch", predictor, "--lead", "2", "--predictor-ms", "0.5", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert rows[::2] == plain  # those without are what they were
    trace = read_trace(file)
    levels = levels_of(trace, scores_of(load_predictor(predictor), trace, 2))
    for row, without in zip(rows[1::2], rows[::2]):
        assert (row["policy"], row["capacity_experts"], row["prefetch"]) == (
            without["policy"],
            without["capacity_experts"],
            "previous_token",
        )
        assert row["lead"] == 2 and row["staging_experts"] == min(4, 3 * (row["capacity_experts"] - 2))
        pools, taken = pools_for(row["capacity_experts"], 3, 8, 2).less(4, 2)
        given = Foresight(predictor="previous_token", lead=2, levels=levels, staging_experts=taken, token_s=0.5e-3)
        found = timeline(trace, row["policy"], pools, device_profile("SATA"), foresight=given)
        assert found.row().items() <= row.items()
        assert row["bytes_moved_per_token"] == (row["demand_reads"] + row["prefetch_reads"]) * 192 / len(trace)
        assert row["prefetch_reads"] == row["prefetch_useful"] + row["prefetch_late"] + row["prefetch_wasted"]
        assert row["tokens_per_s_ratio"] == row["tokens_per_s"] / without["tokens_per_s"]
        assert row["compute_s_per_token"] == pytest.approx(without["compute_s_per_token"] + 0.5e-3)
        assert row["requests"] - row["hits"] == row["demand_reads"] + row["prefetch_useful"] + row["prefetch_late"]


@pytest.mark.slow
def test_the_clairvoyant_bounds_and_the_words_say_where_it_loses(file, predictor, tmp_path):
    page = tmp_path / "page.html"
    given = (file, "--policy", "lru", "--capacity", "0.5,0.75", "--device", "SATA", "--lead", "token")
    result = run(*given, "--prefetch", "clairvoyant", "--html", page)
    assert result.exit_code == 0, result.output
    assert "clairvoyant, lead token" in result.stdout and "loses nowhere" not in result.stdout
    text = page.read_text(encoding="utf-8")
    assert "What reading ahead changes" in text and "Where reading ahead loses" in text
    best, own = (json.loads(run(*given, "--prefetch", name, "--json").stdout) for name in ("clairvoyant", predictor))
    assert all(one["prefetch_wasted"] == 0 for one in best[1::2])
    assert all(one["tokens_per_s"] >= other["tokens_per_s"] * (1 - 1e-9) for one, other in zip(best, own))


def test_words_about_losses():
    def row(speed, moved, **more):
        ratios = {"tokens_per_s_ratio": speed, "bytes_moved_per_token_ratio": moved}
        named = {"policy": "lru", "prefetch": "linear", "lead": 1, "capacity_fraction": 0.25, "staging_experts": 2}
        return {**named, **ratios, **more}

    without = row(None, None, prefetch=None, lead=None)
    assert losses([without]) == []
    assert losses([without, row(1.02, 1.0)]) == [
        "Reading ahead loses nowhere here: no row is slower or moves more bytes than the one without."
    ]
    slower, dearer, neither = losses([row(0.98, 0.99), row(1.02, 1.1, lead="token"), row(1.0, 1.01)])
    assert slower == "lru, 25% of the experts: linear, lead 1, loses: 2.0% slower and moves 1.0% fewer bytes."
    assert dearer == "lru, 25% of the experts: linear, before the token, costs bytes: 2.0% faster and moves 10.0% more bytes."
    assert neither.endswith("gains nothing: as fast and moves 1.0% more bytes.")
    assert losses([row(1.0, 1.0, staging_experts=0)])[0].startswith("lru, 25% of the experts: no room to read ahead")


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
    counted = run("--protocol", "moe-beyond", "--predictions", tmp_path, "--capacity", "12,0.1", "--json")
    rows = json.loads(counted.stdout)
    assert [row["hits"] for row in rows] == [plain["hits"]] * 2 + [foreseen["hits"]] * 2
    assert [row["capacity_fraction"] for row in rows] == [12 / 128, 0.1] * 2
    table = run("--protocol", "moe-beyond", "--predictions", tmp_path, "--capacity", "12").stdout
    assert "filled at random for every text" in table
    for wrong, said in (
        (["--policy", "lru,lfu"], "--policy"),
        (["--state", "keep"], "--state"),
        (["--capacity", "129"], "1 to 128"),
    ):
        refused = run("--protocol", "moe-beyond", "--predictions", tmp_path, *wrong)
        assert refused.exit_code and said in refused.stderr and not refused.stdout, refused.stderr


@pytest.mark.slow
def test_every_table_names_its_state_and_its_optimum(file):
    for arguments, said in (
        ([], "One cache a MoE layer, kept from document to document, the experts of a token at once; optimum: belady,"),
        (
            ["--pool", "shared", "--state", "reset", "--request-model", "single", "--policy", "lru"],
            "emptied for every document, one",
        ),
        (
            ["--device", "SATA", "--prefetch", "clairvoyant", "--pool", "floor"],
            "over all MoE layers, K a layer kept, kept from",
        ),
    ):
        found = run(file, "--capacity", "0.5", *arguments)
        assert found.exit_code == 0 and said in " ".join(found.stdout.split()), found.stdout


@pytest.mark.slow
def test_processes_change_nothing():
    trace = made_trace(scores=False)
    shared = Conditions(pool="shared", device=device_profile("SATA"))
    given = {"foresight": clairvoyant(trace, 2)}
    rows = [sweep(trace, ["lru", "belady"], [0.5, 3], shared, jobs=jobs, **given) for jobs in (1, 2)]
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
        (["--protocol", "moe-beyond", "--predictions", "."], "alone. Got: TRACE"),
        (["--protocol", "moe-beyon"], "Did you mean 'moe-beyond'"),
        (["--prefetch", "clairvoyant"], "--device NAME"),
        (["--lead", "2"], "--prefetch P"),
        (["--device", "SATA", "--prefetch", "missing.predictor"], "No such predictor"),
        (["--device", "SATA", "--prefetch", "clairvoyant", "--lead", "4"], "1 to 3 (L)"),
        (["--device", "SATA", "--prefetch", "clairvoyant", "--lead", "soon"], "count of MoE layers"),
        (["--protocol", "moe-beyond", "--predictions", ".", "--prefetch", "clairvoyant"], "exclude each other"),
    ],
)
def test_bad_input_is_refused(file, arguments, said):
    result = run(file, *arguments)
    assert result.exit_code in (1, 2)
    assert said in result.output and "Traceback" not in result.output


def test_a_predictor_of_another_model_or_that_knows_the_future_is_refused(file, predictor, tmp_path):
    other = tmp_path / "other.parquet"
    write_trace(other, made_trace(scores=False, experts=9, top_k=3))
    result = run(other, "--device", "SATA", "--prefetch", predictor)
    assert result.exit_code == 1 and "another number of experts a token" in result.output
    with pytest.raises(PredictorError, match="knows the future"):
        next(scores_of(make_predictor("paper"), read_trace(file), 1))
