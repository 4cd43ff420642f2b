"""A trace recorded from the embedded model, prefill and decode, and all that can be measured on it; no weight is assumed."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from swapless.notation import Phase
from swapless.trace import TraceFile, read_trace

TEXTS = {
    "tale": "The cat sat on the mat. The cat saw the dog. The dog saw the cat. The cat sat on the dog. " * 4,
    "maths": "One and one is two. Two and two is four. Four and four is eight. " * 5,
}
DECODED = 6
MEASURES = {
    "srp", "srp_relative_size", "activation_rate", "srp_floor", "srp_shuffled", "sch", "hit_rate", "hit_rate_shuffled",
    "overlap", "reuse_within", "working_set", "load_entropy", "load_variation", "load_deviation", "load_share",
    "specialization", "specialization_srp_correlation",
}  # fmt: skip


@pytest.fixture(scope="module", params=[False, True], ids=["ids", "scores"])
def recorded(request, checkpoint, tmp_path_factory):
    """Two documents of each domain, with some decode steps after each."""
    from typer.testing import CliRunner

    from swapless.cli.main import app

    folder = tmp_path_factory.mktemp("recorded")
    texts = [TEXTS[name] for name in (*TEXTS, *TEXTS)]
    pq.write_table(pa.table({"text": texts, "domain": [*TEXTS, *TEXTS]}), folder / "corpus.parquet")
    arguments = ["record", checkpoint, "--corpus", folder / "corpus.parquet", "--decode", DECODED, "--max-tokens", 60]
    arguments += ["--resident", "50%", "--out", folder / "t.parquet", "--json", *(["--scores"] if request.param else [])]
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.stderr
    trace = read_trace(folder / "t.parquet")
    assert json.loads(done.stdout) == {"trace": str(folder / "t.parquet"), "tokens": len(trace)}
    return folder / "t.parquet", trace, request.param


@pytest.mark.few(1)
def test_rows_phases_and_columns(recorded):
    path, trace, scores = recorded
    assert (trace.num_documents, trace.domains) == (4, ("tale", "maths"))
    assert set(trace.columns) >= {"token_id", "token", "step", "gate_weights"}
    assert (trace.router_scores is not None) == scores
    decode = np.bincount(trace.document[trace.phase == Phase.DECODE], minlength=4)
    prefill = np.bincount(trace.document[trace.phase == Phase.PREFILL])
    assert prefill.min() > 16 and 0 < decode.max() <= DECODED  # a text may end early
    with TraceFile(path) as file:
        assert file.in_pieces
    if scores:
        chosen = np.take_along_axis(trace.router_scores, trace.expert_ids.astype(np.int64), axis=2)
        best = np.sort(trace.router_scores, axis=2)[:, :, -trace.top_k :]
        assert np.array_equal(np.sort(chosen, axis=2), best)


def test_the_same_document_is_routed_the_same_every_time(recorded):
    _, trace, _ = recorded
    for first, second in ((0, 2), (1, 3)):
        a, b = (trace.rows(trace.document == number) for number in (first, second))
        assert np.array_equal(a.expert_ids, b.expert_ids)
        assert a.tokens == b.tokens


@pytest.mark.few(1)
def test_every_measure_and_the_page(recorded, swapless, tmp_path):
    path, trace, _ = recorded
    shown = json.loads(swapless("info", path, "--json").stdout)
    assert shown["tokens"] == len(trace) and set(shown["columns"]) == set(trace.columns)
    for phase in ((), ("--phase", "prefill"), ("--phase", "decode")):
        done = swapless("locality", path, "--segments", "4,16", "--cache-ratios", "1,2", "--json", *phase)
        assert done.exit_code == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["trace"]["phases"] == ([phase[1]] if phase else ["prefill", "decode"])
        measures = {row["measure"] for row in found["rows"]}
        assert measures == MEASURES if not phase else measures <= MEASURES
        rates = [
            row["value"] for row in found["rows"] if row["measure"] in ("srp", "sch", "hit_rate") and row["value"] is not None
        ]
        assert rates and min(rates) >= 0 and max(rates) <= 1
        if phase != ("--phase", "decode"):
            assert all(row["value"] is not None for row in found["rows"] if row["measure"] in ("sch", "hit_rate", "overlap"))
            assert {row["variant"] for row in found["rows"] if row["measure"] == "specialization"} == {
                "domain", "vocabulary_in", "vocabulary_out",
            }  # fmt: skip
    done = swapless("locality", path, "--html", tmp_path / "page.html")
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count('class="plot"') == 8


def test_a_text_and_prompts(swapless, checkpoint, tmp_path):
    (tmp_path / "text.txt").write_text(TEXTS["tale"], encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("One and one\n\nThe cat sat\n", encoding="utf-8")
    for option, name, documents in (("--text", "text.txt", 1), ("--prompts", "prompts.txt", 2)):
        done = swapless(
            "record", checkpoint, option, tmp_path / name, "--out", tmp_path / f"{name}.parquet", "--max-tokens", 20
        )
        assert done.exit_code == 0, done.stderr
        trace = read_trace(tmp_path / f"{name}.parquet")
        assert trace.num_documents == documents and (trace.phase == Phase.PREFILL).sum() == documents


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 2, "exactly one of --text"),
        (("--text", "none.txt"), 2, "no such file"),
        (("--prompts", "empty.txt"), 2, "no document"),
        (("--text", "latin.txt"), 2, "not UTF-8"),
        (("--text", "fine.txt", "--out", "no/folder/t.parquet"), 2, "folder for --out"),
        (("--text", "fine.txt", "--decode", "100000"), 1, "no room"),
        (("--corpus", "fine.txt"), 1, "Not a Parquet file"),
    ],
)
def test_what_cannot_be_recorded(swapless, checkpoint, tmp_path, monkeypatch, arguments, code, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "fine.txt").write_text("The cat")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    done = swapless("record", checkpoint, "--out", tmp_path / "t.parquet", *arguments)
    assert (done.exit_code, done.stdout) == (code, ""), done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "t.parquet").exists()
