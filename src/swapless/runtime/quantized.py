"""Experts of a packed store in 8 or 4 bits, computed from their blocks as they lie in the slots.

Few tokens go through the kernels, all experts of a call together; with many tokens an expert's rows are expanded piece by
piece and multiplied by torch, which costs less from about 16 tokens on. Both use the same weights and float32
sums, so they differ by rounding alone. What is peculiar to a family (biases, its own gate, a norm behind) is done between
the kernels by the family's own code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from swapless.runtime.door import common_gate
from swapless.runtime.door.packed import BLOCK
from swapless.runtime.kernels import EXPAND_BYTES, as_inputs, expanded_product, gated_product, product
from swapless.runtime.pool import SlotPool
from swapless.store.matrix import MatrixLayout
from swapless.store.packed import Manifest, Piece

FEW_TOKENS = 16
"""Up to so many tokens an expert, the kernels are faster than expanding it."""


_MOST_TOKENS = 1024
"""So many tokens are taken through an expert at once: their float32 values are held beside its expanded rows."""


def scratch_bytes(manifest: Manifest) -> int:
    """What computing holds at once beside slots and the model's own activations, at the most."""
    values = EXPAND_BYTES // 4
    for layer in manifest.moe_layers:
        sizes = [sum(piece.shape) for piece in layer.pieces if piece.bits < 16]
        values = max(values, EXPAND_BYTES // 4 + 2 * _MOST_TOKENS * sum(sizes))
    return 4 * values


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
        self._layers = []
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
        held = [self._pool.parameters(moe_layer, block)[BLOCK] for block in blocks]
        layer = self._layers[moe_layer]
        outputs: list[torch.Tensor] = [tokens[:0] for tokens in hidden]
        few = [place for place, tokens in enumerate(hidden) if len(tokens) <= FEW_TOKENS]
        if few:
            results = _together(module, layer, [held[place] for place in few], [hidden[place] for place in few])
            for place, result in zip(few, results, strict=True):
                outputs[place] = result
        for place, tokens in enumerate(hidden):
            if len(tokens) > FEW_TOKENS:
                outputs[place] = _expanded(module, layer, held[place], tokens)
        return outputs


def _together(module: Any, layer: _Layer, blocks: list[torch.Tensor], hidden: list[torch.Tensor]) -> list[torch.Tensor]:
    def addresses(matrix: _Matrix) -> list[int]:
        return [block.data_ptr() + matrix.offset for block in blocks]

    given = as_inputs(hidden, layer.into[0].layout)
    activation = common_gate(module) if len(layer.into) == 2 else None
    if activation is not None:
        gate, up = layer.into
        inner = gated_product(gate.layout, addresses(gate), addresses(up), given, activation, layer.out.layout)
    else:
        h = torch.cat([product(matrix.layout, addresses(matrix), given) for matrix in layer.into], dim=1)
        parts = [_gated(module, layer, block, part) for block, part in zip(blocks, given.split(h), strict=True)]
        inner = as_inputs(parts, layer.out.layout)
    y = product(layer.out.layout, addresses(layer.out), inner)
    return [
        _finished(module, layer, block, part, tokens.dtype)
        for block, part, tokens in zip(blocks, inner.split(y), hidden, strict=True)
    ]


def _expanded(module: Any, layer: _Layer, block: torch.Tensor, hidden_ND: torch.Tensor) -> torch.Tensor:
    if len(hidden_ND) > _MOST_TOKENS:
        return torch.cat([_expanded(module, layer, block, part) for part in hidden_ND.split(_MOST_TOKENS)])
    x = hidden_ND.float()
    h = torch.cat([expanded_product(layout, block.data_ptr() + offset, x) for layout, offset in layer.into], dim=1)
    h = _gated(module, layer, block, h)
    y = expanded_product(layer.out.layout, block.data_ptr() + layer.out.offset, h)
    return _finished(module, layer, block, y, hidden_ND.dtype)


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
