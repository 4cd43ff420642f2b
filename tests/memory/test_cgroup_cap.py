"""A hard cap, proven from outside: the kernel counts, page cache included, and kills what goes over.

The model's weights and the base of the process (interpreter, torch, transformers) together do not fit under the cap; with the
experts on disk it decodes all the same. The control that must die shows that the cap bites.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from cgroup import CgroupUnavailableError, memory_cgroup, run_capped  # noqa: E402

pytestmark = pytest.mark.slow

CAP_BYTES = 560_000_000
BUDGET_BYTES = CAP_BYTES - 5_000_000
PROMPT_TOKENS, WARM_UP_TOKENS, DECODE_TOKENS = 8, 2, 16


@pytest.fixture(scope="module")
def memory_cgroups() -> None:
    """Skip where the capability is missing, and name it."""
    try:
        with memory_cgroup(CAP_BYTES):
            pass
    except CgroupUnavailableError as error:
        pytest.skip(f"needs a writable memory cgroup: {error}")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 MB of experts in the original layout: 4 MoE layers of 64 experts of 1.5 MiB, top-8."""
    import torch
    from make_checkpoint import Shape, make_embedding, make_tokens, write_folder

    torch.set_num_threads(1)
    shape = Shape(moe_layers=4, hidden=512, inner=512)
    folder = tmp_path_factory.mktemp("capped")
    topic_of, tokens = make_tokens(shape, 0, PROMPT_TOKENS + WARM_UP_TOKENS + DECODE_TOKENS)
    write_folder(shape, folder, "original", 0, make_embedding(shape, topic_of, 0.45, 0))
    (folder / "tokens.json").write_text(json.dumps(tokens.tolist()))
    return folder


@pytest.mark.usefixtures("memory_cgroups")
def test_the_cap_kills_what_goes_over_it() -> None:
    run = run_capped([sys.executable, "-c", f"bytearray({CAP_BYTES})"], CAP_BYTES, timeout_s=60)
    assert run.oom_killed
    assert run.returncode != 0


@pytest.mark.usefixtures("memory_cgroups")
def test_the_group_is_gone_afterwards_even_when_its_command_outlives_the_caller() -> None:
    with memory_cgroup(CAP_BYTES) as group:
        path = group.path
        run_capped(["/bin/sh", "-c", f"echo $$ > {path}/cgroup.procs; sleep 60"], timeout_s=0.5)
    assert not path.exists()


@pytest.mark.usefixtures("memory_cgroups")
def test_decodes_in_less_memory_than_weights_and_base(checkpoint: Path) -> None:
    from contestant import Task
    from page_cache import evict, shards

    files = shards(checkpoint)
    weights_bytes = sum(file.stat().st_size for file in files)
    base = run_capped([sys.executable, "-c", "import torch, transformers.modeling_utils"], timeout_s=300)
    assert weights_bytes + base.max_anon_bytes > CAP_BYTES, "the cap proves nothing if everything fits under it"

    tokens = json.loads((checkpoint / "tokens.json").read_text())
    task = Task(
        engine="swapless",
        folder=str(checkpoint),
        prompt=tokens[:PROMPT_TOKENS],
        warm_up=tokens[PROMPT_TOKENS:][:WARM_UP_TOKENS],
        decode=tokens[-DECODE_TOKENS:],
        threads=1,
        memory_bytes=BUDGET_BYTES,
    )
    evict(files)
    run = run_capped([sys.executable, str(BENCHMARKS / "contestant.py"), task.argument()], CAP_BYTES, timeout_s=540)
    assert not run.oom_killed
    assert run.returncode == 0, run.stderr[-2000:]
    answer = json.loads(run.stdout)
    assert answer["tokens"] == DECODE_TOKENS
    assert answer["stats"]["bytes_read"] > 0
    assert answer["budget"]["slots"] < answer["budget"]["num_experts_total"]
    assert run.max_usage_bytes is not None, "this kernel keeps no peak of a cgroup"
    assert run.max_usage_bytes <= BUDGET_BYTES
    assert answer["stats"]["peak_memory_bytes"] <= run.max_usage_bytes, "the engine reports a peak that the kernel never saw"


@pytest.mark.usefixtures("memory_cgroups")
def test_files_of_code_that_nobody_maps_do_not_count(tmp_path: Path) -> None:
    size = 64 << 20
    (tmp_path / "large_module.py").write_text("#" * size)
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import os, large_module
from swapless.runtime.memory import MemoryMeter, drop_unused_cache
meter = MemoryMeter()
before = meter.now_bytes()
dropped = drop_unused_cache()
assert abs(dropped - (before - meter.now_bytes())) < 1 << 20, "the interpreter may take or leave a page meanwhile"
print(dropped)
"""
    from page_cache import evict

    evict([tmp_path / "large_module.py"])
    run = run_capped([sys.executable, "-c", program], CAP_BYTES, timeout_s=60)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 0.9 * size
