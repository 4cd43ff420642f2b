"""Is ``next_use`` fit to be the default policy? LRU, decayed LFU, next_use and Belady's optimum on held-out documents.

    python benchmarks/policies.py --data DIR                 # about 15 minutes of processor time
    python benchmarks/policies.py --data DIR --quick         # few documents, nothing stored: only to see that it runs

Token at once, a cache a MoE layer, state kept over documents, everything learned from nothing in each row. Held out are the
second half of DeepSeek-V2-Lite's Puffin documents and, of gpt-oss-20b, the second half of the answers (its first ones were
used to choose the policy's two parameters). Four questions:

- what share of the gap between LRU and the optimum is taken at E/4 and E/2, on all held-out documents, with a 95 % interval
  from resampling documents?
- is there any capacity from K to E where it is more than 0.2 points below LRU? Every second one, on a bounded set of documents;
- does that hold elsewhere: the first tokens of an empty cache, short traces, a cache emptied for every document, documents
  that take turns, one pool for all layers, and made traces of other shapes, some made to please LRU?
- what does a block cost, up to 128 experts a layer?
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from results import document, emit, store

from swapless.cache.replay import Replay, replay
from swapless.trace import Trace, TraceHeader, read_trace

POLICIES = ("lru", "lfu", "next_use", "belady")
CANDIDATE = "next_use"
BELOW_LRU = 0.002
BARS = {"deepseek": 0.25, "gpt-oss": 0.45}
FILES = {"deepseek": "deepseek-v2-lite.puffin.parquet", "gpt-oss": "gpt-oss-20b.decode.parquet"}
SPLITS = {"deepseek": 999, "gpt-oss": None}
"""First held-out document; None stands for the middle one."""
BLOCK_S = 50e-6
RESAMPLES = 2000
_SHORT = (64, 200, 500, 2000)


def held_out(data: Path, name: str) -> Trace:
    """The documents that chose no parameter."""
    trace = replace(read_trace(data / "traces" / FILES[name]), token=None, gate_weights=None)
    documents = np.unique(trace.document)
    first = documents[len(documents) // 2] if SPLITS[name] is None else SPLITS[name]
    return trace.rows(trace.document >= first)


def some_documents(trace: Trace, tokens: int, seed: int = 0) -> Trace:
    """Whole documents drawn without replacement until there are ``tokens`` tokens, in their own order."""
    documents, lengths = np.unique(trace.document, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(documents))
    chosen = order[: int(np.searchsorted(np.cumsum(lengths[order]), tokens)) + 1]
    return trace.rows(np.isin(trace.document, documents[chosen]))


def all_policies(trace: Trace, capacity: int, **options: Any) -> dict[str, Replay]:
    """One replay a policy."""
    return {policy: replay(trace, policy, capacity, **options) for policy in POLICIES}


def row_of(found: dict[str, Replay], capacity: int, **labels: Any) -> dict[str, Any]:
    """Hit rates, what the candidate is above LRU, and its share of the gap."""
    rate = {policy: result.hit_rate for policy, result in found.items()}
    gap = rate["belady"] - rate["lru"]
    return {
        **labels,
        "capacity_experts": capacity,
        "tokens": found["lru"].decode_tokens,
        "hit_rate": rate,
        "above_lru": rate[CANDIDATE] - rate["lru"],
        "share_of_gap": {policy: (rate[policy] - rate["lru"]) / gap if gap > 1e-6 else None for policy in ("lfu", CANDIDATE)},
    }


def interval(found: dict[str, Replay], policy: str, seed: int = 0) -> list[float]:
    """95 % interval of the share of the gap, from resampling documents."""
    hits = {name: result.by_document()[1] for name, result in found.items()}
    draws = np.random.default_rng(seed).integers(0, len(hits["lru"]), (RESAMPLES, len(hits["lru"])))
    low, mine, best = (hits[name][draws].sum(axis=1) for name in ("lru", policy, "belady"))
    return np.quantile((mine - low) / (best - low), (0.025, 0.975)).tolist()


def main_capacities(name: str, trace: Trace) -> list[dict[str, Any]]:
    """E/4 and E/2 over all held-out documents."""
    rows = []
    for capacity in (trace.num_experts // 4, trace.num_experts // 2):
        found = all_policies(trace, capacity)
        intervals = {policy: interval(found, policy) for policy in ("lfu", CANDIDATE)}
        rows.append(row_of(found, capacity, trace=name) | {"interval": intervals})
        say(rows[-1], f"{name}, all held out")
    return rows


def every_capacity(name: str, trace: Trace) -> list[dict[str, Any]]:
    """Every second capacity from K to E, both ends included."""
    least, most = trace.top_k, trace.num_experts
    rows = []
    for capacity in sorted({*range(least, most, 2), most - 1, most}):
        rows.append(row_of(all_policies(trace, capacity), capacity, trace=name))
        say(rows[-1], name)
    return rows


def few_capacities(trace: Trace) -> list[int]:
    """K, E/4, and four more up to E."""
    least, most = trace.top_k, trace.num_experts
    return sorted({most // 4, *np.linspace(least, most, 5).astype(int).tolist()} - set(range(least)))


def other_conditions(name: str, trace: Trace) -> Iterable[dict[str, Any]]:
    """The same documents under other rules, and the first tokens of an empty cache."""
    few = some_documents(trace, 6000, seed=1)
    for label, options in {
        "emptied for every document": {"state": "reset"},
        "eight documents take turns": {"interleave": 8},
        "one at a time": {"request_model": "single"},
    }.items():
        for capacity in few_capacities(trace):
            yield row_of(all_policies(few, capacity, **options), capacity, trace=name, condition=label)
    for pool in ("shared", "floor"):
        for capacity in (trace.num_experts * trace.num_moe_layers // 4, trace.num_experts * trace.num_moe_layers // 2):
            found = all_policies(few.rows(slice(0, 3000)), capacity, pool=pool)
            yield row_of(found, capacity, trace=name, condition=f"pool: {pool}")
    starts = np.random.default_rng(2)
    for length in _SHORT:
        windows = [trace.rows(slice(int(s), int(s) + length)) for s in starts.integers(0, len(trace) - length, 4000 // length)]
        for capacity in few_capacities(trace):
            found = [all_policies(window, capacity, state="keep") for window in windows]
            mean = {p: statistics.fmean(one[p].hit_rate for one in found) for p in POLICIES}
            yield {
                "trace": name,
                "condition": f"the first {length} tokens of an empty cache, {len(windows)} starts",
                "capacity_experts": capacity,
                "tokens": length * len(windows),
                "hit_rate": mean,
                "above_lru": mean[CANDIDATE] - mean["lru"],
            }


def made(num_experts: int, top_k: int, choose: Callable[[np.random.Generator, int], np.ndarray], tokens: int) -> Trace:
    """A trace of experts ``choose(rng, token)`` (L, K)."""
    rng = np.random.default_rng(0)
    ids = np.stack([choose(rng, token) for token in range(tokens)]).astype(np.int16)
    header = TraceHeader(model_id="made", num_experts=num_experts, top_k=top_k, moe_blocks=tuple(range(ids.shape[1])))
    return Trace.from_arrays(header, expert_ids=ids)


def topics(num_experts: int, top_k: int, layers: int, tokens: int, every: int = 400) -> Trace:
    """Router scores from a fading sum of token vectors, a topic that changes every so often, and noise."""
    rng = np.random.default_rng(1)
    words = rng.normal(size=(500, 24)) * 0.6
    weight = rng.normal(size=(layers, 24, num_experts)) / 24**0.5 * 2
    often = 1 / np.arange(1, 501)
    now = {"context": np.zeros(24), "topic": np.zeros((layers, num_experts))}

    def choose(rng: np.random.Generator, token: int) -> np.ndarray:
        if token % every == 0:
            now["topic"] = rng.normal(size=(layers, num_experts)) * 1.6
        now["context"] = 0.8 * now["context"] + words[rng.choice(500, p=often / often.sum())]
        scores = np.einsum("d,lde->le", now["context"], weight) + now["topic"] + rng.gumbel(size=(layers, num_experts))
        return np.argsort(-scores, axis=1)[:, :top_k]

    return made(num_experts, top_k, choose, tokens)


def working_sets(group: int, every: int, tokens: int = 3000) -> Trace:
    """Uniform in a group of experts that is drawn anew every so often: what LRU is best at and counts are worst at."""
    groups = {}

    def choose(rng: np.random.Generator, token: int) -> np.ndarray:
        for layer in range(4):
            if token % every == 0:
                groups[layer] = rng.permutation(64)[:group]
        return np.stack([rng.choice(groups[layer], 6, replace=False) for layer in range(4)])

    return made(64, 6, choose, tokens)


def made_shapes() -> Iterable[dict[str, Any]]:
    """Traces of other shapes."""
    shapes = {
        "made, topics, E 16, K 2": topics(16, 2, 6, 3000),
        "made, topics, E 128, K 8": topics(128, 8, 4, 2500),
        "made, working sets of 8 for 30 tokens": working_sets(8, 30),
        "made, working sets of 12 for 60 tokens": working_sets(12, 60),
        "made, working sets of 20 for 200 tokens": working_sets(20, 200),
        "made, working sets of 24 for 400 tokens": working_sets(24, 400),
    }
    for label, trace in shapes.items():
        for capacity in few_capacities(trace):
            yield row_of(all_policies(trace, capacity), capacity, trace=label)


def block_times(traces: dict[str, Trace]) -> list[dict[str, Any]]:
    """Processor time a block of the candidate, with as many MoE layers as a model has, so that nothing stays in the cache."""
    shapes = {name: trace.rows(slice(0, 1500)) for name, trace in traces.items()}
    shapes["made, E 128, K 8, L 48"] = topics(128, 8, 48, 300)
    rows = []
    for name, trace in shapes.items():
        capacity = trace.num_experts // 4
        replay(trace.rows(slice(0, 20)), CANDIDATE, capacity)
        times = []
        for _ in range(5):
            begun = time.process_time()
            replay(trace, CANDIDATE, capacity)
            times.append((time.process_time() - begun) / len(trace) / trace.num_moe_layers)
        rows.append(
            {"trace": name, "experts": trace.num_experts, "block_s": statistics.median(times), "spread_s": sorted(times)}
        )
        print(f"{name:30s} {1e6 * rows[-1]['block_s']:.1f} us a block", file=sys.stderr)
    return rows


def say(row: dict[str, Any], label: str) -> None:
    """One line of the table."""
    rate = row["hit_rate"]
    share = (row.get("share_of_gap") or {}).get(CANDIDATE)
    print(
        f"{label:60s} C {row['capacity_experts']:4d}  LRU {rate['lru']:.4f}  {CANDIDATE} {100 * row['above_lru']:+6.2f} points"
        + ("" if share is None else f", {share:.1%} of the gap"),
        file=sys.stderr,
        flush=True,
    )


def judge(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Every bar with what was reached."""
    bars = []

    def add(what: str, got: float, bar: str, met: bool) -> None:
        bars.append({"what": what, "got": got, "bar": bar, "met": met})
        print(f"{'met ' if met else 'MISSED'} {what}: {got:.4g} ({bar})", file=sys.stderr)

    for name, least in BARS.items():
        quarter = next(row for row in found["held_out"] if row["trace"] == name)
        share = quarter["share_of_gap"][CANDIDATE]
        add(f"{name}, share of the gap at E/4", share, f">= {least}", share >= least)
        above = [row["above_lru"] for row in found["capacities"] if row["trace"] == name]
        add(f"{name}, mean above LRU over capacities", statistics.fmean(above), "> 0", statistics.fmean(above) > 0)
    for part in ("held_out", "capacities", "conditions", "shapes"):
        worst = min(row["above_lru"] for row in found[part])
        add(f"{part}: lowest above LRU", worst, f">= -{BELOW_LRU}", worst >= -BELOW_LRU)
    slowest = max(row["block_s"] for row in found["block_times"])
    add("slowest block, seconds", slowest, f"< {BLOCK_S}", slowest < BLOCK_S)
    return bars


def main() -> None:
    """Measure, print a table and one JSON document, store the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the handed data")
    parser.add_argument("--quick", action="store_true", help="few documents, nothing stored")
    asked = parser.parse_args()
    traces = {name: held_out(asked.data, name) for name in FILES}
    tokens = 10_000
    if asked.quick:
        traces, tokens = {name: trace.rows(slice(0, 5000)) for name, trace in traces.items()}, 500
    found: dict[str, Any] = {"block_times": block_times(traces), "held_out": [], "capacities": [], "conditions": []}
    found["shapes"] = collect(made_shapes())
    for name, trace in traces.items():
        found["conditions"] += collect(other_conditions(name, trace))
        found["capacities"] += every_capacity(name, some_documents(trace, tokens))
        found["held_out"] += main_capacities(name, trace)
    config = {"policies": POLICIES, "tokens_of_every_capacity": tokens, "below_lru": BELOW_LRU}
    result = document("policies", config=config, measured=found | {"bars": judge(found)})
    emit(result)
    if not asked.quick:
        store(result)


def collect(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each said as it comes."""
    kept = []
    for row in rows:
        say(row, ", ".join(row[key] for key in ("trace", "condition") if key in row))
        kept.append(row)
    return kept


if __name__ == "__main__":
    main()
