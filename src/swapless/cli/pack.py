"""``swapless pack``: a checkpoint with fewer bits a weight, in the form that is read fastest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from swapless.cli import _options as options
from swapless.cli.out import Out
from swapless.units import format_size

__all__ = ["pack"]


def pack(
    checkpoint: options.Checkpoint,
    out_path: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the packed store.")],
    bits: Annotated[int, typer.Option(metavar="16|8|4", help="Bits of an expert's weights; 16 keeps every bit.")] = 8,
    group: Annotated[int, typer.Option(metavar="32|64|128", help="Weights that share a scale in 4 bits.")] = 32,
    dense_bits: Annotated[int, typer.Option(metavar="16|8", help="Bits of all other weights; 16 keeps them as they are.")] = 16,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a packed store of a checkpoint: fewer bits, one aligned block an expert.

    The folder holds all that is needed to run it. Stopped at any moment, the same command goes on where it was.
    """
    out = Out(as_json=as_json, quiet=quiet)
    with out.progress() as progress:
        progress("Starting", 0.0)
        from swapless.runtime.packing import pack as run

        manifest = run(checkpoint, out_path, bits=bits, group=group, dense_bits=dense_bits, progress=progress)
    experts = sum(layer.num_experts * layer.block_bytes for layer in manifest.moe_layers)
    others = sum(int(entry["bytes"]) for entry in manifest.files.values())
    count = sum(layer.num_experts for layer in manifest.moe_layers)
    out.document({"out": str(out_path), "bits": bits, "experts": count, "expert_bytes": experts, "other_bytes": others})
    out.text(f"{out_path}: {count} experts in {format_size(experts)}, everything else in {format_size(others)}")
