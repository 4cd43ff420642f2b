"""A packed store as the model sees it: the same layout as a checkpoint's, but an expert is one block and has no origin."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from transformers import PreTrainedModel

from swapless.errors import PackMismatchError, UsageError, message
from swapless.runtime.door.layout import ExpertParameter, Layout, MoeLayer
from swapless.runtime.door.match import is_experts, top_k
from swapless.store.headers import TensorRef
from swapless.store.packed import Manifest, PackedLayer

BLOCK = "block"
"""Name of the one parameter, uint8, that a quantised expert is."""


def packed_layout(meta: PreTrainedModel, manifest: Manifest, refs: Mapping[str, TensorRef], dtype: torch.dtype) -> Layout:
    """Match a packed store's experts with the model's.

    Parameters
    ----------
    meta : PreTrainedModel
        From :func:`~swapless.runtime.door.skeleton`.
    manifest : Manifest
        Of the store.
    refs : mapping of str to TensorRef
        Tensors that are no experts.
    dtype : torch.dtype
        The type that the model computes in.

    Raises
    ------
    PackMismatchError
        The store's experts are not those of the model.
    UsageError
        Experts of 16 bits, which are not converted, in another type than ``dtype``.
    """
    modules = {path: int(module.num_experts) for path, module in meta.named_modules() if is_experts(module)}
    packed = {layer.path: layer.num_experts for layer in manifest.moe_layers}
    if modules != packed:
        raise PackMismatchError(
            message(
                "The packed store holds other experts than its configuration asks for.",
                got=f"{len(packed)} MoE layers: {', '.join(packed)}",
                allowed=f"{len(modules)} MoE layers: {', '.join(modules)}",
                step="Pack the checkpoint again.",
            )
        )
    if manifest.bits == 16 and manifest.dtype != str(dtype).removeprefix("torch."):
        raise UsageError(
            message(
                "Experts packed in 16 bits are not converted to another type.",
                got=dtype,
                allowed=manifest.dtype,
                step="Leave dtype out, or load the checkpoint itself.",
            )
        )
    return Layout(
        moe_layers=tuple(_moe_layer(layer, manifest.bits) for layer in manifest.moe_layers),
        top_k=top_k(meta.config),
        dtype=dtype,
        expert_keys=frozenset(),
        linear_keys={key: entry["module"] for key, entry in manifest.dense.items()},
        non_expert_bytes=sum(
            ref.nbytes if key in manifest.dense else int(np.prod(ref.shape)) * dtype.itemsize for key, ref in refs.items()
        ),
        per_expert=True,
    )


def _moe_layer(layer: PackedLayer, bits: int) -> MoeLayer:
    if bits == 16:
        parameters = tuple(
            ExpertParameter(name=piece.name, shape=piece.shape, dtype=getattr(torch, piece.dtype), slot_offset=piece.offset)
            for piece in layer.pieces
        )
    else:
        parameters = (ExpertParameter(name=BLOCK, shape=(layer.block_bytes,), dtype=torch.uint8, slot_offset=0),)
    return MoeLayer(path=layer.path, block=layer.block, num_experts=layer.num_experts, parameters=parameters, origins={})
