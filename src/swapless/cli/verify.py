"""``swapless verify``: ours beside the reference, layer by layer, bit for bit."""

from __future__ import annotations

from dataclasses import asdict

from swapless.cli import _options as options
from swapless.cli.out import Out
from swapless.errors import VerifyError, message

__all__ = ["verify"]


def verify(checkpoint: options.Checkpoint, memory: options.MemorySize = None, as_json: options.Json = False) -> None:
    """Compare each layer with the reference.

    Both compute the same inputs, one layer at a time, inside the budget. Exits with 1 when any value differs by any bit.
    """
    out = Out(as_json=as_json)
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
