"""``swapless locality``: does this model's routing suit offloading, and how large should the cache be?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from swapless.cli import early
from swapless.cli._options import MOST_SEED, Force, Html, Json, Quiet, exclusive, output
from swapless.cli._trace_options import Documents, Domain, ModelId, PhaseName, number_list, opened_trace
from swapless.cli.out import Out

__all__ = ["locality"]

STATE = "emptied for every document, first uses as misses"
OPTIMUM = "optimum: belady, which takes in what misses"


def locality(
    traces: Annotated[list[Path], typer.Argument(metavar="TRACE...", help="Traces to measure; several are compared.")],
    segments: Annotated[str, typer.Option(metavar="LIST", help="Segment lengths in tokens.")] = "4,16,64,256",
    cache_ratios: Annotated[
        str, typer.Option(metavar="LIST", help="Cache sizes as multiples of the K experts that a token needs.")
    ] = "1,2,3",
    html: Html = None,
    force: Force = False,
    json: Json = False,
    documents: Documents = None,
    domain: Domain = None,
    phase: PhaseName = None,
    model_id: ModelId = None,
    replicates: Annotated[int, typer.Option(min=0, help="Bootstrap replicates of the intervals; 0 for none.")] = 400,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of the bootstrap and of the random controls.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Measure how local the routing of a trace is, against chance, and say whether the model suits offloading."""
    exclusive(json=json, html=html)
    lengths = [int(number) for number in number_list(segments, what="--segments", whole=True)]
    ratios = number_list(cache_ratios, what="--cache-ratios", whole=False)
    out = Out(as_json=json, quiet=quiet)
    output("--html", html, force=force, inputs=traces)
    for path in traces:
        early.trace(path)

    from swapless.cli._survey import json_lines, survey

    options: dict[str, Any] = {"documents": documents, "domain": domain, "phase": phase, "model_id": model_id}
    results = []
    with out.progress() as progress:
        for number, path in enumerate(traces):
            name = f"{path.name}: " if len(traces) > 1 else ""
            progress(f"{name}reading", number / len(traces))

            def report(stage: str, share: float, name: str = name, number: int = number) -> None:
                progress(name + stage, (number + share) / len(traces))

            with opened_trace(path, **options) as trace:
                result = survey(trace, segments=lengths, ratios=ratios, replicates=replicates, seed=seed, report=report)
            result["trace"] = {"file": path.name, **result["trace"]}
            results.append(result)
    if json:
        out.json_lines(json_lines(results))
        return
    for result in results:
        _print(out, result)
    if html is not None:
        from swapless.report.html import write_page

        write_page(html, results)
        out.note(f"Wrote {html}.")


def _print(out: Out, result: dict[str, Any]) -> None:
    """One table a model, and the verdict in words."""
    header, settings, rows = result["header"], result["settings"], result["rows"]
    found = {
        (r["measure"], r["variant"], r["level"], r["segment_tokens"], r["capacity_experts"], r["cold"]): r
        for r in rows
        if r["domain"] is None and r["level"] in ("model", "layer_mean")
    }
    layers, experts, top_k = len(header["moe_blocks"]), header["num_experts"], header["top_k"]
    about = result["trace"]
    out.text(f"{header['model_id'] or about['file']}: {layers} MoE layers, {experts} experts, top-{top_k}")
    out.text(f"{about['tokens']:,} tokens in {about['documents']:,} documents ({', '.join(about['phases'])})")
    marks = {ratio: min(experts, max(1, round(ratio * top_k))) for ratio in settings["cache_ratios"]}
    columns = ["segment", "SRP", "chance", "shuffled", "size", *(f"SCH {c}/{experts}" for c in marks.values())]
    table = []
    for m in settings["segments"]:
        srp = found["srp", None, "model", m, None, None]
        shuffled = found["srp_shuffled", None, "model", m, None, None]
        size = found["srp_relative_size", None, "model", m, None, None]
        sch = [found["sch", "lookahead", "layer_mean", m, c, "free"]["value"] for c in marks.values()]
        shown = [_percent(srp["value"]), _percent(srp["chance"]), _percent(shuffled["value"]), f"{size['value']:.2f}"]
        if found["working_set", None, "layer_mean", m, None, None]["value"] is None:  # no document is that long
            shown = ["-", shown[1], "-", "-"]
        table.append([f"{m}", *shown, *map(_percent, sch)])
    out.table(
        columns,
        table,
        title="Segment routing best performance; segment cache best hit rate, the optimum of one set a segment (look-ahead)",
    )
    curves = []
    for variant in ("lru", "lfu", "belady"):
        rates = [found["hit_rate", variant, "layer_mean", None, c, "miss"] for c in marks.values()]
        curves.append([variant, *(f"{_percent(r['value'])} ({_percent(r['chance'])})" for r in rates)])
    out.table(
        ["policy", *(f"{c} of {experts} experts" for c in marks.values())],
        curves,
        title=f"Hit rate of one cache a MoE layer, {STATE}; {OPTIMUM} (random routing)",
    )
    out.text(result["verdict"]["sentence"] + "\n")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
