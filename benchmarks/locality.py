"""How long the measures of local routing consistency take on a long trace, and how much memory.

    python benchmarks/locality.py [--tokens 100000] [--repeats 5] [--no-store]

A synthetic trace (100,000 tokens in documents of 512, 16 MoE layers, 64 experts, top-8, scores that drift) is measured with
seven segment lengths. Each stage runs once to warm up on a slice, then ``--repeats`` times; the median and the spread are
kept, wall and processor time both, and the bars stand beside them. Values are checked after timing: look-ahead of one token
is LRU, a cache of all experts with free first loads always hits, and no policy beats Belady where that is a theorem.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from results import document, store

from swapless.cache.curves import hit_rate_curves
from swapless.locality import sch_lookahead, srp
from swapless.processors import processors
from swapless.trace import Trace, TraceHeader

SEGMENTS = (4, 8, 16, 32, 64, 128, 256)
BARS_S = {"srp": 10.0, "sch_moe_layer": 8.0, "sch_pool": 40.0, "curves_moe_layer": 5.0, "curves_pool": None}
PEAK_BAR_BYTES = 1_500_000_000


def drifting_trace(tokens: int, *, layers: int, experts: int, top_k: int, length: int, seed: int) -> Trace:
    """Trace whose router scores follow a first-order process, so that neighbours share about half of their experts."""
    rng = np.random.default_rng(seed)
    documents = -(-tokens // length)
    advantage = rng.normal(size=(layers, experts), scale=0.5).astype(np.float32)
    ids = np.empty((documents, length, layers, top_k), np.int16)
    for layer in range(layers):
        score = rng.normal(size=(documents, experts)).astype(np.float32)
        for t in range(length):
            score = np.float32(0.9) * score + np.float32(0.436) * rng.normal(size=score.shape).astype(np.float32)
            ids[:, t, layer] = np.argpartition(-(score + advantage[layer]), top_k, axis=1)[:, :top_k]
    header = TraceHeader(model_id=None, num_experts=experts, top_k=top_k, moe_blocks=tuple(range(layers)))
    number = np.repeat(np.arange(documents), length)[:tokens]
    return Trace.from_arrays(header, expert_ids=ids.reshape(-1, layers, top_k)[:tokens], document=number)


def timed(work: Callable[[], Any], repeats: int) -> tuple[dict[str, Any], Any]:
    """Median and spread of wall and processor time, and the last result."""
    wall, processor, result = [], [], None
    for _ in range(repeats):
        begin, begin_cpu = time.perf_counter(), time.process_time()
        result = work()
        wall.append(time.perf_counter() - begin)
        processor.append(time.process_time() - begin_cpu)
    figures = {
        "wall_s": statistics.median(wall),
        "wall_s_all": wall,
        "cpu_s": statistics.median(processor),
        "cpu_s_all": processor,
    }
    return figures, result


def check(trace: Trace, results: dict[str, Any]) -> None:
    """Refuse figures of a wrong computation."""
    lru, _, belady = (curve.rate("miss") for curve in results["curves_moe_layer"])
    assert np.array_equal(sch_lookahead(trace, 1)[0].rate("miss"), lru)
    assert (belady[:, trace.top_k :] >= lru[:, trace.top_k :] - 1e-12).all()
    for name in ("sch_moe_layer", "sch_pool"):
        assert all((curve.rate("free")[:, -1] == 1).all() for curve in results[name])
    values = [float(result.model.value) for result in results["srp"]]
    assert all(0 < value <= 1 for value in values)


def main() -> None:
    """Measure, check, print."""
    parser = argparse.ArgumentParser(description="Time the measures of local routing consistency.")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-store", action="store_true")
    arguments = parser.parse_args()
    shape = {"layers": 16, "experts": 64, "top_k": 8, "length": 512, "seed": 0}
    trace = drifting_trace(arguments.tokens, **shape)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    stages: dict[str, Callable[[Trace], Any]] = {
        "srp": lambda t: srp(t, SEGMENTS),
        "sch_moe_layer": lambda t: sch_lookahead(t, SEGMENTS),
        "sch_pool": lambda t: sch_lookahead(t, SEGMENTS, level="model"),
        "curves_moe_layer": lambda t: hit_rate_curves(t),
        "curves_pool": lambda t: hit_rate_curves(t, level="model"),
    }
    slice_ = trace.rows(slice(0, 512))
    measured, results = {}, {}
    print(f"{'stage':<18}{'wall s':>9}{'cpu s':>9}{'bar s':>8}", file=sys.stderr)
    for name, stage in stages.items():
        stage(slice_)
        measured[name], results[name] = timed(lambda stage=stage: stage(trace), arguments.repeats)
        measured[name]["bar_s"] = BARS_S[name]
        line = f"{name:<18}{measured[name]['wall_s']:>9.2f}{measured[name]['cpu_s']:>9.2f}{BARS_S[name] or '-':>8}"
        print(line, file=sys.stderr, flush=True)
    check(trace, results)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    measured["memory"] = {"peak_bytes": peak, "before_stages_bytes": before, "bar_bytes": PEAK_BAR_BYTES}
    print(f"peak memory {peak / 1e9:.2f} GB (bar 1.5)", file=sys.stderr)
    config = {**shape, "tokens": arguments.tokens, "segments": SEGMENTS, "repeats": arguments.repeats, "threads": processors()}
    result = document("locality", config=config, measured=measured)
    print(json.dumps(result, indent=2))
    if not arguments.no_store:
        print(f"stored {store(result).name}", file=sys.stderr)


if __name__ == "__main__":
    main()
