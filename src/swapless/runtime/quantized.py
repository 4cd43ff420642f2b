"""Experts of a packed store in 8 or 4 bits, computed from their blocks as they lie in the slots.

All experts of a call go through the kernels together, few tokens or many. What is peculiar to a family (biases, its own gate,
a norm behind) is done between and after the kernels by the family's own code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from swapless.runtime.door import common_gate
from swapless.runtime.door.packed import BLOCK
from swapless.runtime.kernels import as_inputs, gated_product, product
from swapless.runtime.kernels_row import GatedRowProduct
from swapless.runtime.plain import output_type
from swapless.runtime.pool import SlotPool
from swapless.store.matrix import MatrixLayout
from swapless.store.packed import Manifest, Piece

MOST_TOKENS = 512
"""So many tokens are taken through the experts at once: their values are held beside the slots."""


def scratch_bytes(manifest: Manifest) -> int:
    """What computing holds at once beside slots and the model's own activations, at the most."""
    most = 0
    for layer in manifest.moe_layers:
        into = [piece.shape for piece in layer.pieces if piece.bits < 16 and piece.name != "down_proj"]
        # A token's inputs and outputs in float32 and in the model's type, and rounded; about five copies of what is between.
        most = max(most, 14 * into[0][1] + 20 * sum(rows for rows, _ in into))
    return MOST_TOKENS * most


class _Matrix(NamedTuple):
    layout: MatrixLayout
    offset: int


class _Layer(NamedTuple):
    """The pieces of a block by use: matrices into the inner values, the one out of them, and biases by name."""

    into: tuple[_Matrix, ...]
    out: _Matrix
    plain: dict[str, Piece]


class QuantizedExperts:
    """Computes experts from blocks in slots.

    Parameters
    ----------
    pool : SlotPool
        The slots.
    manifest : Manifest
        What a block of each MoE layer is made of.
    """

    def __init__(self, pool: SlotPool, manifest: Manifest) -> None:
        self._pool = pool
        self._layers: list[_Layer] = []
        self._prepared: dict[tuple[MatrixLayout, MatrixLayout, str], GatedRowProduct] = {}
        for layer in manifest.moe_layers:
            matrices = [
                (piece.name, _Matrix(manifest.layout(piece), piece.offset)) for piece in layer.pieces if piece.bits < 16
            ]
            into = tuple(matrix for name, matrix in matrices if name != "down_proj")
            out = next(matrix for name, matrix in matrices if name == "down_proj")
            self._layers.append(_Layer(into, out, {piece.name: piece for piece in layer.pieces if piece.bits == 16}))

    def __call__(
        self, module: Any, moe_layer: int, blocks: Sequence[int], hidden: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Outputs (N, D) of the experts in ``blocks`` of the pool for their gathered tokens (N, D), before the gate weights."""
        if not blocks:
            return []
        layer = self._layers[moe_layer]
        if len(hidden[0]) == 1 and all(part is hidden[0] for part in hidden):
            activation = _fused(module, layer)
            if activation is not None:
                return self._one_token(module, layer, activation, blocks, hidden[0])
        held = [self._pool.parameters(moe_layer, block)[BLOCK] for block in blocks]
        if sum(map(len, hidden)) <= MOST_TOKENS:
            return _together(module, layer, held, hidden)
        parts: list[list[torch.Tensor]] = [[] for _ in hidden]
        for places, tokens in _portions(hidden):
            for place, result in zip(places, _together(module, layer, [held[i] for i in places], tokens), strict=True):
                parts[place].append(result)
        return [torch.cat(results) if len(results) > 1 else results[0] for results in parts]

    def _one_token(
        self, module: Any, layer: _Layer, activation: str, blocks: Sequence[int], token: torch.Tensor
    ) -> list[torch.Tensor]:
        """What a decode step of one text needs, with all that takes no looking at prepared."""
        (gate, up), out = layer.into, layer.out
        kind = gate.layout, out.layout, activation
        if kind not in self._prepared:
            self._prepared[kind] = GatedRowProduct(*kind)
        first = self._pool.addresses(blocks)
        y = self._prepared[kind](first + gate.offset, first + up.offset, first + out.offset, token).to(output_type(token.dtype))
        norm = module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else None
        return [part if norm is None else norm(part) for part in y.split(1)]


def _fused(module: Any, layer: _Layer) -> str | None:
    """Name of the activation where gate, up, activation and down are one call, else None."""
    return common_gate(module) if len(layer.into) == 2 else None


def _portions(hidden: Sequence[torch.Tensor]) -> Iterator[tuple[list[int], list[torch.Tensor]]]:
    """Cut the experts' tokens into calls of at most ``MOST_TOKENS``: which experts, and which of their tokens."""
    places: list[int] = []
    tokens: list[torch.Tensor] = []
    room = MOST_TOKENS
    for place, whole in enumerate(hidden):
        for part in whole.split(MOST_TOKENS):
            if len(part) > room:
                yield places, tokens
                places, tokens, room = [], [], MOST_TOKENS
            places.append(place)
            tokens.append(part)
            room -= len(part)
    yield places, tokens


def _together(module: Any, layer: _Layer, blocks: Sequence[torch.Tensor], hidden: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    bases = [block.data_ptr() for block in blocks]

    def addresses(matrix: _Matrix) -> list[int]:
        return [base + matrix.offset for base in bases]

    given = as_inputs(hidden, layer.into[0].layout)
    activation = _fused(module, layer)
    out = layer.out
    if activation is not None:
        gate, up = layer.into
        y = gated_product(gate.layout, addresses(gate), addresses(up), out.layout, addresses(out), given, activation)
    else:
        h = torch.cat([product(matrix.layout, addresses(matrix), given) for matrix in layer.into], dim=1)
        inner = [_gated(module, layer, block, part) for block, part in zip(blocks, given.split(h), strict=True)]
        y = product(out.layout, addresses(out), as_inputs(inner, out.layout))
    dtype = output_type(hidden[0].dtype)
    y = y.to(dtype) if not module.has_bias else y
    return [_finished(module, layer, block, part, dtype) for block, part in zip(blocks, given.split(y), strict=True)]


def _gated(module: Any, layer: _Layer, block: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    gated = getattr(module, "has_gate", True)
    if module.has_bias:
        h = h + _plain(layer, block, "gate_up_proj_bias" if gated else "up_proj_bias")
    return (module._apply_gate(h) if gated else module.act_fn(h)).float()


def _finished(module: Any, layer: _Layer, block: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if module.has_bias:
        y = y + _plain(layer, block, "down_proj_bias")
    y = y.to(dtype)
    return module.post_expert_norm(y) if getattr(module, "has_post_expert_norm", False) else y


def _plain(layer: _Layer, block: torch.Tensor, name: str) -> torch.Tensor:
    piece = layer.plain[name]
    view = block[piece.offset : piece.offset + piece.nbytes].view(getattr(torch, piece.dtype))
    return view.view(piece.shape).float()
