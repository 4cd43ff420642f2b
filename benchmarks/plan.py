"""Does the plan foresee how fast the engine decodes, in each precision and at several budgets?

    python benchmarks/plan.py                # about 35 minutes; needs the checkpoint of benchmarks/make_checkpoint.py
    python benchmarks/plan.py --for 240      # stop after so many seconds; the same command goes on
    python benchmarks/plan.py --quick        # one round of few tokens, nothing stored: only to see that it runs

The checkpoint is packed in 8 and in 4 bits into a scratch folder, and a trace is recorded of tokens that are never timed, with
the share of experts that the next router foresees. Then, in each of five rounds, for bf16, int8 and int4 at three memory
budgets, in turning order: the plan is made from the unpacked checkpoint, as a user would; a process of its own loads the model
with that budget and decodes, a few tokens at a time, with the read path probed before, between and after (with the copy into a
slot, where experts need one), once without and, where something is left to read, once with reading ahead, as ``swapless run``
does by itself; and the plan is made again. The clock starts after 64 tokens, when most slots have been used once: memory that
a virtual machine has never had costs it several milliseconds an expert at the first touch, and never again. What counts as
expected is the mean of the two plans' token times, with the bandwidth that the probes of that run found, since a shared disk
drifts within seconds; the figure with the plan's own bandwidth stands beside it. Medians over the rounds must agree within 20
%, no round may be faster than its floor by more than the spread of its probes, and slots and peak memory must be within what
was foreseen.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from kept import Kept
from results import document, emit, store
from timeline import CONTEXT, Disk, Run, arguments

from swapless.store.packed import is_packed

BUDGETS = (900_000_000, 1_200_000_000, 2_000_000_000)
BITS = (16, 8, 4)
WITHIN = 0.20


def worker(asked: argparse.Namespace) -> None:
    """One run in this process: load, decode with probes in between, print what it came to."""
    given = json.loads(asked.tokens_file.read_text())
    run = Run(Path(asked.worker), asked.threads, CONTEXT, memory=asked.memory, prefetch=asked.prefetch)
    engine = run.engine
    disk = Disk(Path(asked.worker), engine.probe.block_bytes, copied=not is_packed(Path(asked.worker)))
    run.prefill(given["prompt"])
    run.decode(given["decode"][: asked.warm_up])
    engine.reset_stats()
    token_s: list[float] = []
    tokens = given["decode"][asked.warm_up : asked.warm_up + asked.tokens]
    reads = [disk.read_s_per_byte(engine.probe.depth)]
    for first in range(0, len(tokens), asked.piece):
        token_s += run.decode(tokens[first : first + asked.piece])
        reads.append(disk.read_s_per_byte(engine.probe.depth))
    disk.close()
    stats, budget = engine.stats(), engine.budget
    found = {
        "tokens_per_s": len(token_s) / sum(token_s),
        "hit_rate": stats.hit_rate,
        "bytes_a_token": stats.decode_bytes_read / stats.decode_tokens,
        "slots": budget.slots,
        "depth": engine.probe.depth,
        "read_ahead": {name: value for name, value in stats.to_dict().items() if name.startswith("prefetch_")},
        "probed_bytes_per_s": [1 / one for one in reads],
        "peak_memory_bytes": stats.peak_memory_bytes - disk.nbytes,
        "peak_memory_source": stats.peak_memory_source,
        "parts": dict(budget.parts),
    }
    engine.close()
    json.dump(found, sys.stdout)


def measured(folder: Path, memory: int, prefetch: str, asked: argparse.Namespace) -> dict[str, Any]:
    """The same in a process of its own."""
    options = {"memory": memory, "prefetch": prefetch, "threads": asked.threads, "tokens": asked.tokens}
    options |= {"warm-up": asked.warm_up, "piece": asked.piece, "tokens-file": asked.checkpoint / "tokens.json"}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    done = subprocess.run([sys.executable, __file__, "--worker", str(folder), *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the run of {folder.name} with {memory} bytes failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def record(folder: Path, scratch: Path, asked: argparse.Namespace) -> tuple[Any, float]:
    """A trace of all tokens after those that are timed, and the share of experts that the next router foresees; kept."""
    from swapless.trace import read_trace, write_trace

    out, recall = scratch / "trace.parquet", scratch / "recall.json"
    if not recall.exists():
        given = json.loads((asked.checkpoint / "tokens.json").read_text())
        rest = given["decode"][asked.warm_up + asked.tokens :]
        run = Run(folder, asked.threads, len(rest) + 1, resident=0.5, prefetch="gate")
        run.prefill(rest[:16])
        run.decode(rest[16:])
        write_trace(out, run.engine.trace())
        recall.write_text(json.dumps(run.engine.stats().prefetch_recall[1]))
        run.close()
    return read_trace(out), json.loads(recall.read_text())


class Planner:
    """Plans of the unpacked checkpoint, one precision at a time."""

    def __init__(self, folder: Path, trace: Any, recall: float, scratch: Path) -> None:
        from swapless.plan.hits import TraceHits
        from swapless.plan.machine import machine
        from swapless.runtime.open import open_checkpoint

        self._opened = open_checkpoint(folder)
        self._hits, self._recall = TraceHits(trace, self._opened), recall
        self.machine = machine(folder=scratch)

    def __call__(self, bits: int, memory: int) -> Any:
        """The set-ups without and, where it is worth its slots, with reading ahead."""
        from swapless.plan.planner import plan

        wanted: Any = {"context": CONTEXT, "precisions": [(bits, 16)], "recall": self._recall}
        return plan(self._opened, "model", memory, self.machine, self._hits, **wanted).set_ups

    def with_bandwidth(self, row: Any, run: dict[str, Any], *, hits: bool = False) -> Any:
        """What the plan would have said, had it found the bandwidth of the run's own probes (and known its ``hits``)."""
        from swapless.plan.speed import binomial

        probed = len(run["probed_bytes_per_s"]) / sum(1 / one for one in run["probed_bytes_per_s"])
        return row.expected.speed(probed, binomial(row.expected.costs.top_k, run["hit_rate"]) if hits else None)


