"""``swapless plan``: what a model would do on this machine, before anything is downloaded or converted."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swapless.cache import DEFAULT_POLICY
from swapless.cli import _options as options
from swapless.cli import early
from swapless.cli.out import Out
from swapless.plan.speed import GATE_RECALL
from swapless.units import format_rate, format_size

if TYPE_CHECKING:
    from swapless.plan.planner import Plan, SetUp

__all__ = ["plan"]

_COLUMNS = (
    *("experts", "all else", "ahead", "policy", "slots a layer", "resident", "hit rate"),
    *("read a token", "tok/s", "at most", "perplexity", "disk"),
)


def plan(
    checkpoint: options.Checkpoint,
    memory: options.MemorySize,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A trace of this model, for its hit rates (swapless record).")
    ] = None,
    recall: Annotated[
        float,
        typer.Option(
            metavar="SHARE", min=0, max=1, help="Of the next layer's experts, foreseen by its router, as a run's figures say."
        ),
    ] = GATE_RECALL,
    context: options.Context = None,
    policy: options.Policy = DEFAULT_POLICY,
    threads: options.Threads = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure this machine anew.")] = False,
    check: options.Check = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Say what a model would do within a budget: speed, hit rate, precision, and what to type.

    Of a model on the hub only configuration and headers are fetched.
    """
    early.finite(recall=recall)
    early.checkpoint(checkpoint)
    if trace is not None:
        early.trace(trace)
    out = Out(as_json=as_json, quiet=quiet)
    threads = early.threads(threads, out)
    with out.progress() as progress, TemporaryDirectory(prefix="swapless-") as folder:
        progress("Starting", 0.0)
        import transformers

        from swapless.plan.crowd import Crowd
        from swapless.plan.hits import CurveHits, TraceHits
        from swapless.plan.hub import local_or_headers
        from swapless.plan.machine import Free, machine
        from swapless.plan.planner import plan as run
        from swapless.runtime.open import open_checkpoint
        from swapless.trace import read_trace

        transformers.utils.logging.set_verbosity_error()
        options.set_threads(threads)
        place, whole = local_or_headers(checkpoint, Path(folder), progress=progress)
        opened = open_checkpoint(place)
        hits: Any = (
            CurveHits(opened, policy) if trace is None else TraceHits(read_trace(trace), opened, policy, name=trace.name)
        )
        crowd = Crowd()
        crowd.look()
        measured = machine(fresh=fresh, progress=progress)
        options_of_all: Any = {"whole": whole, "context": context, "policy": policy, "recall": recall, "check": check}
        found = run(opened, checkpoint, memory, measured, hits, progress=progress, **options_of_all)
        crowd.look()
        busy = measured.busy or crowd.found()
    layers = opened.layout.moe_layers
    about = {
        "checkpoint": checkpoint,
        "family": opened.config.model_type,
        "num_moe_layers": len(layers),
        "num_experts": max(layer.num_experts for layer in layers),
        "top_k": opened.experts_a_token // len(layers),
        "here": whole,
    }
    out.document(about | found.to_dict() | {"busy": busy.to_dict() if busy else None})
    if as_json:
        return
    shape = f"{about['num_moe_layers']} MoE layers of {about['num_experts']} experts, {about['top_k']} a token"
    out.facts(
        [
            ("model", f"{checkpoint} ({about['family']}), {shape}"),
            ("budget", f"{format_size(memory)} for the whole process, context {found.context_tokens} tokens"),
            ("hit rates", f"from {found.hits_from}"),
            ("reads", found.reads_from),
        ]
    )
    if busy is not None:
        kept = " and were not kept" if measured.busy else ""
        out.text(f"{busy} The speeds below are too low{kept}: plan again when it is quiet.")
    out.text("")
    out.table(_COLUMNS, [_row(row, about["num_moe_layers"]) for row in found.set_ups])
    _recommend(found, out)
    free = Free.of(Path.cwd())
    if memory > free.memory_bytes:
        out.note(f"Note: only {format_size(free.memory_bytes)} of memory are free here now, less than the budget.")
    _note_disk(found.best, free.disk_bytes, whole, out)


def _row(row: SetUp, num_moe_layers: int) -> list[str]:
    kind = [f"{row.bits} bits", f"{row.dense_bits} bits", row.prefetch or "-", row.policy]
    last = [_perplexity(row), format_size(row.disk_bytes)]
    if row.budget is None or row.speed is None:
        return [*kind, "-", "-", "-", f"needs {format_size(row.needs_bytes)}", "-", "-", *last]
    return [
        *kind,
        f"{row.budget.slots / num_moe_layers:.1f}",
        f"{row.budget.resident_share:.0%}",
        "-" if row.hit_rate is None else f"{row.hit_rate:.1%}",
        format_size(row.speed.bytes_a_token),
        format_rate(row.speed.tokens_per_s),
        format_rate(row.speed.most_tokens_per_s),
        *last,
    ]


def _perplexity(row: SetUp) -> str:
    if row.perplexity_ratio is None:
        return "not measured"
    return "same" if row.lossless else f"{row.perplexity_ratio - 1:+.1%}"


def _recommend(found: Plan, out: Out) -> None:
    out.text("")
    if found.lossless is None:
        needs = [row for row in found.set_ups if row.lossless]
        if needs:
            out.text(f"Lossless: does not fit; it needs {format_size(needs[0].needs_bytes)}.")
    else:
        _line("Lossless", found.lossless, out)
    if found.best is not found.lossless:
        _line("Fastest", found.best, out)


def _line(name: str, row: SetUp, out: Out) -> None:
    speed = f"{format_rate(row.speed.tokens_per_s)} tok/s" if row.speed else "unknown speed"
    bits = f"experts of {row.bits} bits, all else of {row.dense_bits}"
    cost = {"same": "the same output", "not measured": "its cost in quality not measured"}
    perplexity = _perplexity(row)
    out.text(f"{name}: {speed}, {bits}, {cost.get(perplexity, f'perplexity {perplexity}')}")
    for command in row.commands:
        out.text(f"  {command}")


def _note_disk(row: SetUp, free_bytes: int, whole: bool, out: Out) -> None:
    packs = len(row.commands) > 1
    if packs and row.disk_bytes > free_bytes:
        out.note(
            f"Note: the packed store needs {format_size(row.disk_bytes)} of disk, and {format_size(free_bytes)} are free here."
        )
    elif not whole:
        out.note("Nothing but headers was fetched: the first run downloads the model.")
