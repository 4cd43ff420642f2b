"""Changed sources, folders that cannot be written, two processes at once, plug-ins that go: the right code runs.

Each test copies the sources and runs processes over the copy, as an installer, an editor or a container would leave it.
"""

from __future__ import annotations

import json
import os
import py_compile
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import swapless

SOURCES = Path(swapless.__file__).parent
OLD = 1_000_000_000

RENEW = """
import numpy as np
from swapless.cache.ring import renew
after, before = np.arange(4, dtype=np.uint32), np.arange(4, dtype=np.uint32)
for key in (0, 1, 2, 0):
    renew(before, after, np.uint64(3), np.uint64(key))
print(after.tolist(), sum(renew.stats.cache_hits.values()))
"""
RIGHT, CHANGED = "[2, 3, 1, 0]", "[3, 2, 2, 2]"
"""What the ring says by its own rule, and by that of :func:`change`."""


@pytest.fixture
def copy(tmp_path):
    """A folder that holds a copy of the package without its weights."""
    shutil.copytree(SOURCES, tmp_path / "src" / "swapless", ignore=shutil.ignore_patterns("__pycache__", "embedded", "cli"))
    (tmp_path / "tmp").mkdir()
    return tmp_path


def run(copy: Path, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SWAPLESS", "NUMBA", "PYTHON", "XDG"))}
    clean |= {"PYTHONPATH": str(copy / "src"), "SWAPLESS_CACHE_DIR": str(copy / "cache"), "TMPDIR": str(copy / "tmp")}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=clean | environment, cwd=copy)


def said(copy: Path, script: str, **environment: str) -> str:
    done = run(copy, script, **environment)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.strip()


def change(copy: Path, *, when: int | None = None) -> None:
    """Let a function that another inlines do something else, in as many bytes; ``when`` sets the time of its file."""
    ring = copy / "src" / "swapless" / "cache" / "ring.py"
    old, new = "    after[head] = key\n", "    after[head] = 0x2\n"
    text = ring.read_text()
    assert text.count(old) == 1
    ring.write_text(text.replace(old, new))
    if when is not None:
        os.utime(ring, (when, when))


def everything(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def test_a_changed_rule_runs_whatever_its_time_and_numbas_own_cache(copy):
    before = everything(copy / "src")
    numba = copy / "numba"
    given = {"NUMBA_CACHE_DIR": str(numba), "PYTHONDONTWRITEBYTECODE": "1"}
    assert said(copy, RENEW, **given) == f"{RIGHT} 0"
    assert said(copy, RENEW, PYTHONDONTWRITEBYTECODE="1") == f"{RIGHT} 1"
    change(copy, when=OLD)
    assert said(copy, RENEW, **given) == f"{CHANGED} 0"
    assert not numba.exists() and everything(copy / "src") == before


@pytest.mark.slow
def test_code_of_stale_bytecode_is_not_that_of_the_sources(copy):
    ring = copy / "src" / "swapless" / "cache" / "ring.py"
    when = int(ring.stat().st_mtime)
    os.utime(ring, (when, when))
    py_compile.compile(str(ring), doraise=True)
    change(copy, when=when)
    assert said(copy, RENEW) == f"{RIGHT} 0"  # by size and time nothing has changed: Python itself runs what it kept
    shutil.rmtree(ring.parent / "__pycache__")
    assert said(copy, RENEW) == f"{CHANGED} 0"


def test_without_a_cache_folder_one_that_passes_is_used(copy):
    (copy / "file").write_text("in the way")
    given = {"SWAPLESS_CACHE_DIR": str(copy / "file" / "cache")}
    done = run(copy, RENEW, **given)
    assert done.stdout.strip() == f"{RIGHT} 0" and done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert "file/cache" in line and str(copy / "tmp") in line and "SWAPLESS_CACHE_DIR" in line
    assert said(copy, RENEW, **given) == f"{RIGHT} 1"


def test_where_nothing_can_be_written_one_line_says_so(copy):
    (copy / "file").write_text("in the way")
    (copy / "tmp" / f"swapless-{os.getuid()}").write_text("here too")
    done = run(copy, RENEW, SWAPLESS_CACHE_DIR=str(copy / "file" / "cache"))
    assert done.stdout.strip() == f"{RIGHT} 0" and done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert "anew in every process" in line


@pytest.mark.slow
def test_processes_that_compile_at_once(copy):
    clean = {**os.environ, "PYTHONPATH": str(copy / "src"), "SWAPLESS_CACHE_DIR": str(copy / "cache")}
    command = [sys.executable, "-c", RENEW]
    at_once = [subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=clean, cwd=copy) for _ in range(3)]
    for process in at_once:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0 and not err and out.startswith(RIGHT)
    assert not list((copy / "cache").rglob("*.part"))
    assert said(copy, RENEW) == f"{RIGHT} 1"


