"""The verb from end to end: tables, one JSON document of rows, and a page that needs no network."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from swapless.cache.curves import hit_rate_curves
from swapless.cli.main import app
from swapless.locality import sch_lookahead, srp
from swapless.report.results import results_of
from swapless.testing import random_trace
from swapless.trace import TraceHeader, write_trace
from swapless.trace.importers import load_trace

SAMPLE = Path(__file__).resolve().parents[1] / "data" / "gpt-oss-20b.sample.parquet"
FIELDS = [
    "measure", "variant", "level", "moe_layer", "expert", "domain", "segment_tokens", "capacity_experts", "cold", "value",
    "chance", "ci_low", "ci_high",
]  # fmt: skip


def run(*arguments):
    result = CliRunner().invoke(app, ["locality", *map(str, arguments)])
    return result


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traces")
    paths = []
    for seed, experts in ((0, 8), (1, 12)):
        trace = random_trace(
            np.random.default_rng(seed), num_moe_layers=3, num_experts=experts, lengths=(60, 40, 5, 70), domains=("a", "<b>")
        )
        paths.append(folder / f"{seed}.parquet")
        write_trace(paths[-1], trace)
    return paths


@pytest.fixture(scope="module")
def document(small):
    result = run(small[0], "--json", "--segments", "3,16", "--cache-ratios", "1,2")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def find(document, **wanted):
    rows = [row for row in document["rows"] if all(row[name] == value for name, value in wanted.items())]
    assert len(rows) == 1, (wanted, len(rows))
    return rows[0]


def test_json_is_one_document_of_rows_of_one_shape(document):
    assert document["format"] == "swapless.locality"
    assert document["header"]["num_experts"] == 8
    assert document["trace"]["tokens"] == 175
    assert all(list(row) == FIELDS for row in document["rows"])
    keys = [tuple(row[name] for name in FIELDS[:9]) for row in document["rows"]]
    assert len(set(keys)) == len(keys)
    assert {row["level"] for row in document["rows"]} == {"expert", "moe_layer", "layer_mean", "model"}
    assert document["verdict"]["sentence"].startswith("This model ")


def test_rows_are_the_measures(document, small):
    trace = load_trace(small[0])
    result = srp(trace, 3)[0]
    base = {"measure": "srp", "segment_tokens": 3, "domain": None}
    assert find(document, **base, level="model")["value"] == result.model.value
    assert find(document, **base, level="moe_layer", moe_layer=2)["value"] == result.moe_layer.value[2]
    assert find(document, **base, level="expert", moe_layer=1, expert=5)["value"] == result.expert.value[1, 5]
    assert find(document, **base | {"domain": "<b>"}, level="model")["value"] == result.domain_model.value[0]
    row = find(document, **base, level="model")
    assert row["ci_low"] < row["value"] < row["ci_high"]
    for level, width in (("moe_layer", 8), ("model", 24)):
        ahead = sch_lookahead(trace, 16, level=level)[0]
        curves = {c.variant: c for c in hit_rate_curves(trace, level=level)}
        for cold in ("free", "miss"):
            for capacity in (1, 4, width):
                place = {"capacity_experts": capacity, "cold": cold, "domain": None}
                named = {"level": "layer_mean" if level == "moe_layer" else "model"}
                mean = ahead.rate(cold).mean(axis=0)[capacity - 1]
                row = find(document, measure="sch", variant="lookahead", segment_tokens=16, **place, **named)
                assert row["value"] == pytest.approx(mean, abs=1e-15)
                for variant, curve in curves.items():
                    row = find(document, measure="hit_rate", variant=variant, **place, **named)
                    assert row["value"] == pytest.approx(curve.rate(cold).mean(axis=0)[capacity - 1], abs=1e-15)


def test_the_table_and_the_verdict_in_words(small):
    result = run(*small, "--segments", "4", "--quiet")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("This model ") == 2
    assert "8 experts, top-2" in result.stdout
    assert "random routing" in result.stdout


def test_several_traces_are_one_document(small):
    result = run(*small, "--json", "--segments", "4", "--replicates", "0")
    traces = json.loads(result.stdout)["traces"]
    assert [entry["header"]["num_experts"] for entry in traces] == [8, 12]


def test_shared_options_choose_rows(small, tmp_path):
    result = run(small[0], "--json", "--documents", "0,3", "--domain", "a", "--segments", "4")
    assert result.exit_code != 0 or json.loads(result.stdout)["trace"]["documents"] == 1
    result = run(small[0], "--phase", "prefill")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "No token" in result.stderr
    assert "another model" in run(small[0], "--model-id", "x/y").stderr
    nameless = random_trace(np.random.default_rng(3), lengths=(30, 30))
    header = TraceHeader(model_id=None, num_experts=8, top_k=2, moe_blocks=(0, 1))
    np.savez(tmp_path / "t.npz", expert_ids=nameless.expert_ids, offsets=[0, 30, 60], num_experts=header.num_experts)
    result = run(tmp_path / "t.npz", "--model-id", "x/y", "--json", "--segments", "4")
    assert json.loads(result.stdout)["header"]["model_id"] == "x/y"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--segments", "0"], "positive ints"),
        (["--segments", "4,x"], "positive ints"),
        (["--cache-ratios", "-1"], "positive numbers"),
        (["--json", "--html", "x.html"], "exclude each other"),
        (["--html", "none/x.html"], "folder of the page"),
    ],
)
def test_wrong_options_say_what_is_allowed(small, arguments, said):
    result = run(small[0], *arguments)
    assert result.exit_code == 2
    assert said in result.stderr


def test_wrong_files_end_in_one_message(tmp_path):
    result = run(tmp_path / "none.parquet")
    assert (result.exit_code, "No such trace" in result.stderr) == (1, True)


def test_tiny_traces_have_every_table(tmp_path):
    """One token, one expert: nothing to divide by anywhere."""
    write_trace(tmp_path / "t.parquet", random_trace(np.random.default_rng(0), num_experts=1, top_k=1, lengths=(1,)))
    result = run(tmp_path / "t.parquet", "--json")
    assert result.exit_code == 0, result.output
    page = tmp_path / "p.html"
    assert run(tmp_path / "t.parquet", "--html", page).exit_code == 0
    assert page.is_file()


def test_the_page_holds_everything_itself(small, tmp_path):
    page = tmp_path / "report.html"
    result = run(*small, "--html", page, "--segments", "4,16")
    assert result.exit_code == 0, result.output
    text = page.read_text(encoding="utf-8")
    own = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", own)
    assert "&lt;b&gt;" in own
    assert "<b>" not in re.sub(r"<b>[\d.]+( of \d+|%)</b>|<b>-</b>", "", own)
    assert own.count('<table id="table-') == own.count('class="plot"') == 11
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_info_of_a_trace():
    result = CliRunner().invoke(app, ["info", str(SAMPLE), "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["header"]["model_id"] == "openai/gpt-oss-20b"
    assert facts["tokens"] == sum(facts["phases"].values())
    assert 0 < facts["overlap"] < 1
    assert "24 MoE layers" in CliRunner().invoke(app, ["info", str(SAMPLE)]).stdout


def test_segments_longer_than_every_document_are_left_blank(tmp_path):
    """SRP is 0 by definition there; a table or chart that showed it would say that the routing is worse than random."""
    write_trace(tmp_path / "t.parquet", random_trace(np.random.default_rng(0), lengths=(9, 12), domains=("a", "b")))
    done = run(tmp_path / "t.parquet", "--segments", "4,64", "--html", tmp_path / "p.html")
    assert done.exit_code == 0, done.output
    line = next(line for line in done.stdout.splitlines() if line.startswith("64 "))
    assert line.split()[1::2][:2] == ["-", "-"]
    document = json.loads(run(tmp_path / "t.parquet", "--segments", "4,64", "--json").stdout)
    long = {"segment_tokens": 64, "domain": None}
    assert [find(document, measure=name, level="model", **long)["value"] for name in ("srp", "srp_relative_size")] == [0, 0]
    (shown,) = results_of([document])
    assert shown.shown_segment == 4
    assert [row["value"] is None for row in shown.rows("srp", "model")] == [False, True]
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert page.count('class="plot"') == 8


def test_intervals_follow_their_options(small):
    def ends(*options):
        rows = json.loads(run(small[0], "--segments", "4", "--json", *options).stdout)["rows"]
        return [(row["ci_low"], row["ci_high"]) for row in rows if row["measure"] in ("srp", "sch", "hit_rate")]

    assert set(ends("--replicates", "0")) == {(None, None)}
    assert ends("--seed", "1") == ends("--seed", "1") != ends("--seed", "2")


def test_ranges_of_documents_and_a_domain(small):
    for options, documents, domains in (
        (("--documents", "0-2"), 3, ["<b>", "a"]),
        (("--documents", "1,3"), 2, ["<b>"]),
        (("--domain", "a"), 2, ["a"]),
        (("--documents", "0-998", "--phase", "decode"), 4, ["<b>", "a"]),
    ):
        done = run(small[0], "--json", "--segments", "4", "--replicates", "0", *options)
        about = json.loads(done.stdout)["trace"]
        assert (about["documents"], about["domains"], about["phases"]) == (documents, domains, ["decode"])
    for options, said in (
        (("--documents", "7"), "documents 0-3"),
        (("--domain", "c"), "<b>, a"),
        (("--documents", "3-1"), "0-998"),
    ):
        done = run(small[0], *options)
        assert done.exit_code == 2 and said in done.stderr
