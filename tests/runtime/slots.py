"""What the cache claims and what the slots hold, compared with the checkpoint: a slot must never lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def resident(model: Any) -> dict[tuple[int, int], int]:
    """Slot of every expert that the cache says is resident, by (moe_layer, expert)."""
    cache = model.swapless._cache
    slot_of_key = cache.residency.slot_of_key
    return {divmod(int(key), cache.num_experts): int(slot_of_key[key]) for key in np.flatnonzero(slot_of_key >= 0)}


def used_in_decode(model: Any) -> dict[tuple[int, int], int]:
    """As :func:`resident`, those alone that decode has asked for."""
    used = model.swapless._cache.residency.used_in_decode
    return {key: slot for key, slot in resident(model).items() if used[slot]}


def assert_no_slot_lies(model: Any, plain: Any) -> None:
    """Every resident expert's slot holds its weights bit for bit, and the engine's parts agree with each other."""
    for (moe_layer, expert), slot in resident(model).items():
        experts = plain.model.layers[moe_layer].mlp.experts
        block = model.swapless._fetcher.block(slot)
        for name, tensor in model.swapless._pool.parameters(moe_layer, block).items():
            assert torch.equal(tensor, getattr(experts, name)[expert]), f"MoE layer {moe_layer}, expert {expert}, {name}"
    model.swapless.check_integrity(weights=False)
