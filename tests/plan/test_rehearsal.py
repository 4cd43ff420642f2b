"""Set-ups played through: what is asked for is missed, read and computed, in few slots, and nothing stays behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from swapless.cache import POLICIES
from swapless.plan.hollow import HollowRun
from swapless.plan.precision import as_packed
from swapless.plan.products import ColdExperts, linear_products
from swapless.plan.rehearsal import Places, drawn, rehearse
from swapless.plan.traffic import BlocksTraffic, StoreTraffic
from swapless.runtime.budget import plan_budget
from swapless.runtime.door import experts_of
from swapless.runtime.hollow import hollow_model
from swapless.runtime.parts import budget_shape, open_store


@pytest.fixture
def hollow(opened: Any) -> Iterator[HollowRun]:
    budget = plan_budget(total_bytes=None, resident_share=0.5, fixed_parts={}, **budget_shape(opened, 64, []))
    with HollowRun(hollow_model(opened), opened, POLICIES.get("next_use")(), budget) as run:
        yield run


@pytest.fixture
def module(opened: Any) -> Any:
    return next(module for _, module in experts_of(hollow_model(opened)))


class Counting:
    """Reads, counted."""

    def __init__(self, traffic: Any) -> None:
        self._traffic = traffic
        self.read: list[tuple[int, int]] = []
        self.closed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._traffic, name)

    def read_part(self, moe_layer: int, expert: int, *rest: Any) -> int:
        self.read.append((moe_layer, expert))
        return int(self._traffic.read_part(moe_layer, expert, *rest))

    def close(self) -> None:
        self.closed = True
        self._traffic.close()


def traffic_of(form: Any, opened: Any) -> Counting:
    if form is opened:
        return Counting(StoreTraffic(open_store(opened, check=False), opened.layout.moe_layers[0].num_experts))
    return Counting(BlocksTraffic(opened.files, max(layer.block_bytes for layer in form.manifest.moe_layers)))


def test_misses_are_drawn_as_often_as_they_are_expected() -> None:
    misses = np.array([0.5, 0.2, 0.0, 0.3])
    found = drawn(misses, 100, np.random.default_rng(0))
    assert np.bincount(found, minlength=4).tolist() == [50, 20, 0, 30]
    assert found.tolist() != sorted(found.tolist())
    some = drawn(np.array([1 / 3, 1 / 3, 1 / 3]), 7, np.random.default_rng(0))
    assert len(some) == 7 and set(np.bincount(some, minlength=3).tolist()) <= {2, 3}


@pytest.mark.few(1)
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_as_many_experts_are_missed_as_asked(bits: int, hollow: HollowRun, opened: Any) -> None:
    form = opened if bits == 16 else as_packed(opened, bits, 16)
    one, before = np.array([0.0, 1.0, *[0.0] * (hollow.top_k - 1)]), threading.active_count()
    with ColdExperts(form) as cold, hollow.computing(linear_products(opened, hollow.step(2).linears)):
        traffic, own = traffic_of(form, opened), dict(hollow._engine._fetcher.counts)
        found = rehearse(hollow, cold, traffic, 2, one)
        assert hollow._engine._fetcher.counts == own, "the engine goes back to its own fetcher, which has read nothing"
    assert 0 < found.token_s < 10 and found.bytes_per_s > 0
    assert found.misses == pytest.approx(one)
    parts = {(moe_layer, expert) for moe_layer, expert in traffic.read}
    assert {moe_layer for moe_layer, _ in parts} == set(range(hollow.num_moe_layers))
    assert max(expert for _, expert in parts) < hollow.top_k, "every token wants the same few"
    assert hollow._engine.stats().decode_reads == 24 * hollow.num_moe_layers, "one a MoE layer in each of 4 and 20 steps"
    assert traffic.closed and threading.active_count() == before


@pytest.mark.slow
def test_ahead_is_read_what_is_foreseen_and_some_in_vain(hollow: HollowRun, opened: Any) -> None:
    misses = np.zeros(hollow.top_k + 1)
    misses[2] = 1
    read: dict[float, set[int]] = {}
    for recall in (1.0, 0.0):
        traffic = traffic_of(opened, opened)
        with ColdExperts(opened) as cold:
            rehearse(hollow, cold, traffic, 1, misses, ahead=True, recall=recall)
        read[recall] = {expert for moe_layer, expert in traffic.read if moe_layer}
    assert max(read[1.0]) < hollow.top_k
    assert max(read[0.0]) >= hollow.top_k, "wrong ones are read in vain"


def test_nothing_missing_reads_nothing(hollow: HollowRun, opened: Any) -> None:
    all_here, traffic = np.eye(hollow.top_k + 1)[0], traffic_of(opened, opened)
    before = hollow._engine.stats().decode_reads
    with ColdExperts(opened) as cold:
        rehearse(hollow, cold, traffic, 1, all_here)
    assert hollow._engine.stats().decode_reads == before


def test_a_block_lies_elsewhere_whenever_it_was_computed(module: Any, opened: Any) -> None:
    hidden = torch.zeros(1, opened.config.hidden_size, dtype=opened.layout.dtype)
    with ColdExperts(opened) as cold:
        places = Places(cold, cold.pool.slots + 5)
        first = places.bytes_of(3).ctypes.data
        assert places.bytes_of(3).ctypes.data == first, "not before"
        assert len(places.compute(module, 0, [3, 4], [hidden, hidden])) == 2
        assert places.bytes_of(3).ctypes.data != first
        assert len(places.bytes_of(places.slots - 1)) == cold.pool.slot_bytes
