"""``swapless verify``: ours beside the reference, layer by layer, bit for bit."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from swapless.cli import _options as options
from swapless.cli.out import Out
from swapless.errors import VerifyError, message
from swapless.units import format_size

__all__ = ["verify"]


def verify(checkpoint: options.Checkpoint, memory: options.MemorySize = None, as_json: options.Json = False) -> None:
    """Compare each layer with the reference, or each block of a packed store with its checksum.

    Both compute the same inputs, one layer at a time, inside the budget. Exits with 1 when any value differs by any bit.
    """
    out = Out(as_json=as_json)
    from swapless.store.packed import is_packed

    if is_packed(Path(checkpoint)):
        _verify_packed(Path(checkpoint), out)
        return
    out.note("Reference beside ours, one MoE layer after the other:")
    from swapless import runtime

    layers = []
    for layer in runtime.verify(checkpoint, memory=memory):
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


def _verify_packed(folder: Path, out: Out) -> None:
    from swapless.store.packed import read_manifest
    from swapless.store.verify import verify_packed

    manifest = read_manifest(folder)
    total = sum(layer.num_experts * layer.block_bytes for layer in manifest.moe_layers)
    total += sum(int(entry["bytes"]) for entry in manifest.files.values())
    checked, nbytes, damaged = 0, 0, []
    with out.progress() as progress:
        for what, size, holds in verify_packed(folder):
            checked += 1
            nbytes += size
            if not holds:
                damaged.append(what)
            progress(f"{format_size(nbytes)} of {format_size(total)}", nbytes / total)
    out.document({"checkpoint": str(folder), "checked": checked, "bytes": nbytes, "damaged": damaged})
    if damaged:
        raise VerifyError(
            message(
                f"{len(damaged)} of {checked} blocks and files are not what was packed.",
                where="; ".join(damaged[:4]),
                step="Pack the checkpoint again.",
            )
        )
    out.text(f"All {checked} blocks and files ({format_size(nbytes)}) are as they were packed.")
