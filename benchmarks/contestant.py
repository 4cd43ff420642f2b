"""One contestant of the offloading benchmark, in a process of its own: load, prefill, decode given tokens, report.

    python benchmarks/contestant.py '{"engine": "plain", "folder": "out/bench-3gb/fused", ...}'

Started by ``benchmarks/offload.py``, which puts it inside a memory cgroup. All contestants decode the same teacher-forced
tokens, so none can win by going elsewhere. A token's time is that of its forward call alone; logits are kept aside and
judged after the clock has stopped. The answer is one JSON document on stdout.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

PROBE_S = 0.3
"""Seconds of reading that each look at the disk takes, before, between and after the timed tokens of Swapless."""

PROBE_BYTES = 40_000_000
"""Memory that it reads into, in turn: what a run stays below its cap covers it."""

BESIDE_TOKENS = 48
"""Tokens that are decoded beside reads, where everything is resident."""
_PLACES = 16

PROBE_EVERY_S = 3.0
"""Seconds of timed tokens between two looks: a shared disk drifts within seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What one contestant does.

    ``engine`` is ``plain`` (transformers with ``implementation``), ``accelerate`` (the same with experts left on disk) or
    ``swapless`` (with ``memory_bytes`` or ``resident``, and ``prefetch``). ``warm_up`` tokens are decoded before the clock
    starts. ``rehearsals`` is how often the whole sequence runs before the timed pass, for warm runs. ``aligned`` gives plain
    transformers 64-byte-aligned copies of its weights: the reference for bit identity. ``time_limit_s`` ends warm-up and
    decoding early, each. ``beside_reads`` decodes some tokens more in the end, beside reads that nobody waits for.
    """

    engine: str
    folder: str
    prompt: list[int]
    warm_up: list[int]
    decode: list[int]
    threads: int
    implementation: str = "eager"
    memory_bytes: int | None = None
    resident: float | None = None
    prefetch: str | None = None
    context: int = 256
    rehearsals: int = 0
    aligned: bool = False
    time_limit_s: float | None = None
    logits_file: str | None = None
    beside_reads: bool = False

    def argument(self) -> str:
        """The form in which the command line takes it."""
        return json.dumps(asdict(self))


@dataclass(slots=True)
class Pass:
    """One run over the sequence."""

    prefill_s: float = 0.0
    warm_up_tokens: int = 0
    token_s: list[float] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)
    probed_bytes_per_s: list[dict[int, float]] = field(default_factory=list)
    beside_reads: dict[str, float] | None = None


def _load(task: Task) -> Any:
    if task.engine == "swapless":
        import swapless

        target = {"memory": task.memory_bytes} if task.memory_bytes else {"resident": task.resident}
        return swapless.load(task.folder, context=task.context, prefetch=task.prefetch, **target)
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {}
    if task.engine == "accelerate":
        scratch = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, scratch, ignore_errors=True)
        options = {"device_map": _experts_on_disk(task.folder), "offload_folder": scratch}
    model = AutoModelForCausalLM.from_pretrained(
        task.folder, dtype="auto", experts_implementation=task.implementation, local_files_only=True, **options
    ).eval()
    if task.aligned:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return model


def _experts_on_disk(folder: str) -> dict[str, str]:
    """accelerate's device map with the experts on disk and all else in memory."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    leaves = [name for name, module in model.named_modules() if not list(module.children()) or name.endswith(".experts")]
    return {name: "disk" if name.endswith(".experts") else "cpu" for name in leaves if ".experts." not in name}


def _bandwidth(model: Any, folder: str) -> dict[int, float]:
    """Bytes a second of direct reads as large as the engine's, at random places, now, by how many are in flight.

    They go to memory as the engine's do: into slots, one after the other, or into a bounce buffer over and over.
    """
    from swapless.store.checkpoint import Extent
    from swapless.store.probe import probe
    from swapless.store.read import FileReader

    block_bytes = model.swapless.probe.block_bytes
    files = _files(folder, block_bytes)
    rng = np.random.default_rng()
    shards = [files[index] for index in rng.integers(0, len(files), 256)]
    extents = [Extent(file, int(rng.integers(0, file.stat().st_size - block_bytes)), block_bytes) for file in shards]
    reader = FileReader(files)
    try:
        copied = model.swapless.budget.parts["io_buffers"] > 0
        return probe(reader, extents, copied=copied, held_bytes=PROBE_BYTES, budget_s=PROBE_S).bytes_per_s
    finally:
        reader.close()


def _files(folder: str, block_bytes: int) -> list[Path]:
    return [file for file in sorted(Path(folder).glob("*.safetensors")) if file.stat().st_size > block_bytes]


