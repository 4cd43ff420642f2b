"""The recipes for a policy and a predictor run as they are printed: from a package outside, which is then gone again."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from swapless.cli.main import app
from swapless.trace import Trace, TraceHeader, write_trace

DOCS = Path(__file__).resolve().parents[2] / "docs"


def _block(page: str, language: str) -> str:
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.search(rf"^   ```{language}\n(.*?)^   ```", text, re.MULTILINE | re.DOTALL)
    assert found, page
    return "".join(line[3:] if line.strip() else "\n" for line in found[1].splitlines(keepends=True))


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((200, 2, 8)), axis=2)[:, :, :2].astype(np.int16)
    path = tmp_path_factory.mktemp("trace") / "t.parquet"
    header = TraceHeader(model_id="m", num_experts=8, top_k=2, moe_blocks=(0, 1))
    write_trace(path, Trace.from_arrays(header, expert_ids=ids, document=np.repeat([0, 1], 100), phase="decode"))
    return path


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A package ``mine`` with both recipes and the entry points that the pages print, as an installer leaves it."""
    site = tmp_path / "site"
    (site / "mine").mkdir(parents=True)
    (site / "mine" / "__init__.py").write_text("")
    (site / "mine" / "fifo.py").write_text(_block("add-a-policy.md", "python"))
    (site / "mine" / "last_layer.py").write_text(_block("add-a-predictor.md", "python"))
    points = [
        tomllib.loads(_block(page, "toml"))["project"]["entry-points"] for page in ("add-a-policy.md", "add-a-predictor.md")
    ]
    lines = [
        f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items()) for one in points for group, names in one.items()
    ]
    info = site / "mine-1.0.dist-info"
    info.mkdir()
    (info / "entry_points.txt").write_text("\n".join(lines))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    yield site
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        del sys.modules[name]


def _swapless(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_recipes_run_as_printed_and_leave_nothing_behind(outside, trace, tmp_path):
    done = _swapless("simulate", trace, "--policy", "fifo,lru", "--capacity", "4", "--json")
    assert done.exit_code == 0, done.output
    fifo, lru = json.loads(done.stdout)
    assert fifo["policy"] == "fifo" and fifo["requests"] == lru["requests"] and 0 < fifo["hits"] != lru["hits"]

    done = _swapless("predict", "train", trace, "--kind", "last_layer", "--out", tmp_path / "p")
    assert done.exit_code == 0, done.output
    done = _swapless("predict", "eval", tmp_path / "p", trace, "--lead", "1,token", "--json")
    assert done.exit_code == 0, done.output
    assert all(row["causal"] for row in json.loads(done.stdout))

    shutil.rmtree(outside)
    importlib.invalidate_caches()
    command = [sys.executable, "-m", "swapless"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path and path != str(outside))}
    for arguments, code, said in (
        (("simulate", trace, "--policy", "lru", "--capacity", "4"), 0, ""),
        (("simulate", trace, "--policy", "fifo", "--capacity", "4"), 2, "Unknown policy 'fifo'"),
        (("predict", "eval", tmp_path / "p", trace), 2, "Unknown predictor 'last_layer'"),
    ):
        done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=600, env=environment)
        assert (done.returncode, said in done.stderr, "Traceback" in done.stderr) == (code, True, False), done.stderr


def test_a_recipe_computes_what_it_says(outside, trace):
    from swapless.predict import make_predictor
    from swapless.trace import read_trace

    whole = read_trace(trace)
    scores = make_predictor("last_layer").fit(whole).scores_batch(whole, 1)
    chosen = np.zeros((len(whole), 8), bool)
    np.put_along_axis(chosen, whole.expert_ids[:, 0].astype(np.int64), True, axis=1)
    assert np.array_equal(scores[:, 1] == 1.0, chosen)
