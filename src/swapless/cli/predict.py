"""Train a predictor of which experts come next, or measure one."""

from __future__ import annotations

from os.path import realpath
from pathlib import Path
from typing import Annotated, Any

import typer

from swapless.cli import early
from swapless.cli._options import MOST_SEED, Force, Html, Json, OutPath, Quiet, Threads, exclusive, output, set_threads
from swapless.cli._trace_options import Documents, Domain, ModelId, PhaseName, chosen_trace, number_list
from swapless.cli.out import Out
from swapless.errors import UsageError, message
from swapless.units import format_size

__all__ = ["VERBS"]


def train(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="The trace to learn from.")],
    out: OutPath,
    force: Force = False,
    kind: Annotated[str, typer.Option(metavar="NAME", help="transformer, linear, token_prior, eam, ...")] = "transformer",
    documents: Documents = None,
    domain: Domain = None,
    phase: PhaseName = None,
    model_id: ModelId = None,
    epochs: Annotated[int | None, typer.Option(metavar="N", min=1, help="Passes over the documents.")] = None,
    minutes: Annotated[float | None, typer.Option(metavar="M", min=0, help="As many passes as take about so long.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(metavar="FILE", help="Written while training; goes on from it.")] = None,
    option: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any other setting of it.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", min=0, max=MOST_SEED, help="Seed of all randomness.")] = None,
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fit a predictor to a trace and write it to a file."""
    import time

    from swapless.predict import make_predictor
    from swapless.predict.saved import save_predictor

    exclusive(epochs=epochs, minutes=minutes)
    early.finite(minutes=minutes)
    sink = Out(as_json=json, quiet=quiet)
    output("--out", out, force=force, inputs=(trace,))
    output("--checkpoint", checkpoint, force=True, inputs=(trace, out))  # one that exists is gone on from
    if checkpoint is not None and realpath(checkpoint) == realpath(out):
        raise UsageError(message("--checkpoint and --out must be two files.", got=out))
    given = {"epochs": epochs, "minutes": minutes, "checkpoint": checkpoint, "seed": seed}
    options = {name: value for name, value in given.items() if value is not None} | _options(option or [])
    predictor = make_predictor(kind, **options)
    early.trace(trace)
    threads = early.threads(threads, sink)
    begun = time.monotonic()
    with sink.progress() as progress:
        progress("reading", 0.0)
        chosen = chosen_trace(trace, documents=documents, domain=domain, phase=phase, model_id=model_id)
        set_threads(threads)
        predictor.fit(chosen, progress=progress)
    save_predictor(out, predictor)
    about: dict[str, Any] = {
        "predictor": predictor.name,
        "file": str(out),
        "file_bytes": out.stat().st_size,
        "tokens": len(chosen),
        "documents": chosen.num_documents,
        "seconds": time.monotonic() - begun,
    }
    course = getattr(predictor, "course_", None)
    if course is not None:
        held = [dict(zip(("1", "3", "token"), recalls)) for recalls in course.recalls]
        about |= {"epochs": len(held), "held_out_recall": held}
    sink.document(about)
    sink.text(f"{predictor.name}: {about['tokens']:,} tokens in {about['documents']:,} documents, {about['seconds']:.0f} s")
    if course is not None:
        best = max(course.recalls, key=sum)
        shown = ", ".join(f"{value:.1%} at lead {lead}" for lead, value in zip(("1", "3", "token"), best))
        sink.text(f"held-out recall: {shown}")
    sink.text(f"wrote {out} ({format_size(about['file_bytes'])})")


def evaluate(
    predictor: Annotated[Path, typer.Argument(metavar="PREDICTOR", help="A file that predict train wrote.")],
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A trace, or a folder of MoE-Beyond's CSV files.")],
    lead: Annotated[str, typer.Option(metavar="LIST", help="MoE layers ahead, or token for before it starts.")] = "1,3,token",
    widths: Annotated[str | None, typer.Option(metavar="LIST", help="Experts fetched a MoE layer; K is always shown.")] = None,
    skip_positions: Annotated[int, typer.Option(metavar="N", min=0, help="Leave out the first N tokens of a document.")] = 0,
    documents: Documents = None,
    domain: Domain = None,
    phase: PhaseName = None,
    model_id: ModelId = None,
    other_model: Annotated[
        bool, typer.Option("--other-model", help="The trace is of another model of the same shape, as X-Chat and X.")
    ] = False,
    html: Html = None,
    force: Force = False,
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Recall and precision of a predictor that sees only what exists at each lead."""
    from swapless.predict.evaluate import evaluate as measure
    from swapless.predict.predictor import parse_lead
    from swapless.predict.saved import load_predictor

    exclusive(json=json, html=html)
    out = Out(as_json=json, quiet=quiet)
    output("--html", html, force=force, inputs=(predictor, trace))
    early.trace(trace)
    threads = early.threads(threads, out)
    fitted = load_predictor(predictor)
    leads = list(dict.fromkeys(parse_lead(part, fitted.fitted_.num_moe_layers) for part in lead.split(",")))
    wide = None if widths is None else [int(width) for width in number_list(widths, what="--widths", whole=True)]
    with out.progress() as progress:
        progress("reading", 0.0)
        chosen = chosen_trace(trace, documents=documents, domain=domain, phase=phase, model_id=model_id)
        set_threads(threads)
        rows = measure(
            fitted,
            chosen,
            leads,
            widths=wide,
            skip_positions=skip_positions,
            other_model=other_model,
            progress=progress,
            warn=lambda s: out.warn(s) if other_model else out.note(s),
        )
    out.document(rows)
    _print(out, rows, len(chosen), fitted.fitted_.top_k)
    if html is not None:
        from swapless.report.predict import write_page

        write_page(html, rows, name=chosen.header.model_id or trace.name)
        out.note(f"Wrote {html}.")


VERBS = {"train": train, "eval": evaluate}


def _options(given: list[str]) -> dict[str, Any]:
    """Settings of ``--set NAME=VALUE``: numbers and lists as JSON has them, else text."""
    import json

    options: dict[str, Any] = {}
    for text in given:
        name, mark, value = text.partition("=")
        if not mark or not name.isidentifier():
            raise UsageError(message("--set takes NAME=VALUE.", got=repr(text)))
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options


def _print(out: Out, rows: list[dict[str, Any]], tokens: int, top_k: int) -> None:
    """A table a width and lead of the whole model, and what the widths have in common."""
    whole = [row for row in rows if row["moe_layer"] is None]
    if not whole[0]["causal"]:
        out.text("This predictor sees the future: it is for comparison only.")
    out.text(f"{whole[0]['predictor']}: {whole[0]['tokens']:,} of {tokens:,} tokens measured, K = {top_k}")
    table = [[f"{r['lead']}", f"{r['width']}", *(_percent(r[name]) for name in ("recall", "precision"))] for r in whole]
    out.table(["lead", "width", "recall", "precision"], table)
    names = ("average_precision", "exact_set_rate", "calibration_error")
    full = [row for row in whole if "exact_set_rate" in row]
    table = [[f"{r['lead']}", *(_percent(r[name]) for name in names)] for r in full]
    out.table(["lead", "average precision", "exact sets", "calibration error"], table, title="")
    published = [[f"{r['lead']}", *(_percent(value) for value in r["moe_beyond"].values())] for r in full]
    columns = ["lead", "accuracy", "macro-F1", "accuracy of all zeros", "macro-F1 of all zeros"]
    out.table(columns, published, title="As MoE-Beyond counts, without padding")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
