"""Decoding beside busy neighbours: 0, 1 and 2 processes that never rest, with 35 %, 70 % and all of the experts resident.

    python benchmarks/neighbour.py --trace deepseek-v2-lite.puffin.parquet                 # makes and packs the checkpoint
    python benchmarks/neighbour.py --trace ... --for 240           # stop after so long; the same command goes on
    python benchmarks/neighbour.py --trace ... --against ../before # an earlier checkout too, in turns: nothing lost alone?
    python benchmarks/neighbour.py --trace ... --quick             # 4 small layers, one round, nothing stored

The checkpoint is ``benchmarks/make_realistic.py``'s. A run is a process of its own, which loads, decodes without neighbours and
then with each number of them, in an order that rotates with the round. The neighbours are plain loops, at the same priority.
After each change ``--settle`` seconds of tokens pass before the clock starts, and are kept apart: that is how long the engine
has to notice. The load of the machine is noted at the beginning of each run and in each part of it, as processes ready to run
besides the decoding one; a run on a machine that was not idle at its beginning says so. Ratios are of medians of rounds,
against the same run without neighbours; the fair share of two cores beside one busy process is 2 for a program of one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kept import Kept
from make_realistic import QUICK, Shape, make
from page_cache import evict, shards
from results import ROOT, document, emit, spread, store

SHARES = (0.35, 0.70, 1.0)
FORMS = ("int4", "bf16")
NEIGHBOURS = (0, 1, 2)
MOST_SLOWER = {1: 2.5, 2: 4.0}
HERE = "this checkout"
BEFORE = "the one before"
BUSY = "while True: pass"


@contextmanager
def neighbours(number: int) -> Iterator[None]:
    """So many processes that never rest."""
    running = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(number)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def ready_to_run() -> int:
    """Processes and threads of the whole machine that run or could, the one that asks included."""
    return int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0])


def worker(asked: argparse.Namespace) -> None:
    """One run in this process: load, decode beside each number of neighbours, print the times."""
    import torch
    from transformers.utils import logging

    import swapless

    logging.disable_progress_bar()
    torch.set_num_threads(asked.threads)
    given = json.loads(asked.tokens_file.read_text())
    tokens = iter(given["decode"] * 1000)
    found: dict[str, Any] = {"ready_before": statistics.fmean(_ready(20)), "parts": []}
    with swapless.load(asked.worker, resident=asked.resident, context=4096) as model, torch.inference_mode():
        cache = model(input_ids=torch.tensor([given["prompt"]]), use_cache=True, logits_to_keep=1).past_key_values

        def decode(seconds: float, least: int) -> list[float]:
            taken: list[float] = []
            while sum(taken) < seconds or len(taken) < least:
                if cache.get_seq_length() > 1024:
                    cache.crop(len(given["prompt"]))
                token = torch.tensor([[next(tokens)]])
                begun = time.perf_counter()
                model(input_ids=token, past_key_values=cache, use_cache=True)
                taken.append(time.perf_counter() - begun)
            return taken

        decode(asked.settle, 32)  # the cache fills, and what is compiled at first use is compiled
        for number in asked.order:
            with neighbours(number):
                time.sleep(0.2)
                settled = decode(asked.settle, 2)
                model.swapless.reset_stats()
                token_s = decode(asked.seconds, 4)
                stats = model.swapless.stats()
                found["parts"].append(
                    {
                        "neighbours": number,
                        "tokens_per_s": len(token_s) / sum(token_s),
                        "median_token_s": statistics.median(token_s),
                        "slowest_token_s": max(token_s),
                        "tokens": len(token_s),
                        "hit_rate": stats.hit_rate,
                        "stall_share": stats.decode_stall_s / sum(token_s),
                        "first_tokens_s": settled[:8],
                        "ready": statistics.fmean(_ready(5)),
                    }
                )
    json.dump(found, sys.stdout)


def _ready(times: int) -> list[int]:
    found = []
    for _ in range(times):
        time.sleep(0.02)
        found.append(ready_to_run() - 1)
    return found


def measure(source: Path, folder: Path, resident: float, order: tuple[int, ...], asked: argparse.Namespace) -> dict[str, Any]:
    """The same in a process of its own, with the package of the checkout ``source``."""
    evict(shards(folder))
    options = {"resident": resident, "threads": asked.threads, "settle": asked.settle, "seconds": asked.seconds}
    options |= {"tokens-file": asked.out / "tokens.json"}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, __file__, "--worker", str(folder), *words, "--order", *map(str, order)]
    environment = os.environ | {"PYTHONPATH": str(source / "src"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"the run of {folder.name}, {resident:.0%} resident, failed: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout))


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a form, share, checkout and number of neighbours: speed, and how many times slower than alone."""
    rows = []
    for form in FORMS:
        for resident in SHARES:
            for checkout in (HERE, BEFORE):
                mine = [run for run in runs if (run["form"], run["resident"], run["checkout"]) == (form, resident, checkout)]
                speeds: dict[int, list[float]] = {}
                for run in mine:
                    for part in run["parts"]:
                        speeds.setdefault(part["neighbours"], []).append(part["tokens_per_s"])
                if 0 not in speeds:
                    continue
                alone = statistics.median(speeds[0])
                for number, values in sorted(speeds.items()):
                    slower = alone / statistics.median(values)
                    row = {"form": form, "resident": resident, "checkout": checkout, "neighbours": number}
                    row |= {"tokens_per_s": spread(values), "times_slower": slower}
                    if number in MOST_SLOWER:
                        row["held"] = slower <= MOST_SLOWER[number]
                    rows.append(row)
    return rows