def _beside_reads(model: Any, task: Task, cache: Any) -> dict[str, float]:
    """What decoding with every expert there and reads for nobody take from each other, as if no token needed what is read."""
    import torch

    from swapless.plan.traffic import BlocksTraffic, bandwidth, busy, fetcher
    from swapless.store.read import aligned_buffer

    block_bytes = model.swapless.budget.expert_bytes
    places = [aligned_buffer(model.swapless.budget.slot_bytes) for _ in range(_PLACES)]
    for place in places:
        place[:] = 0  # memory that was never touched is slow once
    tokens = task.decode[:BESIDE_TOKENS]
    with closing(BlocksTraffic(_files(task.folder, block_bytes), block_bytes)) as traffic:
        alone = bandwidth(traffic, 1, places, PROBE_S)
        with busy([fetcher(traffic, places)], np.random.default_rng(0)) as moved:
            started = time.perf_counter()
            for token in tokens:
                model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            spent = time.perf_counter() - started
            read = sum(moved)
    return {"alone_bytes_per_s": alone, "token_s": spent / len(tokens), "bytes_per_s": read / spent}


def _run(model: Any, task: Task, *, timed: bool) -> Pass:
    import torch

    done = Pass()
    with torch.inference_mode():
        started = time.perf_counter()
        output = model(input_ids=torch.tensor([task.prompt]), use_cache=True, logits_to_keep=1)
        done.prefill_s = time.perf_counter() - started
        cache = output.past_key_values
        clock = time.perf_counter()
        for token in task.warm_up:
            model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            done.warm_up_tokens += 1
            if task.time_limit_s is not None and time.perf_counter() - clock > task.time_limit_s:
                break
        probed = timed and task.engine == "swapless" and task.resident is None
        if probed:
            done.probed_bytes_per_s.append(_bandwidth(model, task.folder))
        if timed and task.engine == "swapless":
            model.swapless.reset_stats()
        clock = probed_at = time.perf_counter()
        for token in task.decode:
            if probed and time.perf_counter() - probed_at > PROBE_EVERY_S:
                done.probed_bytes_per_s.append(_bandwidth(model, task.folder))
                probed_at = time.perf_counter()
            ids = torch.tensor([[token]])
            started = time.perf_counter()
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
            done.token_s.append(time.perf_counter() - started)
            done.logits.append(output.logits[0, -1].float().numpy().copy())
            if task.time_limit_s is not None and time.perf_counter() - clock > task.time_limit_s:
                break
        if probed:
            done.probed_bytes_per_s.append(_bandwidth(model, task.folder))
        if timed and task.beside_reads:
            done.beside_reads = _beside_reads(model, task, cache)
    return done


def perform(task: Task) -> dict[str, Any]:
    """Do the task and describe how it went."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(task.threads)
    started = time.perf_counter()
    model = _load(task)
    load_s = time.perf_counter() - started
    for _ in range(task.rehearsals):
        _run(model, task, timed=False)
    done = _run(model, task, timed=True)
    logits = np.stack(done.logits)
    if task.logits_file:
        np.save(task.logits_file, logits)
    result = {
        "load_s": load_s,
        "prefill_s": done.prefill_s,
        "warm_up_tokens": done.warm_up_tokens,
        "token_s": done.token_s,
        "tokens": len(done.token_s),
        "tokens_per_s": len(done.token_s) / sum(done.token_s),
        "greedy": logits.argmax(axis=1).tolist(),
        "io_read_bytes": _io_read_bytes(),
    }
    if task.engine == "swapless":
        engine = model.swapless
        result |= {"probed_bytes_per_s": done.probed_bytes_per_s, "beside_reads": done.beside_reads}
        result |= {"stats": engine.stats().to_dict(), "budget": engine.budget.to_dict(), "probe": engine.probe.to_dict()}
        engine.close()
    return result


def perform_apart(task: Task, cap_bytes: int | None, timeout_s: float) -> dict[str, Any]:
    """Do the task in a process of its own, under a memory cap if one is given, its files out of the page cache to begin with.

    Raises
    ------
    RuntimeError
        It failed.
    """
    from cgroup import run_capped  # here, so that the process that is measured is spared them
    from page_cache import evict, shards

    evict(shards(Path(task.folder)))
    command = [sys.executable, str(Path(__file__).resolve()), task.argument()]
    run = run_capped(command, cap_bytes, timeout_s=timeout_s, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if run.returncode != 0:
        raise RuntimeError(f"{task.folder}, reading ahead by {task.prefetch}, failed: {run.stderr.strip()[-800:]}")
    return dict(json.loads(run.stdout))


def _io_read_bytes() -> int | None:
    """Bytes that this process made the disk read, page faults included, since it began."""
    try:
        fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    except OSError:
        return None
    return int(fields["read_bytes"])


def main() -> None:
    """Perform the task of the command line; nothing but the answer goes to stdout."""
    json.dump(perform(Task(**json.loads(sys.argv[1]))), sys.stdout)


if __name__ == "__main__":
    main()
