"""What a load that fails, is interrupted or is forgotten leaves behind: no thread, no file, no mapping, no switch."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers.utils import logging

import swapless
from swapless.errors import BudgetError, CheckpointError, PredictorError, SwaplessError
from swapless.runtime.packing import pack
from tests.runtime.test_interrupt import interrupt_at_line

DESCRIPTORS = Path("/proc/self/fd")

pytestmark = pytest.mark.skipif(not DESCRIPTORS.is_dir(), reason="no /proc/self/fd to count descriptors in")


@pytest.fixture(scope="module")
def store(qwen3_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of it in 4 bits."""
    folder = tmp_path_factory.mktemp("leaks") / "store"
    pack(qwen3_moe, folder, bits=4, dense_bits=4)
    return folder


class Holdings(NamedTuple):
    """Reader threads, open files by name, large mappings, and switches of the whole process."""

    readers: int
    files: list[str]
    slabs: int
    switches: tuple[Any, ...]


def holdings() -> Holdings:
    gc.collect()
    files = []
    for entry in DESCRIPTORS.iterdir():
        with suppress(OSError):  # the listing's own descriptor
            files.append(str(entry.readlink()))
    readers = sum(thread.name.startswith("swapless-read") for thread in threading.enumerate())
    maps = Path("/proc/self/maps").read_text().splitlines()
    huge = sum(line.count("/") == 0 and _size(line) % (2 << 20) == 0 and " rw-p " in line for line in maps)
    switches = (
        torch.get_num_threads(),
        torch.backends.mkldnn.enabled,
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
    )
    return Holdings(readers, sorted(file for file in files if "/proc/" not in file), huge, switches)


def _size(line: str) -> int:
    first, end = (int(part, 16) for part in line.split(maxsplit=1)[0].split("-"))
    return end - first


@pytest.fixture(scope="module")
def first_load(olmoe: Path) -> None:
    """What is made once a process has been made."""
    with swapless.load(olmoe, resident=0.25, context=64) as model:
        model(input_ids=torch.ones((1, 4), dtype=torch.long))


@pytest.fixture(autouse=True)
def nothing_stays(first_load: None) -> Iterator[None]:
    """After the test all is as before it."""
    before = holdings()
    yield
    after = holdings()
    assert after._replace(slabs=0) == before._replace(slabs=0)
    assert after.slabs <= before.slabs + 2


# -- loads that fail -------------------------------------------------------------------------------------------------------


def no_shard(folder: Path) -> None:
    next(folder.glob("*.safetensors")).unlink()


def short_shard(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[-1]
    os.truncate(shard, shard.stat().st_size - 10)


def more_layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] + 1}))


FAILING: dict[str, tuple[Callable[[Path], None], dict[str, Any], type[SwaplessError]]] = {
    "budget": (lambda folder: None, {"memory": "1MiB"}, BudgetError),
    "shard": (no_shard, {"resident": 0.25}, CheckpointError),
    "truncated": (short_shard, {"resident": 0.25}, CheckpointError),
    "layers": (more_layers, {"resident": 0.25}, CheckpointError),
    "predictor": (lambda folder: None, {"resident": 0.25, "prefetch": "config.json"}, PredictorError),
}


@pytest.mark.few(3)
@pytest.mark.parametrize("how", FAILING)
def test_failed_loads_leave_nothing(how: str, own_olmoe: Path) -> None:
    harm, options, error = FAILING[how]
    harm(own_olmoe)
    if "prefetch" in options:
        options = options | {"prefetch": own_olmoe / options["prefetch"]}
    for _ in range(2):
        with pytest.raises(error):
            swapless.load(own_olmoe, context=64, **options)


FAST_STAGES = {(True, 4)}


@pytest.mark.parametrize(
    "packed, number",
    [
        pytest.param(packed, number, marks=() if (packed, number) in FAST_STAGES else pytest.mark.slow)
        for packed in (False, True)
        for number in range(5)
    ],
)
def test_a_load_that_is_stopped_at_any_stage_leaves_nothing(number: int, packed: bool, qwen3_moe: Path, store: Path) -> None:
    folder, options = (store, {"prefetch": "gate"}) if packed else (qwen3_moe, {})
    stages = []

    def progress(stage: str, done: float) -> None:
        stages.append(stage)
        if len(stages) == number + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        swapless.load(folder, resident=0.25, context=64, progress=progress, **options)


def lines_of_a_load(folder: Path, files: set[str]) -> int:
    """How many lines of ``files`` a load runs."""
    count = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename not in files:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        swapless.load(folder, resident=0.25, context=64).swapless.close()
    finally:
        sys.settrace(before)
    return count


def files_of_a_load() -> set[str]:
    from swapless.runtime import engine, fetch, loader, memory, model, parts, pool
    from swapless.store import checkpoint, probe, read

    return {str(module.__file__) for module in (engine, fetch, loader, memory, model, parts, pool, checkpoint, probe, read)}


@pytest.mark.parametrize("points", [2, pytest.param(150, marks=pytest.mark.slow)])
def test_ctrl_c_at_any_line_of_a_load_leaves_nothing(points: int, olmoe: Path) -> None:
    files = files_of_a_load()
    lines = lines_of_a_load(olmoe, files)
    before, lost = holdings(), []
    for number in random.Random(points).sample(range(1, lines), points):
        with interrupt_at_line(number, files) as place, suppress(KeyboardInterrupt):
            swapless.load(olmoe, resident=0.25, context=64).swapless.close()
        after = holdings()
        if after._replace(slabs=0) != before._replace(slabs=0):
            lost.append(f"{place}: {after}")
            before = after
    assert not lost


