"""Slots: every parameter at a multiple of 64 bytes, no two overlapping, the memory theirs alone."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from swapless.runtime.door import ExpertParameter, MoeLayer
from swapless.runtime.open import open_checkpoint
from swapless.runtime.pool import SlotPool, slot_bytes
from swapless.store.read import BLOCK_BYTES


def moe_layer(*shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> MoeLayer:
    """A layer of one expert whose parameters have these shapes, laid out as the door does."""
    parameters, offset = [], 0
    for number, shape in enumerate(shapes):
        parameter = ExpertParameter(name=f"p{number}", shape=shape, dtype=dtype, slot_offset=offset)
        parameters.append(parameter)
        offset = -(-(offset + parameter.nbytes) // 64) * 64
    return MoeLayer(path="experts", block=0, num_experts=4, parameters=tuple(parameters), origins={})


ODD = [moe_layer((3, 5), (7,), (1, 1), (11, 3)), moe_layer((13, 2), (64, 64), dtype=torch.float32)]


def test_every_parameter_of_every_slot_is_aligned_and_alone() -> None:
    pool = SlotPool(ODD, 5)
    taken: list[tuple[int, int]] = []
    for slot in range(5):
        for layer in range(2):
            for tensor in pool.parameters(layer, slot).values():
                assert tensor.data_ptr() % 64 == 0 and tensor.is_contiguous()
        views = pool.parameters(1, slot).values()
        taken += [(view.data_ptr(), view.data_ptr() + view.nbytes) for view in views]
    taken.sort()
    assert all(end <= begin for (_, end), (begin, _) in pairwise(taken))


def test_slots_are_whole_blocks_for_direct_reads() -> None:
    pool = SlotPool(ODD, 3)
    assert pool.slot_bytes == slot_bytes(ODD) and pool.slot_bytes % BLOCK_BYTES == 0
    assert all(pool.bytes_of(slot).ctypes.data % BLOCK_BYTES == 0 for slot in range(3))
    assert all(pool.bytes_of(slot).nbytes == pool.slot_bytes for slot in range(3))


def test_bytes_and_parameters_are_the_same_memory() -> None:
    pool = SlotPool(ODD, 2)
    pool.bytes_of(0)[:] = 0
    pool.bytes_of(1)[:] = 0
    values = np.arange(15, dtype=np.float32)
    pool.bytes_of(1)[:30] = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint8).numpy()
    assert pool.parameters(0, 1)["p0"].flatten().tolist() == values.tolist()
    assert not pool.parameters(0, 0)["p0"].any(), "the neighbour was touched"
    assert pool.parameters(0, 1) is pool.parameters(0, 1), "views are made once"


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_parameters_of_real_layouts_hold_the_checkpoint(family: str, request: pytest.FixtureRequest, eager: Any) -> None:
    from swapless.runtime.parts import open_store

    folder: Path = request.getfixturevalue(family)
    opened = open_checkpoint(folder)
    store, pool = open_store(opened, check=False), SlotPool(opened.layout.moe_layers, 1)
    plain, bounce = eager(folder), store.bounce_buffer()
    for layer, expert in ((0, 0), (1, 7), (2, 3)):
        for part in range(store.parts(layer, expert)):
            store.read_part(layer, expert, part, pool.bytes_of(0), bounce)
        experts = plain.model.layers[layer].mlp.experts
        for name, tensor in pool.parameters(layer, 0).items():
            assert torch.equal(tensor, getattr(experts, name)[expert]), (layer, expert, name)
    store.close()


def test_close_gives_the_memory_back() -> None:
    pool = SlotPool(ODD, 1)
    pool.close()
    with pytest.raises(AssertionError, match="closed"):
        pool.bytes_of(0)


def test_views_are_kept_of_the_present_owner_alone() -> None:
    """A view of every layer that ever lay in a block would grow to as many as layers times blocks."""
    pool = SlotPool([moe_layer((3, 5), (7,)) for _ in range(50)], 4)
    for layer in range(50):
        for slot in range(4):
            views = pool.parameters(layer, slot)
            assert pool.parameters(layer, slot) is views
    assert len(pool._views) == 4
