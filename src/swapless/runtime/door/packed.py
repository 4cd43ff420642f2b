"""A packed store as the model sees it: the same layout as a checkpoint's, but an expert is one block and has no origin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from swapless.errors import PackMismatchError, UsageError, message
from swapless.runtime.door.layout import ExpertParameter, Layout, MoeLayer, aligned
from swapless.runtime.door.match import block_of, expert_parameters, is_experts, linear_paths, top_k
from swapless.store.headers import TensorRef
from swapless.store.manifest import AGAIN, Manifest, PackedLayer, Piece
from swapless.store.matrix import MatrixLayout

BLOCK = "block"
"""Name of the one parameter, uint8, that a quantised expert is."""


def expert_pieces(parameters: Sequence[ExpertParameter], module: Any, bits: int, group: int) -> tuple[Piece, ...]:
    """What a block of an expert with these ``parameters`` is made of; ``module`` is its experts module, for its flags."""
    pieces: list[Piece] = []
    at = 0
    for parameter in parameters:
        for name, own, dtype, shape, nbytes in _pieces(parameter, module, bits, group):
            pieces.append(Piece(name=name, bits=own, dtype=dtype, shape=shape, nbytes=nbytes, offset=at))
            at = aligned(at + nbytes)
    return tuple(pieces)


def _pieces(
    parameter: ExpertParameter, module: Any, bits: int, group: int
) -> Iterator[tuple[str, int, str, tuple[int, ...], int]]:
    if bits == 16 or len(parameter.shape) != 2:
        yield parameter.name, 16, str(parameter.dtype).removeprefix("torch."), parameter.shape, parameter.nbytes
        return
    rows, columns = reversed(parameter.shape) if module.is_transposed else parameter.shape
    # Where gate and up lie one after the other, each is a matrix of its own, so that a kernel can have both block by block.
    halves = 2 if parameter.name == "gate_up_proj" and getattr(module, "is_concatenated", True) else 1
    for _ in range(halves):
        layout = MatrixLayout(rows=rows // halves, columns=columns, bits=bits, group=group)
        yield parameter.name, bits, f"int{bits}", (layout.rows, layout.columns), layout.nbytes


def check_packed_model(meta: PreTrainedModel, manifest: Manifest, refs: Mapping[str, TensorRef]) -> None:
    """Refuse a store whose blocks are not made of what an expert of this model is made of, or whose weights have other places.

    Parameters
    ----------
    meta : PreTrainedModel
        From :func:`~swapless.runtime.door.skeleton`: with experts.
    manifest : Manifest
        Of the store, whose layers were matched by :func:`packed_layout`.
    refs : mapping of str to TensorRef
        Tensors that are no experts.

    Raises
    ------
    PackMismatchError
        It differs.
    """
    modules: dict[str, Any] = dict(meta.named_modules())
    dtype = getattr(torch, manifest.dtype)
    for layer in manifest.moe_layers:
        module = modules[layer.path]
        parameters = [
            ExpertParameter(name=name, shape=tuple(stacked.shape[1:]), dtype=dtype, slot_offset=0)
            for name, stacked in expert_parameters(module).items()
        ]
        wanted = expert_pieces(parameters, module, manifest.bits, manifest.group)
        if layer.pieces != wanted or layer.block != block_of(layer.path):
            raise PackMismatchError(
                message(
                    "An expert of the packed store is not made of what the model's experts are made of.",
                    where=layer.path,
                    got=_told(layer.block, layer.pieces),
                    allowed=_told(block_of(layer.path), wanted),
                    step=AGAIN,
                )
            )
    whole = {key: refs[key]._replace(shape=tuple(entry["shape"]), dtype="BF16") for key, entry in manifest.dense.items()}
    paths = linear_paths(meta, whole)
    for key, entry in manifest.dense.items():
        if paths.get(key) != entry["module"]:
            raise PackMismatchError(
                message(
                    "A rounded weight of the packed store has another place in the model.",
                    where=key,
                    got=entry["module"],
                    allowed=paths.get(key) or "none: no linear layer of this shape has it",
                    step=AGAIN,
                )
            )


def _told(block: int, pieces: Sequence[Piece]) -> str:
    return f"block {block}: " + ", ".join(f"{piece.name} {piece.dtype} {list(piece.shape)}" for piece in pieces)


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
    if list(modules.items()) != list(packed.items()):
        raise PackMismatchError(
            message(
                "The packed store holds other experts than its configuration asks for.",
                got=f"{len(packed)} MoE layers: {', '.join(packed)}",
                allowed=f"{len(modules)} MoE layers: {', '.join(modules)}",
                step=AGAIN,
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