@pytest.mark.slow
def test_ctrl_c_at_random_moments_leaves_nothing(olmoe: Path) -> None:
    before, stopped = holdings(), 0
    moments = random.Random(0)
    for _ in range(60):
        try:
            signal.setitimer(signal.ITIMER_REAL, moments.uniform(0.001, 0.2))
            with swapless.load(olmoe, resident=0.25, context=64) as model:
                model(input_ids=torch.ones((1, 4), dtype=torch.long))
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            stopped += 1
        model = None
        assert holdings()._replace(slabs=0) == before._replace(slabs=0)
    assert stopped > 5


@pytest.fixture(autouse=True)
def alarm_is_ctrl_c() -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
def test_200_loads_in_one_process(olmoe: Path) -> None:
    def some(number: int) -> None:
        for _ in range(number):
            with swapless.load(olmoe, resident=0.25, context=64) as model:
                model(input_ids=torch.ones((1, 4), dtype=torch.long))

    some(20)
    gc.collect()
    before, maps = holdings(), len(Path("/proc/self/maps").read_text().splitlines())
    some(180)
    assert holdings() == before
    assert len(Path("/proc/self/maps").read_text().splitlines()) <= maps + 8  # arenas of the allocator come and go


# -- models that nobody closes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [pytest.param("none", marks=pytest.mark.slow), "gate"])
def test_models_that_are_forgotten_close_themselves(prefetch: str, olmoe: Path) -> None:
    before = holdings()
    for _ in range(3):
        model = swapless.load(olmoe, resident=0.25, context=64, prefetch=prefetch)
        model(input_ids=torch.ones((1, 4), dtype=torch.long))
    del model
    assert holdings()._replace(slabs=0) == before._replace(slabs=0)


@pytest.mark.slow
def test_a_model_in_a_ring_of_references_is_collected_in_whatever_thread(olmoe: Path) -> None:
    before = holdings()
    model = swapless.load(olmoe, resident=0.25, context=64)
    model.self = [model]
    del model
    collecting = threading.Thread(target=gc.collect)
    collecting.start()
    collecting.join()
    assert holdings()._replace(slabs=0) == before._replace(slabs=0)


def run(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PREAMBLE + script, str(folder)],
        env=os.environ | {"GOMP_SPINCOUNT": "0"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


PREAMBLE = """
import os, sys, threading, time, torch, swapless
from transformers.utils import logging
logging.disable_progress_bar()
model = swapless.load(sys.argv[1], resident=0.25, context=128, prefetch="gate")
ids = torch.arange(3, 12)[None]
def answer(): return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
first = answer()
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["", *(pytest.param(end, marks=pytest.mark.slow) for end in ("sys.exit(0)", "del model"))])
def test_a_process_ends_without_close(end: str, olmoe: Path) -> None:
    done = run(end, olmoe)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# -- forks -----------------------------------------------------------------------------------------------------------------


CHILD = """
def child(work):
    pid = os.fork()
    if pid == 0:
        import signal
        signal.alarm(120)  # a child that hangs says so
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print("child:", type(error).__name__, error, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def right(close=False):
    for _ in range(2):
        assert torch.equal(answer(), first)
    model.swapless.check_integrity()
    if close:
        model.swapless.close()
"""

FORKS = {
    "at rest": "assert child(right) == 0; assert child(right) == 0",
    "and closed in the child": "assert child(lambda: right(close=True)) == 0",
    "and never used": "assert child(lambda: None) == 0; assert child(model.swapless.close) == 0",
    "from another thread": """
codes = []
thread = threading.Thread(target=lambda: codes.append(child(right)))
thread.start(); thread.join()
assert codes == [0]
""",
    "while another thread is at work": """
stop = threading.Event()
def busy():
    while not stop.is_set():
        assert torch.equal(answer(), first)
thread = threading.Thread(target=busy)
thread.start()
try:
    for _ in range(4):
        time.sleep(0.03)
        assert child(right) == 0
finally:
    stop.set(); thread.join()
""",
    "in a hook between two blocks": """
pids = []
def fork(*_):
    if not pids:
        pids.append(os.fork())
hook = model.model.layers[1].register_forward_pre_hook(fork)
try:
    assert torch.equal(answer(), first)
finally:
    hook.remove()
if pids[0] == 0:
    right(); os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1]) == 0
""",
    "grandchild": """
def generations():
    right()
    assert child(right) == 0
assert child(generations) == 0
""",
    "the child loads a model of its own": """
def other():
    with swapless.load(sys.argv[1], resident=0.5, context=128) as second:
        out = second.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert torch.equal(out, first)
assert child(other) == 0
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("threads", [pytest.param("1", marks=pytest.mark.slow), "2"])
@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_forked_child_works(packed: bool, threads: str, olmoe: Path, store: Path) -> None:
    script = CHILD
    for name, action in FORKS.items():
        script += f"\ndef scenario():\n{textwrap.indent(action.strip(), '    ')}\n"
        script += "try:\n    scenario()\n    assert torch.equal(answer(), first)\nexcept BaseException as error:\n"
        script += f"    print({name!r}, 'parent:', type(error).__name__, error, flush=True)\n"
    done = run(script, store if packed else olmoe, OMP_NUM_THREADS=threads)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
