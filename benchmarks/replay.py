"""Replay speed: every policy on the DeepSeek-V2-Lite Puffin trace, beside libCacheSim and a plain Python simulator.

    python benchmarks/replay.py --data DIR              # all 30 M requests, five repeats, medians
    python benchmarks/replay.py --data DIR --tokens 20000 --repeats 3

One core. Requests a second of a whole ``replay`` call on a trace in memory, after one call that compiles; wall-clock and
processor time, since the first says what a busy machine left over. libCacheSim is measured where its package is installed
(``pip install libcachesim``), on the same global LRU and the same requests, and hits must agree.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from results import document, emit, store

from swapless.cache.devices import device_profile
from swapless.cache.replay import replay
from swapless.cache.timeline import timeline
from swapless.trace import Trace, read_trace

QUARTER = 16
GLOBAL = 416
PYTHON_REQUESTS = 200_000
SLOW_TOKENS = 10_000
SINGLE = {"pool": "shared", "request_model": "single"}
AIMS = {"lru": 50e6, "lru global": 50e6, "belady": 5e6, "belady_bypass": 5e6, "timeline lru": 2e6} | dict.fromkeys(
    ("lfu", "lfu-perfect", "lfru", "least_stale", "slru", "s3fifo", "arc", "static"), 8e6
)


def timed(call: Callable[[], Any], requests: int, repeats: int) -> dict[str, Any]:
    """Medians of ``repeats`` calls."""
    wall, cpu = [], []
    for _ in range(repeats):
        begun, used = time.perf_counter(), time.process_time()
        call()
        wall.append(time.perf_counter() - begun)
        cpu.append(time.process_time() - used)
    return {
        "requests": requests,
        "repeats": repeats,
        "requests_per_s": requests / statistics.median(wall),
        "requests_per_cpu_s": requests / statistics.median(cpu),
        "spread_s": [min(wall), max(wall)],
    }


def python_lru(keys: list[int], capacity: int) -> int:
    """Hits of one LRU cache as one writes it in Python."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for key in keys:
        if key in cache:
            cache.move_to_end(key)
            hits += 1
        else:
            if len(cache) >= capacity:
                cache.popitem(last=False)
            cache[key] = None
    return hits


def requests_of(trace: Trace) -> np.ndarray:
    """All requests in order, as keys."""
    return (trace.expert_ids + np.arange(trace.num_moe_layers)[None, :, None] * trace.num_experts).reshape(-1)


def libcachesim(trace: Trace, repeats: int) -> dict[str, Any] | None:
    """The same global LRU by libCacheSim, from its own binary trace format; None where it is not installed."""
    try:
        import libcachesim as lcs
    except ImportError:
        return None
    keys = requests_of(trace)
    rows = np.zeros(len(keys), [("clock", "<u4"), ("object", "<u8"), ("size", "<u4"), ("next", "<i8")])
    rows["object"], rows["size"], rows["next"] = keys + 1, 1, -1
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "requests.oracleGeneral"
        rows.tofile(file)
        missed = []

        def run() -> None:
            reader = lcs.TraceReader(str(file), lcs.TraceType.ORACLE_GENERAL_TRACE)
            missed.append(lcs.LRU(GLOBAL).process_trace(reader)[0])

        result = timed(run, len(keys), repeats)
    hits = round(len(keys) * (1 - missed[0]))
    ours = replay(trace, "lru", GLOBAL, **SINGLE).hits
    if hits != ours:
        raise SystemExit(f"libCacheSim counts {hits} hits, we count {ours}")
    return result | {"hits": hits}


def judge(rows: dict[str, Any]) -> list[dict[str, Any]]:
    """Every aim with what was reached, by the clock on the wall."""
    bars = []
    for name, row in rows.items():
        if row is not None and row.get("aim_per_s"):
            got, least = row["requests_per_s"], row["aim_per_s"]
            bars.append({"what": name, "got": got, "bar": least, "met": got >= least})
            print(f"{'met   ' if got >= least else 'MISSED'} {name}: {got / 1e6:.1f} of {least / 1e6:.0f} M/s", file=sys.stderr)
    if rows["libCacheSim global"] is None:
        print("libCacheSim is not installed: pip install libcachesim", file=sys.stderr)
    return bars


def main() -> None:
    """Measure, print a table and one JSON document, store the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the handed data")
    parser.add_argument("--tokens", type=int, default=None, help="only the first N tokens")
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    trace = read_trace(asked.data / "traces" / "deepseek-v2-lite.puffin.parquet")
    trace = replace(trace.rows(slice(0, asked.tokens)), token=None)
    few = trace.rows(slice(0, SLOW_TOKENS))
    rng = np.random.default_rng(0)
    scored = few.rows(slice(0, 2000))
    scored = replace(scored, router_scores=rng.random((len(scored), 26, 64)).astype(np.float16))
    jobs: dict[str, tuple[Trace, Callable[[Trace], Any]]] = {
        name: (trace, lambda t, name=name: replay(t, name, QUARTER))
        for name in (
            "lru",
            "lfu",
            "lfu-perfect",
            "lfru",
            "least_stale",
            "slru",
            "s3fifo",
            "arc",
            "static",
            "belady",
            "belady_bypass",
        )
    }
    jobs["lru global"] = (trace, lambda t: replay(t, "lru", GLOBAL, **SINGLE))
    jobs["timeline lru"] = (trace, lambda t: timeline(t, "lru", QUARTER, device_profile("NVMe Gen4")))
    jobs["next_use"] = (few, lambda t: replay(t, "next_use", QUARTER))
    jobs["activation_aware"] = (few, lambda t: replay(t, "activation_aware", QUARTER))
    jobs["score"] = (scored, lambda t: replay(t, "score", QUARTER))
    for name in ("lfu", "belady", "next_use"):
        jobs[f"{name} shared pool"] = (few, lambda t, name=name: replay(t, name, GLOBAL, pool="shared"))
    rows: dict[str, Any] = {}
    for name, (part, call) in jobs.items():
        call(part.rows(slice(0, 50)))
        rows[name] = timed(partial(call, part), part.expert_ids.size, asked.repeats) | {"aim_per_s": AIMS.get(name)}
        wall, cpu = rows[name]["requests_per_s"] / 1e6, rows[name]["requests_per_cpu_s"] / 1e6
        print(f"{name:22s} {wall:8.2f} M/s wall {cpu:8.2f} M/s cpu", file=sys.stderr)
    keys = requests_of(trace)[:PYTHON_REQUESTS].tolist()
    rows["plain Python global"] = timed(lambda: python_lru(keys, GLOBAL), len(keys), asked.repeats)
    part = trace.rows(slice(0, 20_000))
    rows["libCacheSim global"] = libcachesim(part, asked.repeats)
    rows["ours, same requests"] = timed(lambda: replay(part, "lru", GLOBAL, **SINGLE), part.expert_ids.size, asked.repeats)
    for name in ("plain Python global", "libCacheSim global", "ours, same requests"):
        if rows[name] is not None:
            print(f"{name:22s} {rows[name]['requests_per_s'] / 1e6:8.2f} M/s wall", file=sys.stderr)
    bars = judge(rows)
    config = {"tokens": len(trace), "capacity_experts": QUARTER, "global_experts": GLOBAL, "cores": 1}
    result = document("replay", config=config, measured={"rows": rows, "bars": bars})
    emit(result)
    store(result)


if __name__ == "__main__":
    main()