PLUG_IN = """
from typing import NamedTuple
import numpy as np
from swapless.cache.policy import rules
from counting_steps import STEP

class CountingState(NamedTuple):
    seen: np.ndarray

def _on_document(state, residency):
    state.seen[0] += STEP

rules(CountingState, on_document=_on_document)

class Counting:
    name = "counting"

    def state(self, num_moe_layers, num_experts, pools):
        return CountingState(np.zeros(1, np.int64))
"""

BEGIN = """
import sys
from swapless.cache import POLICIES
from swapless.cache.serve import ExpertCache, _begun
cache = ExpertCache(POLICIES.get(sys.argv[1] if len(sys.argv) > 1 else NAME)(), 1, 2, [0], [1])
cache.begin_document()
print(cache._state[0].tolist(), sum(_begun.stats.cache_hits.values()))
"""


@pytest.fixture
def plug_in(copy):
    """A package of its own beside the copy, as an installer leaves it."""
    folder = copy / "plug"
    (folder / "counting-1.0.dist-info").mkdir(parents=True)
    (folder / "counting.py").write_text(PLUG_IN)
    (folder / "counting_steps.py").write_text("STEP = 1\n")
    (folder / "counting-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: counting\nVersion: 1.0\n")
    (folder / "counting-1.0.dist-info" / "entry_points.txt").write_text("[swapless.policies]\ncounting = counting:Counting\n")
    return folder


def begin(copy: Path, name: str) -> str:
    return said(copy, f"NAME = {name!r}\n" + BEGIN, PYTHONPATH=f"{copy / 'src'}{os.pathsep}{copy / 'plug'}")


@pytest.mark.slow
def test_a_plug_in_that_changes_and_goes(copy, plug_in):
    assert begin(copy, "counting") == "[1] 0"
    assert begin(copy, "counting") == "[1] 1"
    assert begin(copy, "lru").endswith(" 0")
    (plug_in / "counting_steps.py").write_text("STEP = 2\n")  # as long, and older
    os.utime(plug_in / "counting_steps.py", (OLD, OLD))
    assert begin(copy, "counting") == "[2] 0"
    kept = [path.parent.name for path in everything(copy / "cache") if path.suffix == ".code"]
    assert kept.count("plugins") == 2
    shutil.rmtree(plug_in)
    assert begin(copy, "lru").endswith(" 1")


FIFO = """
from typing import NamedTuple
import numpy as np
from swapless.cache.policy import rules
from swapless.cache.residency import may_go

class FifoState(NamedTuple):
    entered: np.ndarray

def _on_insert(state, residency, pool, key, clock, phase):
    state.entered[key] = clock

def _victim(state, residency, pool, clock):
    best, oldest = np.int32(-1), np.iinfo(np.int64).max
    for slot in range(residency.pool_start[pool], residency.pool_start[pool + 1]):
        if may_go(residency, slot, clock):
            entered = state.entered[residency.key_of_slot[slot]]
            if entered < oldest:
                best, oldest = np.int32(slot), entered
    return best

rules(FifoState, on_insert=_on_insert, victim=_victim)

class Counting:
    name = "counting"

    def state(self, num_moe_layers, num_experts, pools):
        return FifoState(np.zeros(num_moe_layers * num_experts, np.int64))
"""


@pytest.mark.slow
def test_the_command_line_with_a_plug_in_that_changes_and_goes(copy, plug_in):
    for name in ("cli", "embedded"):
        shutil.copytree(SOURCES / name, copy / "src" / "swapless" / name)
    trace = Path(__file__).parents[1] / "data" / "gpt-oss-20b.sample.parquet"
    paths = {"PYTHONPATH": f"{copy / 'src'}{os.pathsep}{plug_in}"}

    def rates(*policies: str) -> list[float]:
        given = ["simulate", str(trace), "--policy", ",".join(policies), "--capacity", "0.25", "--json"]
        done = run(copy, f"import sys; sys.argv[1:] = {given!r}\nfrom swapless.cli.main import main; main()", **paths)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        return [row["hit_rate"] for row in json.loads(done.stdout)]

    def spoken(policy: str) -> str:
        model = copy / "src" / "swapless" / "embedded"
        given = ["run", str(model), "--resident", "50%", "--policy", policy, "--prompt", "def main():", "--max-new-tokens", "8"]
        done = run(copy, f"import sys; sys.argv[1:] = {given!r}\nfrom swapless.cli.main import main; main()", **paths)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        return done.stdout

    (plug_in / "counting.py").write_text(FIFO)
    fifo, lru = rates("counting", "lru")
    assert rates("counting", "lru") == [fifo, lru] and fifo != lru
    text = spoken("counting")
    (plug_in / "counting.py").write_text(FIFO.replace("entered < oldest", "entered > oldest").replace(".max", ".min"))
    os.utime(plug_in / "counting.py", (OLD, OLD))
    assert rates("counting", "lru")[0] != fifo
    shutil.rmtree(plug_in)
    assert rates("lru") == [lru]
    assert spoken("lru") == text
