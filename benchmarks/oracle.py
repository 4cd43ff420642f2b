"""Twins of one size, trained one after the other: what does each router cost in quality, and what does it save in swaps?

    python -m benchmarks.oracle --corpus domains.parquet            # say what would run, and what is done
    python -m benchmarks.oracle --corpus domains.parquet --queue    # run it; stop at any moment, start again, it goes on
    python -m benchmarks.oracle --corpus domains.parquet --queue --only theme-gate,switch

Several processes with `--queue` share the work; on few cores one thread each is best. Stages: `tune` trains `dense` and
`switch` at three learning rates, at full length (what is best after a quarter is not best at the end), and the best of each
with other seeds; `twins` trains every router at the best rate of `switch` (`dense` at its own), or all at `--rate`; `seeds`
repeats `dense`, `switch` and the winner. Each run leaves `result.json` and bf16 weights in its folder, and a copy of the result
in `benchmarks/results/oracle/`; the table is built from those.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.results import RESULTS, commit, machine, versions
from swapless import embedded
from swapless.atomic import write_json
from swapless.cli.oracle import compare as print_table
from swapless.errors import SwaplessError
from swapless.oracle.compare import measure_run, rows_of
from swapless.oracle.corpus import domain_texts, read_documents, token_streams
from swapless.oracle.evaluate import held_out
from swapless.oracle.recipe import Recipe
from swapless.oracle.train import train

RATES = (0.01, 0.02, 0.04)
BUDGET = 0.06
"""Experts changed a token that a gate may spend in training; the bar is 0.1 on held-out text."""
HORIZON, SOON = 48.0, 16.0
"""Tokens over which a theme forgets, where it does."""
TOKEN_GATE = 0.2
"""A gate that looks at tokens learns as fast as embeddings do; one that begins as the oracle keeps the recipe's slower rate."""
ROUTERS: dict[str, dict[str, Any]] = {
    "dense": {},
    "switch": {"gate_lr_share": TOKEN_GATE},
    "theme-gate": {"changes": {"change_budget": BUDGET}},
    "oracle": {"changes": {"change_budget": BUDGET}},
    "prefix-mean": {},
    "hash-document": {},
    "theme-gate-forgets": {"router": "theme-gate", "changes": {"theme_tokens": HORIZON, "change_budget": BUDGET}},
    "theme-gate-forgets-soon": {"router": "theme-gate", "changes": {"theme_tokens": SOON, "change_budget": BUDGET}},
    "oracle-forgets": {"router": "oracle", "changes": {"theme_tokens": HORIZON, "change_budget": BUDGET}},
    "prefix-mean-forgets": {"router": "prefix-mean", "changes": {"theme_tokens": HORIZON}},
    "oracle-forgets-soon": {"router": "oracle", "changes": {"theme_tokens": SOON, "change_budget": BUDGET}},
    "prefix-mean-forgets-soon": {"router": "prefix-mean", "changes": {"theme_tokens": SOON}},
    "theme-gate-fast": {"router": "theme-gate", "gate_lr_share": 0.1, "changes": {"change_budget": BUDGET}},
    "theme-gate-slow": {"router": "theme-gate", "changes": {"memory_tokens": 0.0, "change_budget": BUDGET}},
    "switch-budget": {"router": "switch", "changes": {"change_budget": BUDGET}},
    "sticky": {"gate_lr_share": TOKEN_GATE},
    "soft-theme": {},
    "attention-output": {},
    "oracle-plain": {"router": "oracle"},
    "oracle-paper": {},
    "oracle-switch-warmup": {"router": "oracle", "warmup": "switch"},
}
"""Runs of the stage `twins` in their order: the question first, then the guards, then the rest."""
GUARDS = ("hash-document", "prefix-mean", "prefix-mean-forgets", "prefix-mean-forgets-soon")
NOT_WINNERS = ("dense", "switch", "oracle-paper", *GUARDS)
MOST_CHANGES, LEAST_EXPERTS = 10.0, 3.0