def one(planner: Planner, folder: Path, bits: int, memory: int, turn: int, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Plan, run each set-up in turning order, plan."""
    before = planner(bits, memory)
    order = range(len(before))[:: -1 if turn % 2 else 1]
    runs = {place: measured(folder, memory, before[place].prefetch or "none", asked) for place in order}
    plans = [before] if asked.quick else [before, planner(bits, memory)]
    return [compared(planner, [rows[place] for rows in plans], runs[place]) for place in range(len(before))]


def compared(planner: Planner, rows: list[Any], run: dict[str, Any]) -> dict[str, Any]:
    """What the plans of one set-up said, beside what it came to."""
    before = rows[0]
    speeds = [planner.with_bandwidth(row, run) for row in rows]
    floor_s = statistics.fmean(found.floor_s for found in speeds)
    spread = max(run["probed_bytes_per_s"]) / min(run["probed_bytes_per_s"])
    found = {
        "bits": before.bits,
        "memory_bytes": before.budget.total_bytes,
        "prefetch": before.prefetch,
        "expected_tokens_per_s": 1 / statistics.fmean(found.token_s for found in speeds),
        "expected_with_own_probe": 1 / statistics.fmean(row.speed.token_s for row in rows),
        "expected_with_its_hits": 1 / statistics.fmean(planner.with_bandwidth(row, run, hits=True).token_s for row in rows),
        "expectations": [row.expected.to_dict() for row in rows],
        "floor_tokens_per_s": 1 / floor_s,
        "floor_beaten": run["tokens_per_s"] * floor_s > spread,
        "expected_hit_rate": before.hit_rate,
        "expected_slots": before.budget.slots,
        "expected_bytes_a_token": before.speed.bytes_a_token,
        "compute_s": speeds[0].compute_s,
        "expected_parts": dict(before.budget.parts),
    }
    return found | run


def name_of(row: dict[str, Any]) -> str:
    """A set-up in words."""
    return f"{row['bits']:2d} bits, {row['memory_bytes'] / 1e9:.1f} GB{', reading ahead' if row['prefetch'] else ''}"


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over the rounds for each precision and budget."""
    rows = []
    for bits in BITS:
        for memory, prefetch in itertools.product(BUDGETS, (None, "gate")):
            mine = [run for run in runs if (run["bits"], run["memory_bytes"], run["prefetch"]) == (bits, memory, prefetch)]
            if not mine:
                continue
            names = ("expected_tokens_per_s", "expected_with_own_probe", "tokens_per_s", "floor_tokens_per_s")
            medians = {name: statistics.median(run[name] for run in mine) for name in names}
            ratio = medians["expected_tokens_per_s"] / medians["tokens_per_s"]
            row = {
                "bits": bits,
                "memory_bytes": memory,
                "prefetch": prefetch,
                **medians,
                "ratio": ratio,
                "ratio_of_rounds": sorted(run["expected_tokens_per_s"] / run["tokens_per_s"] for run in mine),
                "within": abs(ratio - 1) <= WITHIN,
                "floor_beaten": sum(run["floor_beaten"] for run in mine),
                "slots": [mine[0]["expected_slots"], mine[0]["slots"]],
                "hit_rate": [mine[0]["expected_hit_rate"], mine[0]["hit_rate"]],
                "peak_below_budget": all(run["peak_memory_bytes"] <= memory for run in mine),
            }
            rows.append(row)
            verdict = "met" if row["within"] else "MISSED"
            print(
                f"{name_of(row)}: expected {medians['expected_tokens_per_s']:.2f}, measured "
                f"{medians['tokens_per_s']:.2f} tok/s, ratio {ratio:.3f} ({row['ratio_of_rounds'][0]:.3f} to "
                f"{row['ratio_of_rounds'][-1]:.3f}), at most {medians['floor_tokens_per_s']:.2f}; slots "
                f"{row['slots'][0]} expected, {row['slots'][1]} given; hits {row['hit_rate'][0]:.3f}, {row['hit_rate'][1]:.3f} "
                f"{verdict}",
                file=sys.stderr,
            )
    return rows


def main() -> None:
    """Measure, print a table and one JSON document, store the result."""
    parser = arguments(__doc__.split("\n")[0], warm_up=64)
    parser.add_argument(
        "--scratch", type=Path, default=Path("out/plan"), help="packed stores, 3 GB, and what was measured so far"
    )
    parser.add_argument("--for", dest="stop_after", type=float, help="begin no further run after so many seconds")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--prefetch", help=argparse.SUPPRESS)
    parser.add_argument("--tokens-file", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        worker(asked)
        return
    if asked.quick:
        asked.rounds, asked.tokens = 1, min(asked.tokens, 8)
        asked.scratch = asked.scratch.with_name(asked.scratch.name + "-quick")
    import torch
    from transformers.utils import logging

    from swapless.runtime.packing import pack

    torch.set_num_threads(asked.threads)
    os.environ["OMP_NUM_THREADS"] = str(asked.threads)
    logging.disable_progress_bar()
    folder, scratch = asked.checkpoint / asked.layout, asked.scratch
    scratch.mkdir(parents=True, exist_ok=True)
    kept = Kept(scratch / "runs.jsonl", asked.stop_after)
    folders = {16: folder} | {bits: scratch / f"int{bits}" for bits in BITS[1:]}
    for bits in BITS[1:]:
        print(f"packing in {bits} bits, if it is not done", file=sys.stderr, flush=True)
        pack(folder, folders[bits], bits=bits)
    planner = Planner(folder, *record(folder, scratch, asked), scratch)
    cases = [(bits, memory) for memory in BUDGETS for bits in BITS]
    for number in range(asked.rounds):
        turn = 2 * number % len(cases)
        done = {(run["bits"], run["memory_bytes"]) for run in kept.runs if run["round"] == number}
        for bits, memory in (case for case in (*cases[turn:], *cases[:turn]) if case not in done):
            if not kept.time_left():
                print("the same command goes on from here", file=sys.stderr)
                return
            for run in one(planner, folders[bits], bits, memory, number, asked):
                kept.add(run | {"round": number})
                print(
                    f"round {number + 1}: {name_of(run)}: expected {run['expected_tokens_per_s']:.2f} "
                    f"({run['expected_with_own_probe']:.2f} with its own probe), measured {run['tokens_per_s']:.2f} tok/s, "
                    f"at most {run['floor_tokens_per_s']:.2f}",
                    file=sys.stderr,
                    flush=True,
                )
    if any(run["commit"] != kept.commit for run in kept.runs):
        raise SystemExit(f"the runs in {scratch} are of several commits: remove it and begin again")
    config = {name: value for name, value in vars(asked).items() if isinstance(value, (int, str))}
    found = {"rows": summarise(kept.runs), "runs": kept.runs, "figures_of_machine": planner.machine.to_dict()}
    result = document("plan", config=config, measured=found, data=folder)
    emit(result)
    if not asked.quick:
        store(result)
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
