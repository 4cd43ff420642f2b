"""Traces that are broken, one by one, as a user meets them: one message that names the place, exit code 1, nothing printed."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from swapless.testing import random_trace
from swapless.trace import write_trace
from swapless.trace.parquet import table_of_trace

VERBS = {"info": (), "locality": ("--segments", "4", "--replicates", "0", "--json"), "simulate": ("--json",)}
TRACE = random_trace(np.random.default_rng(0), lengths=(40, 30))
SHAPE = {"num_experts": 8, "top_k": 2, "num_blocks": 2}
ANSWER = TRACE.expert_ids[:6].tolist()


def ids_with(row, place, value):
    ids = TRACE.expert_ids.reshape(len(TRACE), -1).copy()
    ids[row, place] = value
    return pa.FixedSizeListArray.from_arrays(pa.array(ids.ravel()), ids.shape[1])


def ragged():
    rows = TRACE.expert_ids.reshape(len(TRACE), -1).tolist()
    return pa.array([*rows[:17], rows[17][:3], *rows[18:]], pa.list_(pa.int16()))


def parquet(name, column):
    def make(folder):
        table = table_of_trace(TRACE)
        pq.write_table(table.set_column(table.schema.get_field_index(name), name, column()), folder / "t.parquet")
        return folder / "t.parquet"

    return make


def shortened(size):
    def make(folder):
        write_trace(folder / "t.parquet", TRACE)
        whole = (folder / "t.parquet").read_bytes()
        (folder / "t.parquet").write_bytes(whole[: int(size * len(whole))])
        return folder / "t.parquet"

    return make


def without_header(folder):
    pq.write_table(table_of_trace(TRACE).replace_schema_metadata(None), folder / "t.parquet")
    return folder / "t.parquet"


def two_models(folder):
    """The rows of another model put behind those of the first one, under its header."""
    table = table_of_trace(TRACE)
    other = table_of_trace(random_trace(np.random.default_rng(1), num_experts=16, lengths=(20,), skew=3.0))
    pq.write_table(pa.concat_tables([table, other.replace_schema_metadata(table.schema.metadata)]), folder / "t.parquet")
    return folder / "t.parquet"


def csv_folder(**change):
    def make(folder):
        for number, broken in enumerate(({}, change)):
            lines = ["Layer ID,Batch Number,Token,Activated Expert IDs"]
            for layer in range(1, 4):
                for row in range(5):
                    ids = [(layer + row + place) % 64 for place in range(6)]
                    if broken.get("range") == (layer, row):
                        ids[2] = 64
                    if broken.get("ragged") == (layer, row):
                        ids = ids[:5]
                    if (layer, row) not in broken.get("lost", ()):
                        lines.append(f'{layer},1,t{row},"{ids}"')
            (folder / f"p{number}.csv").write_text("\n".join(lines) + "\n")
        return folder

    return make


def archive(**arrays):
    def make(folder):
        np.savez(folder / "t.npz", **({"expert_ids": TRACE.expert_ids, "num_experts": 8, "offsets": [0, 40, 70]} | arrays))
        return folder / "t.npz"

    return make


def short_archive(folder):
    path = archive()(folder)
    path.write_bytes(path.read_bytes()[:-200])
    return path


def answers(*lines):
    def make(folder):
        (folder / "t.jsonl").write_text("\n".join(json.dumps(line) for line in (SHAPE, *lines)))
        return folder / "t.jsonl"

    return make


CASES = {
    "parquet empty": (shortened(0), ["truncated", "t.parquet"]),
    "parquet half": (shortened(0.5), ["truncated", "t.parquet"]),
    "parquet no header": (without_header, ["no trace header", "t.parquet"]),
    "parquet id too large": (parquet("expert_ids", lambda: ids_with(33, 2, 8)), ["row 33, moe_layer 1", "Got: 8", "0 to 7"]),
    "parquet id negative": (parquet("expert_ids", lambda: ids_with(50, 1, -2)), ["row 50, moe_layer 0", "Got: -2"]),
    "parquet ragged": (parquet("expert_ids", ragged), ["Ragged", "row 17", "Got: 3", "= 4"]),
    "parquet two models": (two_models, ["row 70", "t.parquet"]),
    "parquet no rows": (
        lambda f: (pq.write_table(table_of_trace(TRACE)[:0], f / "t.parquet"), f / "t.parquet")[1],
        ["one token"],
    ),
    "csv no layer": (csv_folder(lost=[(2, row) for row in range(5)]), ["p1.csv", "layer [2]"]),
    "csv no row": (csv_folder(lost=[(2, 3)]), ["p1.csv", "layer 2", "row 3", "Got: 4 rows"]),
    "csv no row of the first layer": (csv_folder(lost=[(1, 2)]), ["p1.csv", "layer 1", "row 2"]),
    "csv no first layer": (csv_folder(lost=[(1, row) for row in range(5)]), ["p1.csv", "MoE layers", "(2, 3)"]),
    "csv no token": (csv_folder(lost=[(a, b) for a in range(1, 4) for b in range(5)]), ["p1.csv", "without tokens"]),
    "csv ragged": (csv_folder(ragged=(2, 1)), ["p1.csv", "layer 2, row 1", "Got: 5", "Allowed: 6"]),
    "csv id too large": (csv_folder(range=(3, 2)), ["p1.csv", "layer 3", "row 2", "Got: 64"]),
    "npz cut short": (short_archive, ["npz archive"]),
    "npz id too large": (archive(num_experts=4), ["row 0, moe_layer 0", "0 to 3"]),
    "npz empty document": (archive(offsets=[0, 40, 40, 70]), ["without tokens", "document 1"]),
    "npz texts": (archive(num_experts="eight"), ["num_experts", "wrong shape or type"]),
    "answers of two models": (
        answers({"routed_experts": ANSWER, "model": "a/b"}, {"routed_experts": ANSWER, "model": "c/d"}),
        ["different models", "line 3", "c/d"],
    ),
    "answer of another shape": (answers({"routed_experts": [[[1, 2]]]}), ["fit the shape", "line 2"]),
    "answer ragged": (answers({"routed_experts": [[[1, 2], [1]]]}), ["ragged", "line 2"]),
    "answer empty": (answers({"routed_experts": []}), ["without tokens", "line 2"]),
    "answer with a wrong count": (answers({"routed_experts": ANSWER, "prompt_tokens": "x"}), ["prompt_tokens", "line 2"]),
}


@pytest.mark.few(10)
@pytest.mark.parametrize("case", CASES)
def test_a_broken_trace_ends_in_one_message(swapless, tmp_path, case):
    make, said = CASES[case]
    path = make(tmp_path)
    for verb, options in VERBS.items():
        done = swapless(verb, path, *options)
        assert (done.exit_code, done.stdout) == (1, ""), (verb, done.stderr)
        assert done.stderr.startswith("Error: ") and "Traceback" not in done.stderr
        for words in said if verb != "simulate" else said[:1]:
            assert words in done.stderr, (verb, words, done.stderr)


def test_the_broken_one_of_several_traces_is_named(swapless, tmp_path):
    write_trace(tmp_path / "good.parquet", TRACE)
    broken = parquet("expert_ids", lambda: ids_with(33, 2, 8))(tmp_path)
    done = swapless("locality", tmp_path / "good.parquet", broken, "--segments", 4, "--json")
    assert (done.exit_code, done.stdout) == (1, "")
    assert str(broken) in done.stderr


@pytest.mark.parametrize("make", [csv_folder(), archive(), answers({"routed_experts": ANSWER, "prompt_tokens": 2})])
def test_foreign_traces_are_known_by_content_to_every_verb(swapless, tmp_path, make):
    path = make(tmp_path)
    if path.is_file():
        path = path.rename(tmp_path / "checkpoint.bin")
    shown = swapless("info", path, "--json")
    assert shown.exit_code == 0, shown.stderr
    facts = json.loads(shown.stdout)
    assert facts["kind"] == "trace" and facts["tokens"] == facts["phases"]["prefill"] + facts["phases"]["decode"]
    assert facts["documents"] == (1 if facts["tokens"] == 6 else 2)
    assert swapless("locality", path, *VERBS["locality"]).exit_code == 0
    done = swapless("simulate", path, *VERBS["simulate"])
    if facts["phases"]["decode"]:
        assert done.exit_code == 0, done.stderr
    else:  # nothing to judge
        assert (done.exit_code, done.stdout) == (1, "") and "no decode steps" in done.stderr
    assert "documents" in swapless("info", path).stdout


@pytest.mark.parametrize("content", ['{"layers": [[1, 2]]}', "INFO layer 0 experts [1, 2]\n", "layer,expert\n0,3\n"])
def test_a_file_of_ones_own_making_is_told_which_forms_are_read(swapless, tmp_path, content):
    path = tmp_path / "routing.log"
    path.write_text(content)
    for verb, options in VERBS.items():
        done = swapless(verb, path, *options)
        assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
        for words in (str(path), "layer", "moe-beyond", "npz", "routed_experts", "docs/formats/trace.md"):
            assert words in done.stderr, (verb, done.stderr)
    done = swapless("plan", path, "--memory", "2GiB")
    assert done.exit_code == 1 and str(path) in done.stderr and "layer" in done.stderr


def test_nothing_in_a_trace_is_obeyed_by_a_terminal(tmp_path, swapless):
    header = replace(TRACE.header, model_id="m\x1b[2J", source="\x1b]0;title\x07", notes="\u202e backwards")
    write_trace(tmp_path / "t.parquet", replace(TRACE, header=header, domains=("\x1b[31m",), domain=TRACE.domain * 0))
    done = swapless("info", tmp_path / "t.parquet")
    assert done.exit_code == 0 and "m\\x1b[2J" in done.stdout
    assert all(letter.isprintable() or letter == "\n" for letter in done.stdout + done.stderr)
