"""``swapless verify``: ours beside the reference, layer by layer, bit for bit."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from swapless.cli import _options as options
from swapless.cli import early
from swapless.cli.out import Out
from swapless.errors import UsageError, VerifyError, message
from swapless.units import format_size

__all__ = ["verify"]


def verify(
    checkpoint: options.Checkpoint,
    memory: options.MemorySize = None,
    source: Annotated[
        str | None,
        typer.Option(metavar="CHECKPOINT", help="Compare a packed store with the checkpoint that it was made from, too."),
    ] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare each layer with the reference, or each block of a packed store with its checksum.

    Both compute the same inputs, one layer at a time, inside the budget. Exits with 1 when any value differs by any bit.
    """
    out = Out(as_json=as_json, quiet=quiet)
    early.checkpoint(checkpoint)
    early.memory(memory, out)
    from swapless.store.packed import is_packed

    if is_packed(Path(checkpoint)):
        _verify_packed(Path(checkpoint), source, out)
        return
    if source is not None:
        raise UsageError(message("Only a packed store has a checkpoint that it was made from.", got=checkpoint))
    out.note("Reference beside ours, one MoE layer after the other:")
    layers = []
    # At a terminal the lines themselves tell how far it is.
    with nullcontext() if sys.stdout.isatty() and not as_json else out.progress() as progress:
        if progress is not None:
            progress("Starting", 0.0)
        from swapless import runtime

        for layer in runtime.verify(checkpoint, memory=memory, progress=progress):
            layers.append(layer)
            verdict = "the same bits" if layer.identical else f"DIFFERENT, by up to {layer.max_abs_difference:g}"
            out.text(f"MoE layer {layer.moe_layer:>3}  block {layer.block:>3}  {layer.experts_compared:>4} experts  {verdict}")
    different = [layer for layer in layers if not layer.identical]
    out.document({"checkpoint": checkpoint, "identical": not different, "layers": [asdict(layer) for layer in layers]})
    if different:
        raise VerifyError(
            message(
                f"{len(different)} of {len(layers)} MoE layers differ from the reference.",
                where=", ".join(f"MoE layer {layer.moe_layer}" for layer in different),
                allowed="the same bits",
                step="Please report it with this output: it is a bug.",
            )
        )
    out.text(f"All {len(layers)} MoE layers give the same bits as the reference.")


def _verify_packed(folder: Path, source: str | None, out: Out) -> None:
    from swapless.store.verify import stored_bytes, verify_packed

    checked, nbytes, damaged = 0, 0, []
    with out.progress() as progress:
        total = stored_bytes(folder)
        for what, size, holds in verify_packed(folder):
            checked += 1
            nbytes += size
            if not holds:
                damaged.append(what)
            progress(f"{format_size(nbytes)} of {format_size(total)}", min(1.0, nbytes / max(1, total)))
        if not damaged:
            progress("Matching with the model", 1.0)
            from swapless.runtime.open import open_checkpoint

            open_checkpoint(folder)  # what a run would refuse is refused here
    document: dict[str, Any] = {"checkpoint": str(folder), "checked": checked, "bytes": nbytes, "damaged": damaged}
    if damaged or source is None:
        out.document(document)
    if damaged:
        raise VerifyError(
            message(
                f"{len(damaged)} of {checked} blocks and files are not what was packed.",
                where="; ".join(damaged[:4]),
                step="Pack the checkpoint again.",
            )
        )
    out.text(f"All {checked} blocks and files ({format_size(nbytes)}) are as they were packed.")
    if source is not None:
        _compare_with_source(folder, source, document, out)


def _compare_with_source(folder: Path, source: str, document: dict[str, Any], out: Out) -> None:
    from swapless.runtime.verification_packed import compare_with_source

    results = []
    with out.progress() as progress:
        for result in compare_with_source(folder, source, progress=progress):
            results.append(result)
    different = [result for result in results if not result.holds]
    out.document(document | {"source": source, "compared": [asdict(result) for result in results]})
    if different:
        raise VerifyError(
            message(
                f"{len(different)} of {len(results)} parts of the store are not what its checkpoint rounds to.",
                where="; ".join(result.what for result in different[:4]),
                step="Pack the checkpoint again; if it stays so, report it with this output: it is a bug.",
            )
        )
    worst = max((result.worst_steps for result in results), default=0.0)
    rounding = f"rounded, by up to {worst:.2f} of a step" if worst else "unchanged"
    out.text(f"All {len(results)} parts of it are the weights of {source}, {rounding}.")
