"""A checkpoint as if it were packed: what the same model would be in other bits, from headers alone, nothing written."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedModel

from swapless.runtime.door import experts_of, packed_layout, skeleton
from swapless.runtime.open import OpenCheckpoint
from swapless.runtime.packing import packed_layers, packed_linears
from swapless.store.packed import Manifest

GROUP = 32
"""Columns that share a scale in 4 bits: what ``swapless pack`` takes by default."""


def as_packed(opened: OpenCheckpoint, bits: int, dense_bits: int, model: PreTrainedModel | None = None) -> OpenCheckpoint:
    """``opened`` with the layout and manifest that ``swapless pack`` with these bits would give it.

    Its slots, non-expert bytes and way of computing are those of the packed store, so whatever is asked of an opened
    checkpoint can be asked of it, except to be read: its blocks are nowhere. ``model`` is any instance of its model, by
    default one made for the purpose.
    """
    meta = model if model is not None else skeleton(opened.cls, opened.config)
    layers = packed_layers(opened, dict(experts_of(meta)), bits, GROUP)
    manifest = Manifest(
        bits=bits,
        group=GROUP,
        dense_bits=dense_bits,
        dtype=str(opened.layout.dtype).removeprefix("torch."),
        source={},
        moe_layers=tuple(
            replace(layer, checksums=("",) * own.num_experts)
            for layer, own in zip(layers, opened.layout.moe_layers, strict=True)
        ),
        files={},
        dense=packed_linears(opened, dense_bits),
    )
    others = {}
    for key, ref in opened.refs.items():
        if key not in opened.layout.expert_keys:
            others[key] = ref._replace(nbytes=manifest.dense_layout(key).nbytes) if key in manifest.dense else ref
    layout = packed_layout(meta, manifest, others, opened.layout.dtype)
    return opened._replace(manifest=manifest, layout=layout, refs=others)


def disk_bytes(opened: OpenCheckpoint) -> int:
    """What the files of a checkpoint or of a packed store take: all tensors and, of the latter, all blocks."""
    blocks = 0
    if opened.manifest is not None:
        blocks = sum(layer.num_experts * layer.block_bytes for layer in opened.manifest.moe_layers)
    return blocks + sum(ref.nbytes for ref in opened.refs.values())
