"""What every verb does with the files it writes: nothing is replaced unasked, no input ever; all is asked before the work."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from swapless.trace import Trace, TraceHeader, write_trace


def _trace(path, seed=0):
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((64, 2, 8)), axis=2)[:, :, :2].astype(np.int16)
    header = TraceHeader(model_id="small", num_experts=8, top_k=2, moe_blocks=(0, 1), hidden_size=64, moe_intermediate_size=32)
    write_trace(path, Trace.from_arrays(header, expert_ids=ids, document=np.repeat([0, 1], 32), phase="decode"))
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A trace, a predictor fitted to it, a text, and the result of a run of oracle."""
    from swapless.predict import make_predictor
    from swapless.predict.saved import save_predictor
    from swapless.trace import read_trace

    folder = tmp_path_factory.mktemp("inputs")
    save_predictor(folder / "p", make_predictor("popularity").fit(read_trace(_trace(folder / "t.parquet"))))
    (folder / "text.txt").write_text("The cat sat on the mat. The dog saw it.")
    (folder / "result.json").write_text("{}")
    return folder


@pytest.fixture
def calls(inputs, checkpoint):
    """Each verb with a file to write: its arguments, the option that names the file, and its inputs."""
    few = ("--resident", "50%", "--threads", 1)
    trace, predictor, text = inputs / "t.parquet", inputs / "p", inputs / "text.txt"
    return {
        "run": ((checkpoint, "--prompt", "The", "--max-new-tokens", 2, *few), "--record", ()),
        "record": ((checkpoint, "--text", text, "--max-tokens", 4, *few), "--out", (text,)),
        "locality": ((trace, "--replicates", 0), "--html", (trace,)),
        "simulate": ((trace, "--policy", "lru"), "--html", (trace,)),
        "predict train": ((trace, "--kind", "popularity"), "--out", (trace,)),
        "predict eval": ((predictor, trace, "--lead", "1"), "--html", (predictor, trace)),
    }


NAMES = ["run", "record", "locality", "simulate", "predict train", "predict eval"]


def test_every_verb_that_writes_is_looked_at():
    import typer.main

    from swapless.cli.main import app

    verbs = {}
    for name, command in typer.main.get_command(app).commands.items():
        verbs |= {f"{name} {sub}": found for sub, found in getattr(command, "commands", {name: command}).items()}
    files = {
        name.removesuffix(f" {name.split()[0]}")
        for name, verb in verbs.items()
        if {"--out", "--html", "--record", "--force"} & {option for parameter in verb.params for option in parameter.opts}
    }
    assert files == {*NAMES, "oracle compare", "pack", "oracle fit"}


@pytest.mark.parametrize("name", NAMES)
def test_what_exists_stays_without_force(calls, name, tmp_path, swapless):
    arguments, option, _ = calls[name]
    target = tmp_path / "mine"
    target.write_text("mine")
    done = swapless(*name.split(), *arguments, option, target)
    assert (done.exit_code, done.stdout) == (2, ""), done.stderr
    assert "exists already" in done.stderr and "--force" in done.stderr and str(target) in done.stderr
    assert target.read_text() == "mine"
    done = swapless(*name.split(), *arguments, option, target, "--force")
    assert done.exit_code == 0, done.stderr
    assert target.read_bytes()[:4] != b"mine"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "run"])
@pytest.mark.parametrize("link", [None, os.link, os.symlink])
def test_an_input_is_never_the_output(calls, name, link, tmp_path, swapless):
    arguments, option, sources = calls[name]
    for source in sources:
        before, target = source.read_bytes(), source
        if link is not None:
            target = tmp_path / f"to-{source.name}"
            link(source, target)
        done = swapless(*name.split(), *arguments, option, target, "--force")
        assert (done.exit_code, done.stdout) == (2, ""), done.stderr
        assert "input" in done.stderr
        assert source.read_bytes() == before


@pytest.mark.parametrize("verb", ["run", "record"])
def test_a_file_of_the_checkpoint_is_never_the_output(calls, verb, copy, swapless):
    (_, *rest), option, _ = calls[verb]
    shard = copy / "model.safetensors"
    before = shard.read_bytes()
    done = swapless(verb, copy, *rest, option, shard, "--force")
    assert (done.exit_code, done.stdout) == (2, ""), done.stderr
    assert shard.read_bytes() == before


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["folder", "nowhere/page", "file/page", "device", "long", "link"])
def test_where_nothing_can_be_written(calls, name, where, tmp_path, swapless):
    arguments, option, _ = calls[name]
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("a file")
    (tmp_path / "link").symlink_to("link")
    target = {"device": "/dev/full", "long": tmp_path / ("x" * 300)}.get(where, tmp_path / where)
    done = swapless(*name.split(), *arguments, option, target, "--force")
    assert done.exit_code in (1, 2) and done.stdout == "", done.stderr
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link"]


def test_a_link_is_followed(calls, tmp_path, swapless):
    arguments, option, _ = calls["simulate"]
    (tmp_path / "page").write_text("old")
    (tmp_path / "link").symlink_to("page")
    assert swapless("simulate", *arguments, option, tmp_path / "link").exit_code == 2
    assert swapless("simulate", *arguments, option, tmp_path / "link", "--force").exit_code == 0
    assert (tmp_path / "link").is_symlink() and "<html" in (tmp_path / "page").read_text()