def against_before(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Speed of this checkout over that of the one before, where both were measured."""
    speeds = {(r["form"], r["resident"], r["neighbours"], r["checkout"]): r["tokens_per_s"]["median"] for r in rows}
    return [
        {
            "form": form,
            "resident": resident,
            "neighbours": number,
            "times_as_fast": speeds[form, resident, number, HERE] / before,
        }
        for (form, resident, number, checkout), before in speeds.items()
        if checkout == BEFORE and (form, resident, number, HERE) in speeds
    ]


def show(rows: list[dict[str, Any]], faster: list[dict[str, Any]]) -> None:
    """The table, for people."""
    for row in rows:
        speed = row["tokens_per_s"]
        held = {None: "", True: "  held", False: "  NOT HELD"}[row.get("held")]
        print(
            f"{row['form']} {row['resident']:>4.0%} {row['checkout']:<14} beside {row['neighbours']}: "
            f"{speed['median']:6.2f} tok/s ({speed['min']:.2f} to {speed['max']:.2f}), {row['times_slower']:.2f}x slower{held}",
            file=sys.stderr,
        )
    for row in faster:
        name = f"{row['form']} {row['resident']:.0%} beside {row['neighbours']}"
        print(f"{name}: {row['times_as_fast']:.3f} times as fast as before", file=sys.stderr)


def main() -> None:
    """Make what is needed, measure, print a table and one JSON document, store the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trace", type=Path, help="a recorded trace with tokens, whose routing is reproduced")
    parser.add_argument("--out", type=Path, default=Path("out/neighbour"))
    parser.add_argument("--layers", type=int, default=8, help="MoE layers of the checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--settle", type=float, default=4.0, help="seconds of tokens before the clock starts")
    parser.add_argument("--seconds", type=float, default=6.0, help="seconds of tokens that are timed, at least four tokens")
    parser.add_argument("--forms", nargs="*", default=list(FORMS), choices=FORMS)
    parser.add_argument("--shares", nargs="*", type=float, default=list(SHARES))
    parser.add_argument("--against", type=Path, help="another checkout, measured in turns with this one")
    parser.add_argument("--before-alone", action="store_true", help="measure that one without neighbours only")
    parser.add_argument("--for", dest="stop_after", type=float, help="begin no further run after so many seconds")
    parser.add_argument("--quick", action="store_true", help="small model, one round, nothing stored")
    parser.add_argument("--no-store", action="store_true", help="print the result only")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--resident", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--order", nargs="*", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--tokens-file", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        worker(asked)
        return
    if asked.trace is None:
        parser.error("--trace is needed")
    if asked.quick:
        asked.rounds, asked.settle, asked.seconds, asked.out = 1, 1.0, 1.0, asked.out.with_name(asked.out.name + "-quick")
    from swapless.runtime.packing import pack

    shape = QUICK if asked.quick else Shape(moe_layers=asked.layers)
    folders = {"bf16": asked.out / "fused", "int4": asked.out / "int4"}
    if not (asked.out / "manifest.json").exists():
        make(asked.out, asked.trace, shape=shape)
    if "int4" in asked.forms:
        pack(folders["bf16"], folders["int4"], bits=4, dense_bits=4)
    kept = Kept(asked.out / "runs.jsonl", asked.stop_after)
    checkouts = {HERE: ROOT} | ({BEFORE: asked.against.resolve()} if asked.against else {})
    cases = [(form, share, name) for form in asked.forms for share in asked.shares for name in checkouts]
    for number in range(asked.rounds):
        names = [*cases[number % len(cases) :], *cases[: number % len(cases)]]
        done = {(run["form"], run["resident"], run["checkout"]) for run in kept.runs if run["round"] == number}
        for form, share, name in (case for case in names if case not in done):
            if not kept.time_left():
                print("the same command goes on from here", file=sys.stderr)
                return
            turn = number % len(NEIGHBOURS)
            order = (0,) if name == BEFORE and asked.before_alone else (*NEIGHBOURS[turn:], *NEIGHBOURS[:turn])
            run = measure(checkouts[name], folders[form], share, order, asked)
            kept.add({"round": number, "form": form, "resident": share, "checkout": name} | run)
            parts = ", ".join(f"{p['tokens_per_s']:.2f} beside {p['neighbours']}" for p in run["parts"])
            busy = f" (machine busy: {run['ready_before']:.1f} ready)" if run["ready_before"] > 0.5 else ""
            print(f"round {number + 1}: {form} {share:.0%} {name}: {parts} tok/s{busy}", file=sys.stderr, flush=True)
    rows = summarise(kept.runs)
    faster = against_before(rows)
    show(rows, faster)
    config = {name: value for name, value in vars(asked).items() if isinstance(value, (int, float, list))}
    found = {"rows": rows, "against_before": faster, "runs": kept.runs}
    result = document("neighbour", config=config, measured=found, data=folders["bf16"])
    emit(result)
    if not (asked.quick or asked.no_store):
        store(result)


if __name__ == "__main__":
    main()
