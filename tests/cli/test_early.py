"""What is refused before torch is imported, and what is said of figures that this machine cannot give."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from swapless.cli.progress import TimeLeft, shown_progress
from swapless.processors import processors
from swapless.trace import Trace, TraceHeader, write_trace
from swapless.units import format_rate, parse_size

CASES = """
    run {nowhere} --prompt x
    run {empty} --prompt x
    run {model} --prompt x --memory 8G
    run {model} --prompt x --memory 99999999TiB
    run {model} --prompt x --resident 0
    run {model} --prompt x --policy lur
    run {model} --prompt x --prefetch nothing
    run {model} --prompt x --temperature nan
    run {model} --prompt x --top-p nan
    run {model} --prompt x --record {taken}
    run {model} --chat --json
    record {nowhere} --text {text} --out {new}
    record {model} --text {nowhere} --out {new}
    record {model} --text {text} --out {taken}
    perplexity {model} --text {nowhere}
    perplexity {nowhere} --text {text}
    pack {nowhere} --out {new}
    pack {model} --out {taken}
    pack {model} --out {new} --bits 3
    pack {model} --out {new} --bits 4 --group 5
    pack {model} --out {new} --dense-bits 2
    plan {nowhere} --memory 8GiB
    plan {model} --memory 8G
    plan {model} --memory 8GiB --trace {nowhere}
    plan {model} --memory 8GiB --recall nan
    plan {model} --memory 8GiB --recall 1.1
    verify {nowhere}
    simulate {nowhere}
    simulate {trace} --policy lru,lur
    simulate {trace} --capacity 0
    simulate {trace} --device floppy
    simulate {trace} --device sata --prefetch clairvoyant --predictor-ms inf
    simulate {trace} --html {taken}
    locality {nowhere}
    locality {trace} --segments 0
    predict train {nowhere} --kind popularity --out {new}
    predict train {trace} --kind transformer --out {new} --minutes nan
    predict train {trace} --kind transformer --out {new} --minutes -1
    predict train {trace} --kind nothing --out {new}
    predict train {trace} --kind popularity --out {taken}
    predict eval {nowhere} {trace}
    oracle train {new} --corpus {nowhere}
    oracle train {taken} --corpus {text}
    oracle fit {nowhere} --corpus {nowhere} --out {new}
    oracle fit {nowhere} --corpus {text} --out {taken}
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory, checkpoint):
    folder = tmp_path_factory.mktemp("early")
    (folder / "empty").mkdir()
    (folder / "text.txt").write_text("The cat sat on the mat.")
    (folder / "taken").write_text("mine")
    ids = np.arange(400, dtype=np.int16).reshape(100, 2, 2) % 16
    header = TraceHeader(model_id="m", num_experts=16, top_k=2, moe_blocks=(0, 1), expert_bytes=1 << 20)
    write_trace(folder / "t.parquet", Trace.from_arrays(header, expert_ids=ids, phase="decode"))
    names = {"nowhere": "nowhere/x", "empty": "empty", "text": "text.txt", "taken": "taken", "new": "new", "trace": "t.parquet"}
    return {name: str(folder / path) for name, path in names.items()} | {"model": checkpoint}


def test_wrong_arguments_are_refused_before_torch_is_imported(places):
    calls = [line.split() for line in CASES.strip().splitlines()]
    calls = [[word.format(**places) for word in call] for call in calls]
    code = (
        "import json, sys\nfrom typer.testing import CliRunner\nfrom swapless.cli.main import app\n"
        "for call in json.load(sys.stdin):\n"
        "    done = CliRunner().invoke(app, call)\n"
        "    print(json.dumps([done.exit_code, done.stdout, done.stderr, 'torch' in sys.modules]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(calls), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for call, line in zip(calls, done.stdout.splitlines(), strict=True):
        exit_code, stdout, stderr, torch = json.loads(line)
        assert exit_code in (1, 2) and not stdout and stderr.strip(), (call, exit_code, stdout, stderr)
        assert not torch, call


def test_more_threads_than_processors_is_said(swapless, checkpoint):
    done = swapless("run", checkpoint, "--resident", "50%", "--prompt", "x", "--max-new-tokens", 2, "--threads", 999, "-q")
    assert done.exit_code == 0, done.stderr
    assert f"Warning: --threads 999 is more than the {processors()} processors here" in done.stderr
    assert done.stderr.count("\n") == 1


def test_more_memory_than_there_is_is_said(swapless, checkpoint):
    done = swapless("run", checkpoint, "--memory", "99999TiB", "--prompt", "x", "--max-new-tokens", 2, "-q")
    assert done.exit_code == 0, done.stderr
    assert done.stderr.startswith("Warning: --memory 99999.00 TiB is more than the ") and done.stderr.count("\n") == 1


def test_a_share_that_became_another_is_said(swapless, places, checkpoint):
    done = swapless("simulate", places["trace"], "--policy", "lru", "--capacity", "0.1,0.25,3")
    assert done.exit_code == 0 and "10% became 12.5%, 2 experts" in done.stderr and done.stderr.count("became") == 1
    assert "2 (12.5%)" in done.stdout and "3 (18.8%)" in done.stdout
    done = swapless("run", checkpoint, "--resident", "0.5%", "--prompt", "x", "--max-new-tokens", 2)
    assert "0.5% became 1.04%, 1 experts" in done.stderr
    done = swapless("run", checkpoint, "--resident", "50%", "--prompt", "x", "--max-new-tokens", 2)
    assert "became" not in done.stderr


@pytest.mark.parametrize(
    ("value", "shown"),
    [(352.704, "353"), (99.96, "100"), (12.345, "12.3"), (1.2345, "1.23"), (0.28712, "0.287"), (0, "0")],
)
def test_speeds_have_three_digits(value, shown):
    assert format_rate(value) == shown


def test_sizes_beyond_all_memory_are_refused():
    from swapless.errors import UnitError

    assert parse_size("99999TiB") == 99999 << 40
    for text in ("99999999TiB", "9" * 400 + "GiB", 2**63):
        with pytest.raises(UnitError):
            parse_size(text)


def test_time_left_follows_the_pace_and_begins_anew_with_a_stage():
    left = TimeLeft(now=0.0)
    assert left.seconds(now=1.0) is None
    left.update(0.5, now=10.0)  # from where a stopped run goes on, not from zero
    assert left.seconds(now=10.0) is None
    left.update(0.75, now=20.0)
    assert left.seconds(now=20.0) == pytest.approx(10.0)
    left.update(0.1, now=30.0)
    assert left.seconds(now=31.0) is None
    left.update(0.2, now=32.0)
    assert left.seconds(now=32.0) == pytest.approx(16.0)


def test_where_there_is_no_terminal_a_line_comes_now_and_then(monkeypatch):
    import threading

    from swapless.cli import progress

    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.05)
    said, enough = [], threading.Event()

    def say(line):
        said.append(line)
        if len(said) == 3:
            enough.set()

    with shown_progress(False, say) as report:
        report("reading", 0.25)
        report("reading", 0.5)
        assert enough.wait(60)
    assert all(line.startswith("reading, ") and "50% done" in line and "left" in line for line in said)
    assert not [thread for thread in threading.enumerate() if thread.name == "swapless-progress"]


