"""Gate look-ahead in the engine: what it foresees, what its reads come to, and what it is worth in tokens a second.

    python benchmarks/lookahead.py                # the 3 GB checkpoint under a cap, and the embedded model

Contestants differ in ``prefetch`` alone: none, ``gate`` (one MoE layer ahead) and ``gate:2`` (two). Each is a process of its
own under the same memory cgroup, decodes the same teacher-forced tokens from a cold page cache, and the order rotates from
round to round. The engine tries reading ahead in turns with and without, and switches it off where it does not pay: the tokens
it was on for are given, and the medians of a token in the two halves of the trial.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from cgroup import die_tidily
from contestant import Task, perform_apart
from results import document, emit, spread, store
from rich.console import Console

from swapless import embedded
from swapless.units import parse_size

CONSOLE = Console(stderr=True, width=140)
KINDS = (None, "gate", "gate:2")
MARGIN_BYTES = 50_000_000
TIMEOUT_S = 600


def embedded_tokens(count: int) -> list[int]:
    """Token ids of a text for the embedded model: its own card, so that nothing outside the repository is needed."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(embedded.path())((embedded.path() / "MODEL_CARD.md").read_text())["input_ids"]
    return list(ids[:count])


def compare(task: Task, cap_bytes: int | None, rounds: int) -> dict[str, Any]:
    """All kinds in turn, and what became of their reads."""
    answers: dict[str, list[dict[str, Any]]] = {str(kind): [] for kind in KINDS}
    for round_ in range(rounds):
        by = round_ % len(KINDS)
        for kind in KINDS[by:] + KINDS[:by]:
            answer = perform_apart(replace(task, prefetch=kind), cap_bytes, TIMEOUT_S)
            answers[str(kind)].append(answer)
            CONSOLE.print(f"  round {round_ + 1} {kind!s:>6}: {answer['tokens_per_s']:.2f} tok/s", markup=False)
    without = statistics.median(answer["tokens_per_s"] for answer in answers["None"])
    table = {}
    for kind, runs in answers.items():
        stats = [run["stats"] for run in runs]
        speed = spread([run["tokens_per_s"] for run in runs])
        table[kind] = {
            "tokens_per_s": speed,
            "of_none": speed["median"] / without,
            "stall_share": statistics.median(s["decode_stall_s"] / s["decode_s"] for s in stats),
            "bytes_a_token": statistics.median(s["decode_bytes_read"] / s["decode_tokens"] for s in stats),
            "slots": runs[0]["budget"]["slots"],
            "hit_rate": statistics.median(s["hit_rate"] for s in stats),
            "recall_by_lead": stats[-1]["prefetch_recall"],
            "tokens_on": statistics.median(s["prefetch_tokens"] for s in stats),
            "switched_off_runs": sum(s["prefetch_times_off"] > 0 for s in stats),
            "own_s_a_token": _median(s["prefetch_own_s_per_token"] for s in stats),
            "trial_with_s": _median(s["prefetch_with_s"] for s in stats),
            "trial_without_s": _median(s["prefetch_without_s"] for s in stats),
            **{what: statistics.median(s[f"prefetch_{what}"] for s in stats) for what in ("reads", "useful", "late", "wasted")},
        }
        CONSOLE.print(f"  {kind}: {json.dumps(table[kind])}", markup=False)
    return table


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Gate look-ahead: recall, reads, tokens a second.")
    parser.add_argument("--checkpoint", type=Path, default=Path("out/bench-3gb"))
    parser.add_argument("--caps", default="1.2GB,2.0GB", help="comma-separated sizes with units")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=96, help="timed decode tokens")
    parser.add_argument("--no-store", action="store_true")
    arguments = parser.parse_args()
    die_tidily()
    given = json.loads((arguments.checkpoint / "tokens.json").read_text())
    large = Task(
        engine="swapless",
        folder=str(arguments.checkpoint / "original"),
        prompt=given["prompt"],
        warm_up=given["decode"][:8],
        decode=given["decode"][8:][: arguments.tokens],
        threads=arguments.threads,
    )
    ids = embedded_tokens(64 + 8 + arguments.tokens)
    own = Task(
        engine="swapless",
        folder=str(embedded.path()),
        prompt=ids[:64],
        warm_up=ids[64:72],
        decode=ids[72:],
        threads=1,
        resident=0.25,
    )
    measured: dict[str, Any] = {}
    CONSOLE.print("embedded model, 25 % resident")
    measured["embedded 25%"] = compare(own, None, arguments.rounds)
    for cap in arguments.caps.split(","):
        CONSOLE.print(f"3 GB checkpoint under {cap}")
        cap_bytes = parse_size(cap)
        measured[cap] = compare(replace(large, memory_bytes=cap_bytes - MARGIN_BYTES), cap_bytes, arguments.rounds)
    config = {"caps": arguments.caps, "rounds": arguments.rounds, "threads": arguments.threads, "tokens": arguments.tokens}
    result = document("lookahead", config=config, measured=measured, data=arguments.checkpoint)
    emit(result)
    if not arguments.no_store:
        CONSOLE.print(f"stored {store(result).name}")


if __name__ == "__main__":
    main()
