"""``swapless simulate``: which policy, how large a cache, and how many tokens a second would that be?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swapless.cli import early
from swapless.cli._options import Force, Html, Json, Quiet, checked, exclusive, output
from swapless.cli._trace_options import Documents, chosen_trace
from swapless.cli.out import Out
from swapless.units import format_rate, format_size, parse_size

if TYPE_CHECKING:
    from swapless.cli._foresight import Prefetch

__all__ = ["simulate"]


def simulate(
    context: typer.Context,
    trace: Annotated[Path | None, typer.Argument(metavar="TRACE", help="The trace to replay.")] = None,
    policy: Annotated[str, typer.Option(metavar="LIST", help="Policies, the optima belady and belady_bypass among them.")] = (
        "lru,lfu,next_use,belady"
    ),
    capacity: Annotated[
        str, typer.Option(metavar="LIST", help="Shares of the experts, as 0.25, or counts, as 16 (in all, for one pool).")
    ] = "0.1,0.25,0.5",
    pool: Annotated[
        str, typer.Option(metavar="KIND", help="layer: a quota each; shared; floor: shared, K a layer kept.")
    ] = "layer",
    state: Annotated[str, typer.Option(metavar="WHAT", help="keep the cache over documents, or reset it.")] = "keep",
    request_model: Annotated[str, typer.Option(metavar="MODEL", help="token: all K at once; single: one at a time.")] = "token",
    interleave: Annotated[int, typer.Option(metavar="N", help="Documents that take turns.")] = 1,
    warmup: Annotated[int, typer.Option(metavar="TOKENS", min=0, help="Tokens not counted at the start.")] = 0,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="Time the reads on this device, as 'NVMe Gen4'.")] = None,
    prefetch: Annotated[
        str | None,
        typer.Option(metavar="P", help="Read ahead by a predictor's file, or by 'clairvoyant', the bound."),
    ] = None,
    lead: Annotated[
        str | None, typer.Option(metavar="N", help="MoE layers between prediction and use, or token.", show_default="1")
    ] = None,
    predictor_ms: Annotated[
        float | None, typer.Option(metavar="MS", min=0, help="What predicting takes a token.", show_default="0")
    ] = None,
    expert_bytes: Annotated[
        Any,
        typer.Option(
            "--expert-bytes",
            metavar="SIZE",
            parser=checked(parse_size, "SIZE"),
            help="Size of one expert, as 6MiB, where the trace does not say or another precision is meant.",
        ),
    ] = None,
    documents: Documents = None,
    protocol: Annotated[str | None, typer.Option(metavar="NAME", help="A published protocol instead: moe-beyond.")] = None,
    predictions: Annotated[Path | None, typer.Option(metavar="DIR", help="Its predictions, a CSV file a text.")] = None,
    html: Html = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Replay a trace against cache policies: hits, bytes, distance to the optimum, and time on a device."""
    from swapless.errors import UsageError

    exclusive(json=json, html=html)
    exclusive(protocol=protocol, prefetch=prefetch)
    out = Out(as_json=json, quiet=quiet)
    output("--html", html, force=force, inputs=(trace, prefetch, predictions))
    sizes = _capacities(capacity)
    if protocol is not None or predictions is not None:
        rows = _published(context, protocol, predictions, sizes)
        out.document(rows)
        _print(out, rows, "loads_per_request", _PUBLISHED)
        return
    if trace is None:
        raise UsageError("Name a trace to replay: swapless simulate TRACE.")

    early.finite(predictor_ms=predictor_ms)
    early.trace(trace)
    names = [name.strip() for name in policy.split(",")]
    early.policies(names)
    from swapless.cache.devices import device_profile
    from swapless.cache.sweep import Conditions, sweep

    profile = None if device is None else device_profile(device)
    ahead = _ahead(prefetch, lead, predictor_ms, device)
    conditions: Any = {"pool": pool, "state": state, "request_model": request_model, "interleave": interleave}
    with out.progress() as progress:
        progress("reading", 0.0)
        chosen = chosen_trace(trace, documents=documents)
        shared = Conditions(**conditions, warmup_tokens=warmup, device=profile, expert_bytes=expert_bytes)
        seen = None if ahead is None else ahead.of(chosen, progress, out.note)
        rows = sweep(chosen, names, sizes, shared, foresight=seen, advance=lambda done: progress("replaying", done))
    _say_sizes(out, sizes, rows)
    out.document(rows)
    if ahead is None:
        _print(out, rows, "tokens_per_s", _title(rows[0]))
    else:
        _print_ahead(out, rows)
    if html is not None:
        from swapless.report.simulate import write_page

        write_page(html, rows, name=chosen.header.model_id or trace.name)
        out.note(f"Wrote {html}.")


def _say_sizes(out: Out, sizes: list[float | int], rows: list[dict[str, Any]]) -> None:
    """Say what the shares became: a cache holds whole experts."""
    for size, row in zip(sizes, [row for row in rows if not row.get("prefetch")]):  # those of the first policy, in their order
        if isinstance(size, float):
            early.share(size, row["capacity_fraction"], f"{row['capacity_experts']} experts", out)