class Queue:
    """The list of runs, each known by name; what later ones are depends on the results of earlier ones."""

    def __init__(self, out: Path, base: Recipe, seeds: int) -> None:
        self.out, self.base, self.seeds = out, base, seeds

    def result(self, name: str) -> dict[str, Any] | None:
        """The result of a finished run."""
        file = self.out / name / "result.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def recipe(self, name: str, **changes: Any) -> Recipe:
        """The recipe of a router by its name here."""
        return replace(self.base, **{"router": name} | ROUTERS.get(name, {}) | changes)

    def best_rate(self, router: str) -> float | None:
        """The tuned learning rate; None until all rates were tried."""
        found = {rate: self.result(f"tune-{router}-{rate:g}") for rate in RATES}
        losses = {rate: result["figures"]["held_out_loss"] for rate, result in found.items() if result is not None}
        return min(losses, key=lambda rate: losses[rate]) if len(losses) == len(RATES) else None

    def take_over(self, name: str, recipe: Recipe) -> dict[str, Any] | None:
        """The result of a finished run of the same recipe, copied to ``name`` with its folder; None if there is none."""
        wanted = json.loads(json.dumps(asdict(recipe)))
        for file in sorted(self.out.glob("*/result.json")):
            result = json.loads(file.read_text(encoding="utf-8"))
            if result["recipe"] == wanted:
                shutil.copytree(file.parent, self.out / name)
                write_json(self.out / name / "result.json", result | {"name": name})
                return self.result(name)
        return None

    def winner(self) -> str | None:
        """The router of lowest loss among those that change few experts and follow a text better than the guards; or None."""
        guards = [self.result(name) for name in GUARDS]
        if None in guards:
            return None
        most_joined = min(guard["figures"]["joined_loss"] for guard in guards if guard is not None)
        fit: dict[str, float] = {}
        for name in ROUTERS:
            result = None if name in NOT_WINNERS else self.result(name)
            if result is None:
                continue
            figures = result["figures"]
            rates = figures["routing"]["changes_per_100"] + figures["routing_generated"]["changes_per_100"]
            follows = (
                min(figures["routing_joined"]["experts_in_window"]) >= LEAST_EXPERTS and figures["joined_loss"] < most_joined
            )
            if max(rates) <= MOST_CHANGES and follows:
                fit[name] = figures["held_out_loss"]
        return min(fit, key=lambda name: fit[name]) if fit else None

    def runs(self) -> Iterator[tuple[str, Recipe | None]]:
        """Names and recipes in order; a recipe is None while it still depends on a run that is not done."""
        for rate in RATES:
            for router in ("dense", "switch"):
                yield f"tune-{router}-{rate:g}", self.recipe(router, peak_lr=rate)
        for seed in range(1, self.seeds):
            for router in ("dense", "switch"):
                rate = self.best_rate(router)
                known = None if rate is None else self.recipe(router, peak_lr=rate, seed=seed)
                yield f"tune-{router}-{'best' if rate is None else format(rate, 'g')}-seed{seed}", known
        for name in ROUTERS:
            rate = self.best_rate("dense" if name == "dense" else "switch")
            yield name, None if rate is None else self.recipe(name, peak_lr=rate)
        for seed in range(1, self.seeds):
            for name in ("dense", "switch", "winner"):
                real = self.winner() if name == "winner" else name
                rate = self.best_rate("dense" if name == "dense" else "switch")
                known = None if real is None or rate is None else self.recipe(real, peak_lr=rate, seed=seed)
                yield f"{real or name}-seed{seed}", known


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("out/oracle"), help="folder of the runs")
    parser.add_argument("--queue", action="store_true", help="run what is not done")
    parser.add_argument("--only", default=None, metavar="LIST", help="names of runs, by their beginnings")
    parser.add_argument("--steps", type=int, default=Recipe().steps)
    parser.add_argument("--warmup-steps", type=int, default=Recipe().warmup_steps)
    parser.add_argument("--rate", type=float, default=None, help="this learning rate for all, without tuning")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-store", action="store_true", help="leave benchmarks/results alone")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    base = Recipe(steps=arguments.steps, warmup_steps=arguments.warmup_steps)
    queue = Queue(arguments.out, base, arguments.seeds)
    if arguments.rate is not None:
        queue.best_rate = lambda router: arguments.rate  # type: ignore[method-assign]
    wanted = None if arguments.only is None else tuple(arguments.only.split(","))

    def chosen() -> list[tuple[str, Recipe | None]]:
        named = [run for run in queue.runs() if wanted is None or run[0].startswith(wanted)]
        return [run for run in named if arguments.rate is None or not run[0].startswith("tune-")]

    if arguments.queue:
        _run(queue, chosen, arguments.corpus, store=not arguments.no_store)
    for name, recipe in chosen():
        state = "done" if queue.result(name) else "open" if recipe else "waits for earlier runs"
        print(f"{name:24} {state}", file=sys.stderr)
    finished = [name for name, _ in chosen() if not name.startswith("tune-") and queue.result(name)]
    if finished:
        print_table([arguments.out / name for name in finished], html=arguments.out / "page.html", corpus=None, threads=None)
        results = [queue.result(name) for name in finished]
        print(json.dumps(rows_of([result for result in results if result is not None])))


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process is the one to do a run: several may work on one queue. Lost with the process, whatever its end."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _run(queue: Queue, chosen: Any, corpus: Path, *, store: bool) -> None:
    queue.out.mkdir(parents=True, exist_ok=True)
    documents = read_documents(corpus)
    tokenizer = AutoTokenizer.from_pretrained(embedded.path())
    held_in = token_streams(domain_texts(documents, held_out=False), tokenizer, queue.out)
    unseen = token_streams(domain_texts(documents, held_out=True), tokenizer, queue.out)
    data = held_out(unseen, window_tokens=queue.base.window_tokens, end=tokenizer.eos_token_id)
    failed: set[str] = set()
    while True:
        left = [(name, recipe) for name, recipe in chosen() if name not in failed and queue.result(name) is None]
        if not left:
            return
        with ExitStack() as held:
            ready = [(name, recipe) for name, recipe in left if recipe is not None]
            mine = next((run for run in ready if held.enter_context(claimed(queue.out / f"{run[0]}.claim"))), None)
            if mine is None:
                if not ready and failed:
                    return  # what is left waits for runs that failed
                time.sleep(5)  # another process is at them
                continue
            name, recipe = mine
            if queue.result(name) is not None:
                continue

            def report(stage: str, share: float, name: str = name) -> None:
                print(f"\r{name}: {share:4.0%} {stage:40}", end="", file=sys.stderr, flush=True)

            run = queue.out / name
            try:
                result = queue.take_over(name, recipe)
                if result is None:
                    train(recipe, held_in, tokenizer, run, warmups=queue.out / "warmups", report=report)
                    result = measure_run(run, data, name=name, report=report)
            except SwaplessError as error:  # the runs after it are worth having all the same
                print(f"\r{name}: failed: {error}", file=sys.stderr)
                failed.add(name)
                continue
        figures = result["figures"]
        print(f"\r{name}: loss {figures['held_out_loss']:.4f}, joined {figures['joined_loss']:.4f}{'':40}", file=sys.stderr)
        if store:
            (RESULTS / "oracle").mkdir(parents=True, exist_ok=True)
            about = {
                "machine": machine(),
                "versions": versions(),
                "commit": commit(),
                "command": "python -m benchmarks.oracle --queue",
            }
            write_json(RESULTS / "oracle" / f"{name}.json", result | about)


if __name__ == "__main__":
    main()