def test_every_seed_is_one_that_every_library_takes(swapless, checkpoint):
    import typer.main

    from swapless.cli.main import app

    def seeds(command):
        yield from (parameter.max for parameter in command.params if "--seed" in parameter.opts)
        for below in getattr(command, "commands", {}).values():
            yield from seeds(below)

    found = list(seeds(typer.main.get_command(app)))
    assert len(found) >= 5 and set(found) == {2**32 - 1}
    done = swapless("run", checkpoint, "--prompt", "x", "--temperature", 1, "--seed", 2**70)
    assert done.exit_code == 2 and "--seed" in done.stderr and done.exception.__class__ is SystemExit


def test_columns_of_which_nothing_is_known_are_left_out(swapless, places, tmp_path):
    options = ("--policy", "lru", "--capacity", "4")
    done = swapless("simulate", places["trace"], *options)
    assert "4.00 MiB" in done.stdout and "tokens per s" not in done.stdout and " - " not in done.stdout
    done = swapless("simulate", places["trace"], *options, "--device", "NVMe Gen4", "--prefetch", "clairvoyant")
    assert "tokens per s" in done.stdout and "4.00 MiB" in done.stdout and "-0.0" not in done.stdout
    ids = np.arange(40, dtype=np.int16).reshape(40, 1, 1) % 4
    header = TraceHeader(model_id="m", num_experts=4, top_k=1, moe_blocks=(0,))
    write_trace(tmp_path / "t.parquet", Trace.from_arrays(header, expert_ids=ids, phase="decode"))
    done = swapless("simulate", tmp_path / "t.parquet", "--policy", "lru", "--capacity", "2")
    assert "read a token" not in done.stdout and "--expert-bytes" in done.stderr


def test_a_perplexity_of_few_tokens_is_told_to_be_one(swapless, checkpoint, places):
    options = ("--text", places["text"], "--resident", "100%")
    done = swapless("perplexity", checkpoint, *options)
    assert done.exit_code == 0 and "tokens say little of a model" in done.stderr
    assert not swapless("perplexity", checkpoint, *options, "--quiet").stderr


@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_document_is_one_message(swapless, checkpoint, tmp_path, empty):
    (tmp_path / "t.txt").write_text(empty)
    options = ("--text", tmp_path / "t.txt", "--out", tmp_path / "t.parquet", "--resident", "50%", "--quiet")
    done = swapless("record", checkpoint, *options)
    if done.exit_code:  # spaces are a token to some tokenizers
        assert done.exit_code == 1 and "document 0" in done.stderr and "no tokens" in done.stderr
        assert not (tmp_path / "t.parquet").exists()
    assert bool(done.exit_code) == (not empty)


def test_a_corpus_without_texts_is_one_message(swapless, checkpoint, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    cases = {
        "no column text": pa.table({"words": ["a"]}),
        "does not hold texts": pa.table({"text": [1, 2]}),
        "domain": pa.table({"text": ["a"], "domain": [1]}),
        "no document": pa.table({"text": pa.array([], pa.string())}),
        "row 1": pa.table({"text": ["The cat.", None]}),
    }
    for words, table in cases.items():
        pq.write_table(table, tmp_path / "corpus.parquet")
        options = ("--corpus", tmp_path / "corpus.parquet", "--out", tmp_path / "t.parquet", "--resident", "50%", "--quiet")
        done = swapless("record", checkpoint, *options)
        assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1), (words, done.stderr)
        assert words in done.stderr and "corpus.parquet" in done.stderr
        assert not (tmp_path / "t.parquet").exists()
    for kind in (pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        table = pa.table({"text": pa.array(["The cat.", "A dog."], kind), "domain": pa.array(["a", "b"], kind)})
        pq.write_table(table, tmp_path / "corpus.parquet")
        done = swapless("record", checkpoint, *options, "--max-tokens", 2, "--force")
        assert done.exit_code == 0, done.stderr
    (tmp_path / "prompts.txt").write_text("\n \n")
    done = swapless("record", checkpoint, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "u.parquet", "-q")
    assert done.exit_code == 2 and "no document" in done.stderr and "prompts.txt" in done.stderr
