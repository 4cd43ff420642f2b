"""Decode speed under a memory cap: Swapless beside plain transformers, same tokens, same cap, interleaved; the one command is

    python benchmarks/offload.py                 # about 25 minutes; makes the 3 GB checkpoint first if it is not there
    python benchmarks/offload.py --quick         # a few minutes, one round, nothing stored: only to see that all parts run

Four questions, each answered with a ratio from this one run:

- under a cap of 1.2 GB and of 2.0 GB (memory cgroup, page cache counted), how many tokens a second does Swapless decode,
  and how many plain transformers on the fused layout, whose experts are memory-mapped: the strongest thing that
  transformers does here by itself? It runs with ``eager`` and with ``grouped_mm`` experts; the faster counts, and one that
  is more than 10 % slower in the first round is left out of the later ones;
- with every expert resident and everything warm, what does Swapless's token cost beside plain transformers' token?
- what share of a bare direct-I/O loop does the read path reach (``benchmarks/read_path.py``)?
- are the outputs the same? Bit for bit at one thread against eager with 64-byte-aligned weights; at the timed settings the
  largest difference of logits and the share of equal greedy tokens are given.

Each contestant is a process of its own (``benchmarks/contestant.py``). Before each capped run every shard is evicted from
the page cache and the rest that stayed is recorded. All decode the same teacher-forced tokens, after a prompt and a few
warm-up tokens that are not timed. A run that passes the time limit counts with the tokens it has done, and says so. The
order of contestants rotates from round to round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from cgroup import CappedRun, die_tidily, run_capped
from contestant import Task
from page_cache import cached_bytes, evict, shards, warm
from results import ROOT, document, emit, spread, store
from rich.console import Console
from rich.table import Table

from swapless.units import parse_size

CONSOLE = Console(stderr=True, width=None if sys.stderr.isatty() else 140)
PLAIN = ("plain eager", "plain grouped_mm")
OURS = ("swapless original", "swapless fused")
MARGIN_BYTES = 50_000_000
"""What the budget of Swapless stays below the cap, so that a peak below the budget is no accident of the cap itself."""
OURS_RESIDENT = OURS[:1]
"""Once every expert is in its slot, the layout on disk makes no difference any more."""
KEEP_BOTH_SHARE = 0.9
COLD_SHARE = 0.01
"""Of the checkpoint, what may be cached when a capped run begins: pages that another process maps cannot be evicted."""
EQUALITY_TOKENS = 24
START_TIMEOUT_S = 240
BARS = {"1.2GB": 4.0, "2.0GB": 1.0}
RESIDENT_BAR = 1.15
READ_PATH_BAR = 0.85


class Bench:
    """One run of the benchmark: the tokens, the settings, and every single measurement."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.folder: Path = arguments.checkpoint
        self.threads: int = arguments.threads
        self.rounds: int = arguments.rounds
        self.time_limit_s: float = arguments.time_limit
        tokens = json.loads((self.folder / "tokens.json").read_text())
        self.prompt: list[int] = tokens["prompt"]
        self.warm_up: list[int] = tokens["decode"][: arguments.warm_up]
        self.decode: list[int] = tokens["decode"][arguments.warm_up :][: arguments.tokens]
        self.runs: list[dict[str, Any]] = []
        self.logits: dict[str, np.ndarray] = {}

    def task(self, name: str, **changes: Any) -> Task:
        """What the contestant called ``name`` does."""
        engine, kind = name.split()
        layout = kind if engine == "swapless" else "fused"
        task = Task(
            engine=engine,
            folder=str(self.folder / layout),
            implementation="eager" if engine == "swapless" else kind,
            prompt=self.prompt,
            warm_up=self.warm_up,
            decode=self.decode,
            threads=self.threads,
        )
        return replace(task, **changes)

    def perform(
        self, label: str, task: Task, cap_bytes: int | None
    ) -> tuple[CappedRun, dict[str, Any] | None, np.ndarray | None]:
        """Run one contestant in its process; its answer is None if it was killed or failed, which is a result too."""
        with tempfile.TemporaryDirectory() as scratch:
            logits_file = Path(scratch) / "logits.npy"
            task = replace(task, logits_file=str(logits_file))
            command = [sys.executable, str(ROOT / "benchmarks" / "contestant.py"), task.argument()]
            timeout_s = START_TIMEOUT_S + (task.time_limit_s or 600) * (1 + task.rehearsals)
            run = run_capped(command, cap_bytes, timeout_s=timeout_s, env=os.environ | {"HF_HUB_OFFLINE": "1"})
            if run.returncode != 0:
                reason = "killed for memory" if run.oom_killed else "timed out" if run.timed_out else run.stderr.strip()[-800:]
                CONSOLE.print(f"  {label}: failed ({reason})", markup=False)
                return run, None, None
            return run, json.loads(run.stdout), np.load(logits_file)

    def measure(
        self, phase: str, round_: int, name: str, task: Task, cap_bytes: int | None, cached: int | None
    ) -> float | None:
        """One timed run: kept whole in ``runs``, its tokens a second returned."""
        run, answer, logits = self.perform(f"{phase} {name}", task, cap_bytes)
        memory = run.figures()
        for key in ("returncode", "why_no_cgroup"):
            if not memory[key]:
                memory.pop(key)
        self.runs.append(
            {"phase": phase, "round": round_, "name": name, "cached_before_bytes": cached, "memory": memory, "answer": answer}
        )
        if answer is None or logits is None:
            return None
        self.logits.setdefault(f"{phase} {name}", logits)
        CONSOLE.print(
            f"  round {round_ + 1} {phase:>8} {name:<18} {answer['tokens_per_s']:7.2f} tok/s, {answer['tokens']} tokens, "
            f"peak {(run.max_usage_bytes or run.max_anon_bytes) / 1e6:.0f} MB, {run.wall_s:.0f} s in all",
            markup=False,
        )
        return float(answer["tokens_per_s"])

    def capped(self, caps: Sequence[str]) -> dict[str, list[str]]:
        """All contestants under every cap, round by round. Returns who was left out after the first round."""
        left_out: dict[str, list[str]] = {cap: [] for cap in caps}
        for round_ in range(self.rounds):
            for cap in caps:
                cap_bytes = parse_size(cap)
                names = [name for name in _rotated([*PLAIN, *OURS], round_) if name not in left_out[cap]]
                speeds: dict[str, float] = {}
                for name in names:
                    task = self.task(name, time_limit_s=self.time_limit_s)
                    if task.engine == "swapless":
                        task = replace(task, memory_bytes=cap_bytes - MARGIN_BYTES)
                    speeds[name] = self.measure(cap, round_, name, task, cap_bytes, self.chill()) or 0.0
                if round_ == 0:
                    left_out[cap] = _clearly_slower(speeds)
        return left_out

    def chill(self) -> int:
        """Evict the checkpoint and return the bytes that stayed all the same."""
        files = shards(self.folder)
        for _ in range(5):
            evict(files)
            left = cached_bytes(files)
            if left <= COLD_SHARE * sum(file.stat().st_size for file in files):
                return left
            time.sleep(1)
        CONSOLE.print(f"  {left / 1e6:.0f} MB of the checkpoint stay cached: is another process using it?", markup=False)
        return left

    def resident(self) -> list[str]:
        """Everything in memory and walked once before: the token time of the computation alone. Returns who was left out."""
        left_out: list[str] = []
        for round_ in range(self.rounds):
            speeds: dict[str, float] = {}
            for name in _rotated([*PLAIN, *OURS_RESIDENT], round_):
                if name in left_out:
                    continue
                task = self.task(name, rehearsals=1)
                if task.engine == "swapless":
                    task = replace(task, resident=1.0)
                else:
                    warm(shards(self.folder / "fused"))
                speeds[name] = self.measure("resident", round_, name, task, None, None) or 0.0
            if round_ == 0:
                left_out = _clearly_slower(speeds)
        return left_out

    def equality(self, cap: str) -> dict[str, Any]:
        """Compare outputs: exact at one thread, the difference of everything that was timed."""
        tasks = {"reference": self.task("plain eager", threads=1, aligned=True)}
        for name in OURS:
            few = self.decode[:EQUALITY_TOKENS]
            tasks[name] = self.task(name, threads=1, decode=few, memory_bytes=parse_size(cap) - MARGIN_BYTES)
        found: dict[str, np.ndarray] = {}
        for name, task in tasks.items():
            logits = self.perform(f"equality {name}", task, parse_size(cap) if name in OURS else None)[2]
            if logits is not None:
                found[name] = logits
        reference = found.get("reference")
        if reference is None:
            return {"error": "the reference did not run"}
        report: dict[str, Any] = {
            "reference": "plain eager, one thread, weights aligned to 64 bytes",
            "logits_std": float(reference.std()),
            "one_thread_bit_identical": {
                name: bool(name in found and np.array_equal(found[name], reference[: len(found[name])])) for name in OURS
            },
            "timed_runs": {name: _difference(logits, reference) for name, logits in self.logits.items()},
        }
        return report