def test_training_goes_to_two_files(inputs, tmp_path, swapless):
    common = ("predict", "train", inputs / "t.parquet", "--kind", "transformer", "--out", tmp_path / "p")
    (tmp_path / "same").symlink_to("p")
    for other in (tmp_path / "p", tmp_path / "same", inputs / "t.parquet"):
        done = swapless(*common, "--checkpoint", other)
        assert (done.exit_code, done.stdout) == (2, ""), done.stderr


def test_folders_of_results(inputs, tmp_path, swapless, checkpoint):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter").write_text("mine")
    (tmp_path / "file").write_text("mine")
    text = inputs / "text.txt"
    verbs = [
        ("pack", checkpoint, "--out"),
        ("oracle", "train", "--corpus", text),
        ("oracle", "fit", checkpoint, "--corpus", text, "--out"),
    ]
    for verb in verbs:
        for target in (tmp_path / "full", tmp_path / "file", tmp_path / "file" / "in"):
            done = swapless(*verb, target)
            assert done.exit_code in (1, 2) and done.stdout == "", (verb, target, done.stderr)
            assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["file", "full", "full/letter"]


def test_oracle_compare_writes_no_result_over(inputs, tmp_path, swapless):
    for target in (inputs / "result.json", tmp_path):
        done = swapless("oracle", "compare", inputs, "--html", target, "--force")
        assert (done.exit_code, done.stdout) == (2, ""), done.stderr
    (tmp_path / "page").write_text("mine")
    done = swapless("oracle", "compare", inputs, "--html", tmp_path / "page")
    assert done.exit_code == 2 and "--force" in done.stderr


@pytest.fixture
def full_disk(tmp_path):
    """A file system of 64 KiB, as a folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"needs a file system of its own: {mounted.stderr.strip()}")
    (folder / "filler").write_bytes(bytes(60 << 10))
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk(calls, name, full_disk, inputs, swapless):
    arguments, option, _ = calls[name]
    if name == "record":
        arguments = (*arguments, "--scores")
    if name == "predict train":
        (full_disk / "more").write_bytes(bytes(4 << 10))
    if name in ("run", "record"):
        (full_disk / "more").write_bytes(bytes(3 << 10))
    done = swapless(*name.split(), *arguments, option, full_disk / "target")
    assert done.exit_code == 1, done.stderr
    assert "disk is full" in done.stderr and "Traceback" not in done.stderr
    assert not (full_disk / "target").exists() and not list(full_disk.glob(".*"))


def test_a_file_that_may_not_grow(calls, tmp_path):
    name = "predict train"
    arguments, option, _ = calls[name]
    command = [*name.split(), *map(str, arguments), option, str(tmp_path / "target")]
    script = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); {MAIN}"
    done = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "Error: " in done.stderr.splitlines()[-1] and not list(tmp_path.iterdir())


MAIN = "from swapless.cli.main import main; main()"


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "arguments", [("--help",), ("--version",), ("info", "{}"), ("simulate", "{}", "--json"), ("locality", "{}", "--json")]
)
def test_a_full_standard_output(arguments, inputs):
    command = [sys.executable, "-c", MAIN, *(part.format(inputs / "t.parquet") for part in arguments)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 1
    assert "stdout" in done.stderr and "No space left" in done.stderr
    assert done.stderr.count("Error: ") == 1 and "Traceback" not in done.stderr


def test_a_closed_standard_output(inputs):
    command = [sys.executable, "-c", MAIN, "info", str(inputs / "t.parquet")]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 1 and "closed" in done.stderr and done.stderr.count("\n") == 1


def test_a_reader_that_goes_away(inputs):
    command = [sys.executable, "-c", MAIN, "simulate", str(inputs / "t.parquet"), "--json", "--quiet"]
    done = subprocess.run(
        ["sh", "-c", '"$@" | head -c 1 >/dev/null', "sh", *command], stderr=subprocess.PIPE, text=True, timeout=300
    )
    assert done.stderr == ""


def test_json_holds_no_letters_that_a_terminal_obeys(tmp_path, swapless):
    ids = np.zeros((3, 1, 1), np.int16)
    header = TraceHeader(model_id="a\x1b[31m\x9b5m\u202eb", num_experts=2, top_k=1, moe_blocks=(0,))
    odd = tmp_path / "odd\x1b[2J.parquet"
    write_trace(odd, Trace.from_arrays(header, expert_ids=ids))
    for arguments in (
        ("info", odd),
        ("info", odd, "--json"),
        ("locality", odd),
        ("locality", odd, "--json"),
        ("simulate", odd),
    ):
        done = swapless(*arguments)
        assert done.exit_code == 0, done.stderr
        shown = done.stdout + done.stderr
        assert not {"\x1b", "\x9b", "\u202e"} & set(shown), shown
        if "--json" in arguments:
            assert json.loads(done.stdout)["header"]["model_id"] == header.model_id
    done = swapless("info", tmp_path / "no\x1b[2J\nsuch")
    assert done.exit_code == 1 and "\x1b" not in done.stderr and done.stderr.count("\n") == 1