def _ahead(prefetch: str | None, lead: str | None, predictor_ms: float | None, device: str | None) -> Prefetch | None:
    from swapless.cli._foresight import Prefetch
    from swapless.errors import UsageError

    if prefetch is None:
        if lead is not None or predictor_ms is not None:
            raise UsageError("--lead and --predictor-ms say how to read ahead: give --prefetch P too.")
        return None
    if device is None:
        raise UsageError("Reading ahead takes time on a device: give --device NAME too, as 'NVMe Gen4'.")
    return Prefetch(prefetch, lead or "1", (predictor_ms or 0.0) / 1e3)


def _capacities(text: str) -> list[float | int]:
    """Shares (with a point or a percent sign) and counts (without)."""
    from swapless.errors import CapacityError, message
    from swapless.units import parse_share

    sizes: list[float | int] = []
    for part in (part.strip() for part in text.split(",")):
        try:
            sizes.append(int(part) if part.lstrip("+-").isdigit() else parse_share(part))
        except ValueError as error:
            raise CapacityError(message("A capacity is a share or a count.", got=repr(part), step=str(error))) from None
    return sizes


_OF_THE_PROTOCOL = ("protocol", "predictions", "capacity", "json", "quiet")
_PUBLISHED = "One LRU cache over all MoE layers, filled at random for every text, one expert at a time; no optimum"


def _published(
    context: typer.Context, protocol: str | None, predictions: Path | None, sizes: list[float | int]
) -> list[dict[str, Any]]:
    from swapless.cache.moe_beyond import moe_beyond, read_predictions
    from swapless.errors import UnknownNameError, UsageError, message

    if protocol != "moe-beyond":
        raise UnknownNameError.of("protocol", str(protocol), ["moe-beyond"])
    if predictions is None:
        raise UsageError("The protocol moe-beyond replays predictions from files: give --predictions DIR.")
    said = [name for name in context.params if str(getattr(context.get_parameter_source(name), "name", "")) == "COMMANDLINE"]
    others = [name for name in said if name not in _OF_THE_PROTOCOL]
    if others:
        named = ", ".join("TRACE" if name == "trace" else f"--{name.replace('_', '-')}" for name in others)
        what = "The protocol moe-beyond has its own rules, and replays predictions alone."
        raise UsageError(message(what, got=named, allowed="--predictions, --capacity, --json, --quiet"))
    texts = read_predictions(predictions)
    return [moe_beyond(texts, size, prefetch=prefetch) for prefetch in (False, True) for size in sizes]


def _title(row: dict[str, Any]) -> str:
    """What the figures of a table hold for: the caches, their state, how experts are asked for, and the optimum."""
    caches = {"layer": "One cache a MoE layer", "shared": "One cache over all MoE layers"}
    kept = "kept from document to document" if row["state"] == "keep" else "emptied for every document"
    asked = "the experts of a token at once" if row["request_model"] == "token" else "one expert at a time"
    optimum = "optimum: belady, which must take in what misses (belady_bypass need not)"
    return f"{caches.get(row['pool'], 'One cache over all MoE layers, K a layer kept')}, {kept}, {asked}; {optimum}"


def _print(out: Out, rows: list[dict[str, Any]], last: str, title: str) -> None:
    """One line a row, without the columns that are known of none."""
    columns = {
        "policy": [row["policy"] for row in rows],
        "experts": [_experts(row) for row in rows],
        "hit rate": ["-" if row["hit_rate"] is None else f"{row['hit_rate']:.2%}" for row in rows],
        "read a token": [_size(row.get("bytes_read_per_token")) for row in rows],
        last.replace("_", " "): ["-" if row.get(last) is None else format_rate(row[last]) for row in rows],
    }
    known = {name: cells for name, cells in columns.items() if any(cell != "-" for cell in cells)}
    out.table(list(known), list(zip(*known.values(), strict=True)), title=title)
    if "bytes_read_per_token" in rows[0] and "read a token" not in known:
        out.note("Note: the size of an expert is not known, so no bytes are shown. Give --expert-bytes SIZE.")


def _experts(row: dict[str, Any]) -> str:
    return f"{row['capacity_experts']} ({100 * row['capacity_fraction']:.3g}%)"


def _size(nbytes: float | None) -> str:
    return "-" if nbytes is None else format_size(nbytes)


def _print_ahead(out: Out, rows: list[dict[str, Any]]) -> None:
    """Two lines a policy and capacity, of the same memory: without and with reading ahead."""
    columns = ["policy", "experts", "reads ahead by", "read a token", "stall ms", "tokens per s", "useful", "late", "wasted"]
    from swapless.report.prefetch import losses

    table = []
    for row in rows:
        counts = [f"{row[f'prefetch_{name}']:,}" if row["prefetch"] else "-" for name in ("useful", "late", "wasted")]
        table.append(
            [
                row["policy"],
                _experts(row),
                f"{row['prefetch']}, lead {row['lead']}" if row["prefetch"] else "-",
                _size(row["bytes_moved_per_token"]),
                f"{max(0.0, row['stall_s_per_token'] * 1e3):.1f}",
                "-" if row["tokens_per_s"] is None else format_rate(row["tokens_per_s"]),
                *counts,
            ]
        )
    out.table(columns, table, title=_title(rows[0]))
    for sentence in losses(rows):
        out.text(sentence)