def _clearly_slower(speeds: dict[str, float]) -> list[str]:
    best = max(speeds[name] for name in PLAIN)
    return [name for name in PLAIN if speeds[name] < KEEP_BOTH_SHARE * best]


def _rotated(names: list[str], by: int) -> list[str]:
    by %= len(names)
    return names[by:] + names[:by]


def _difference(logits: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    reference = reference[: len(logits)]
    return {
        "max_abs_logit_difference": float(np.abs(logits - reference).max()),
        "equal_greedy_share": float((logits.argmax(1) == reference.argmax(1)).mean()),
    }


def summarise(runs: list[dict[str, Any]], phase: str) -> dict[str, Any]:
    """Medians and spread of one phase, contestant by contestant."""
    table: dict[str, Any] = {}
    for name in (*PLAIN, *OURS):
        mine = [run for run in runs if run["phase"] == phase and run["name"] == name]
        good = [run for run in mine if run["answer"]]
        if not mine:
            continue
        row: dict[str, Any] = {"failed": len(mine) - len(good)}
        if good:
            row["tokens_per_s"] = spread([run["answer"]["tokens_per_s"] for run in good])
            row["token_s"] = spread([statistics.median(run["answer"]["token_s"]) for run in good])
            row["fewest_tokens"] = min(run["answer"]["tokens"] for run in good)
            row["load_s"] = spread([run["answer"]["load_s"] for run in good])
            row["prefill_s"] = spread([run["answer"]["prefill_s"] for run in good])
            row["max_anon_bytes"] = max(run["memory"]["max_anon_bytes"] for run in good)
            usage = [run["memory"]["max_usage_bytes"] for run in good]
            row["max_usage_bytes"] = max(usage) if None not in usage else None
            if name in OURS:
                row |= _our_figures(good)
        table[name] = row
    return table


def _our_figures(good: list[dict[str, Any]]) -> dict[str, Any]:
    """Hit rate and, beside it, the bytes that were moved."""
    stats = [run["answer"]["stats"] for run in good]
    seconds = [sum(run["answer"]["token_s"]) for run in good]
    budgets = [run["answer"]["budget"] for run in good]
    return {
        "hit_rate": statistics.median(s["hit_rate"] for s in stats),
        "bytes_a_token": statistics.median(s["decode_bytes_read"] / s["decode_tokens"] for s in stats),
        "bytes_per_s": statistics.median(s["decode_bytes_read"] / t for s, t in zip(stats, seconds)),
        "stall_share": statistics.median(s["decode_stall_s"] / t for s, t in zip(stats, seconds)),
        "slots": statistics.median(b["slots"] for b in budgets),
        "resident_share": statistics.median(b["slots"] / b["num_experts_total"] for b in budgets),
        "budget_bytes": budgets[0]["total_bytes"],
        "within_budget": all(
            (run["memory"]["max_usage_bytes"] or run["memory"]["max_anon_bytes"]) <= run["answer"]["budget"]["total_bytes"]
            for run in good
        ),
    }


def _median(table: dict[str, Any], names: Sequence[str], field: str, best: Any) -> float | None:
    values = [table[name][field]["median"] for name in names if name in table and field in table[name]]
    return best(values) if values else None


def judge(
    bench: Bench,
    summary: dict[str, dict[str, Any]],
    read_path: dict[str, dict[str, Any]],
    equality: dict[str, Any],
    caps: Sequence[str],
) -> list[dict[str, Any]]:
    """Every bar with what was reached. A contestant that never finished counts as not measured, not as infinitely slow."""
    bars: list[dict[str, Any]] = []

    def add(what: str, got: Any, bar: Any, met: bool | None) -> None:
        bars.append({"what": what, "got": got, "bar": bar, "met": met})

    for cap in caps:
        table = summary[cap]
        plain = _median(table, PLAIN, "tokens_per_s", max)
        for name in OURS:
            ours = _median(table, [name], "tokens_per_s", max)
            ratio = ours / plain if ours and plain else None
            bar = BARS.get(cap)
            add(f"{cap}: {name} / faster plain, tokens a second", ratio, bar and f">= {bar}", ratio and bar and ratio >= bar)
            if "within_budget" in table.get(name, {}):
                within = table[name]["within_budget"]
                add(f"{cap}: {name}, peak with page cache below its budget", within, True, within)
    allowed_cached_bytes = COLD_SHARE * sum(file.stat().st_size for file in shards(bench.folder))
    cold = max(run["cached_before_bytes"] or 0 for run in bench.runs)
    add(
        "capped runs began cold, most MB cached",
        cold / 1e6,
        f"<= {allowed_cached_bytes / 1e6:.0f}",
        cold <= allowed_cached_bytes,
    )
    plain_s = _median(summary["resident"], PLAIN, "token_s", min)
    for name in OURS_RESIDENT:
        ours_s = _median(summary["resident"], [name], "token_s", min)
        ratio = ours_s / plain_s if ours_s and plain_s else None
        add(f"resident: {name} / faster plain, token time", ratio, f"<= {RESIDENT_BAR}", ratio and ratio <= RESIDENT_BAR)
    for layout, figures in read_path.items():
        share = figures["streamed_share_of_bare"]
        add(f"read path, {layout}: share of the bare loop", share, f">= {READ_PATH_BAR}", share >= READ_PATH_BAR)
    for name, same in equality.get("one_thread_bit_identical", {}).items():
        add(f"{name}: logits bit-identical to eager at one thread", same, True, same)
    return bars


def measure_read_path(folder: Path, rounds: int, threads: int) -> dict[str, dict[str, Any]]:
    """The read path of both layouts, each in a process of its own."""
    found = {}
    for layout in ("original", "fused"):
        script = str(ROOT / "benchmarks" / "read_path.py")
        command = [sys.executable, script, "--figures-only", "--checkpoint", str(folder / layout)]
        run = run_capped([*command, "--rounds", str(rounds), "--threads", str(threads)], timeout_s=600)
        if run.returncode != 0:
            raise RuntimeError(f"the read path benchmark failed: {run.stderr[-800:]}")
        found[layout] = json.loads(run.stdout)
    return found


def show(summary: dict[str, dict[str, Any]], bars: list[dict[str, Any]]) -> None:
    """The tables on stderr."""
    table = Table("phase", "contestant", "tok/s", "min-max", "hit rate", "MB a token", "GB/s", "stall", "peak MB", "anon MB")
    for phase, rows in summary.items():
        for name, row in rows.items():
            speed = row.get("tokens_per_s")
            ours = "hit_rate" in row and row["hit_rate"] is not None
            table.add_row(
                phase,
                name + (f" ({row['failed']} failed)" if row["failed"] else ""),
                f"{speed['median']:.2f}" if speed else "-",
                f"{speed['min']:.2f}-{speed['max']:.2f}" if speed else "-",
                f"{row['hit_rate']:.3f}" if ours else "",
                f"{row['bytes_a_token'] / 1e6:.0f}" if ours else "",
                f"{row['bytes_per_s'] / 1e9:.2f}" if ours else "",
                f"{row['stall_share']:.2f}" if ours else "",
                f"{row['max_usage_bytes'] / 1e6:.0f}" if row.get("max_usage_bytes") else "-",
                f"{row['max_anon_bytes'] / 1e6:.0f}" if "max_anon_bytes" in row else "-",
            )
    CONSOLE.print(table)
    verdicts = Table("bar", "got", "asked", "met")
    for bar in bars:
        got = f"{bar['got']:.3f}" if isinstance(bar["got"], float) else str(bar["got"])
        met = "-" if bar["bar"] is None else "not measured" if bar["met"] is None else "yes" if bar["met"] else "NO"
        verdicts.add_row(bar["what"], got, str(bar["bar"]), met)
    CONSOLE.print(verdicts)


def main() -> None:
    """Command line: make what is missing, run all phases, print the document, store it."""
    parser = argparse.ArgumentParser(description="Decode speed under a memory cap, beside plain transformers.")
    parser.add_argument("--checkpoint", type=Path, default=Path("out/bench-3gb"))
    parser.add_argument("--caps", default="1.2GB,2.0GB", help="comma-separated sizes with units")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64, help="timed decode tokens")
    parser.add_argument("--warm-up", type=int, default=8, help="decode tokens before the clock starts")
    parser.add_argument("--time-limit", type=float, default=60.0, help="seconds of decoding after which a capped run stops")
    parser.add_argument("--quick", action="store_true", help="one round of few tokens, nothing stored")
    parser.add_argument("--no-store", action="store_true", help="print the result only")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.tokens, arguments.warm_up, arguments.time_limit = 1, 8, 2, 20.0
    die_tidily()
    caps = [cap.strip() for cap in arguments.caps.split(",")]
    if not (arguments.checkpoint / "manifest.json").exists():
        make = [sys.executable, str(ROOT / "benchmarks" / "make_checkpoint.py"), "--out", str(arguments.checkpoint)]
        made = run_capped(make, pass_output=False)
        if made.returncode != 0:
            raise SystemExit(f"The checkpoint could not be made: {made.stderr[-800:]}")
    manifest = json.loads((arguments.checkpoint / "manifest.json").read_text())

    bench = Bench(arguments)
    CONSOLE.print("read path")
    read_path = measure_read_path(arguments.checkpoint, arguments.rounds, arguments.threads)
    CONSOLE.print("under a cap")
    left_out = bench.capped(caps)
    CONSOLE.print("fully resident, warm")
    left_out["resident"] = bench.resident()
    CONSOLE.print("equality")
    equality = bench.equality(caps[0])
    summary = {phase: summarise(bench.runs, phase) for phase in (*caps, "resident")}
    bars = judge(bench, summary, read_path, equality, caps)
    show(summary, bars)
    config = {
        "caps": caps,
        "margin_bytes": MARGIN_BYTES,
        "rounds": arguments.rounds,
        "threads": arguments.threads,
        "prompt_tokens": len(bench.prompt),
        "warm_up_tokens": len(bench.warm_up),
        "tokens": len(bench.decode),
        "time_limit_s": arguments.time_limit,
        "policy": "lru",
        "checkpoint": manifest,
    }
    measured = {
        "bars": bars,
        "summary": summary,
        "left_out_after_round_1": left_out,
        "read_path": read_path,
        "equality": equality,
        "runs": bench.runs,
    }
    result = document("offload", config=config, measured=measured, data=arguments.checkpoint)
    emit(result)
    if not (arguments.quick or arguments.no_store):
        CONSOLE.print(f"stored {store(result).name}")
    if not all(equality.get("one_thread_bit_identical", {"": False}).values()):
        raise SystemExit("The outputs differ from the reference at one thread: the speeds above are those of a wrong answer.")


if __name__ == "__main__":
    main()
