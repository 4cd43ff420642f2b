"""``swapless info``: what a path holds, told by its content and not by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from swapless.cli import _options as options
from swapless.cli import early
from swapless.cli.out import Out
from swapless.content import content_of
from swapless.errors import CheckpointMissingError, TraceFormatError, message
from swapless.units import format_size

__all__ = ["info", "info_checkpoint"]


def info(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A checkpoint folder, or a trace in any known form.")],
    as_json: options.Json = False,
) -> None:
    """Say what a checkpoint or a trace is.

    A checkpoint is read from its configuration and file headers alone.
    """
    place = Path(path)
    if _is_trace(place):
        from swapless.cli.info_trace import info_trace

        info_trace(place, as_json)
        return
    try:
        early.checkpoint(path)
    except CheckpointMissingError:
        if place.is_file():
            raise _unknown(place) from None
        raise
    info_checkpoint(path, as_json)


def info_checkpoint(checkpoint: str, as_json: bool) -> None:
    """Print family, shape, sizes and the smallest useful budget of a checkpoint.

    Raises
    ------
    CheckpointError
        It is not a checkpoint, or not one that can be served.
    """
    from dataclasses import asdict

    from swapless.runtime import describe

    out = Out(as_json=as_json)
    found = describe(checkpoint)
    out.document(asdict(found))
    if not as_json:
        out.facts(_facts(found))


def _facts(found: Any) -> list[tuple[str, str]]:
    routed_bytes = found.num_moe_layers * found.num_experts * found.expert_bytes
    return [
        ("family", found.family),
        ("MoE layers", f"{found.num_moe_layers} of {found.num_experts} experts, {found.top_k} a token"),
        ("weights", f"{format_size(found.total_bytes)} in {found.shards} files, {found.dtype}, {found.layout}"),
        ("routed experts", f"{format_size(routed_bytes)}, one expert {format_size(found.expert_bytes)}"),
        ("all else", format_size(found.non_expert_bytes)),
        ("one token needs", f"{format_size(found.token_cycle_bytes)} of experts, read anew where none is resident"),
        ("smallest useful budget", f"{format_size(found.smallest_budget_bytes)} for the whole process"),
        *(("note", note) for note in found.notes),
    ]


def _unknown(place: Path) -> TraceFormatError:
    from swapless.trace.importers import known_forms

    return TraceFormatError(
        message(
            "This is neither a checkpoint nor a trace.",
            where=place,
            got=content_of(place),
            allowed=f"a folder with config.json and safetensors shards, or {known_forms()}",
            step="docs/formats/trace.md shows how to write a trace from arrays.",
        )
    )


def _is_trace(path: Path) -> bool:
    """Whether the content is a trace's, of our own form or of one that an importer knows; or the name claims it."""
    from swapless.errors import TraceError
    from swapless.trace.importers import importer_of, is_parquet

    try:
        claimed = path.is_file() and path.suffix == ".parquet"
        return claimed or is_parquet(path) or importer_of(path) is not None
    except (TraceError, OSError):
        return False
