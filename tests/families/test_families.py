"""Every decorated family of the installed transformers, offloaded, against transformers' own eager experts: every bit.

Each family is saved in both layouts, loaded with one or two slots a MoE layer, and must give the same logits in prefill and
decode and the same greedy tokens. Types, sharding, padding, policy and residency change from family to family, so that every
combination is met somewhere and the sweep stays short; bf16 is met by every family, and so is reading ahead, in one layout.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import swapless
from swapless import runtime
from tests.families.tiny import NOT_RUN, Family, decorated_families, tiny_model

FAMILIES = sorted(decorated_families().keys() - NOT_RUN.keys())
LAYOUTS = ("original", "fused")
LEAST_FAMILIES = 40
SLOTS_A_LAYER = (1, 2)
EXPERTS = 8


class Saved(NamedTuple):
    """A tiny model on disk in both layouts, and its place in the list of families."""

    family: Family
    cls: Any
    folders: dict[str, Path]
    index: int


NOT_FORESEEN = {"zaya"}
"""Families whose routers need what the block before leaves to them, so that none can be asked ahead."""

NO_FLOAT16 = {"deepseek_v4"}
"""Families that plain transformers cannot run in float16."""


def _dtype(family: Family, index: int, layout: str) -> Any:
    import torch

    if (index + LAYOUTS.index(layout)) % 2 == 0:
        return torch.bfloat16
    return torch.float16 if index // 2 % 2 and family.name not in NO_FLOAT16 else torch.float32


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    family = decorated_families()[request.param]
    index = FAMILIES.index(family.name)
    root = tmp_path_factory.mktemp(family.name)
    for layout in LAYOUTS:
        model = tiny_model(family).to(_dtype(family, index, layout))
        shard = "150KB" if index % 3 == 0 else "1GB"
        model.save_pretrained(root / layout, save_original_format=layout == "original", max_shard_size=shard)
    yield Saved(family, type(model), {layout: root / layout for layout in LAYOUTS}, index)
    shutil.rmtree(root)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_equals_eager_bit_for_bit(
    saved: Saved, layout: str, swept: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from tests.families.compare import NEW_TOKENS, prompts, reference, run

    turn = saved.index // 2 + LAYOUTS.index(layout)
    slots_a_layer = SLOTS_A_LAYER[turn % 2]
    given = prompts(left_padded=saved.index % 2 == 1)
    expected = run(reference(saved.folders[layout], saved.cls), given)
    assert expected.prefill.isfinite().all() and expected.prefill.float().std() > 1e-3, "the tiny model is degenerate"

    folder, policy = saved.folders[layout], ("lru", "lfu")[saved.index // 4 % 2]
    monkeypatch.setattr("swapless.runtime.budget.AHEAD_WORTH", 0)
    prefetch = ("none", "auto")[turn // 2 % 2]
    with swapless.load(folder, resident=slots_a_layer / EXPERTS, policy=policy, prefetch=prefetch, context=64) as model:
        got = run(model, given)
        stats, trace, slots = model.swapless.stats(), model.swapless.trace(), model.swapless.budget.slots

    assert torch.equal(got.prefill, expected.prefill), f"prefill differs by {(got.prefill - expected.prefill).abs().max()}"
    assert torch.equal(got.steps, expected.steps), f"decode differs by {(got.steps - expected.steps).abs().max()}"
    assert torch.equal(got.tokens, expected.tokens)

    header = trace.header
    assert slots == slots_a_layer * header.num_moe_layers and header.num_experts == EXPERTS
    assert stats.hits < stats.requests, "nothing was ever missing"
    if prefetch == "auto" and header.num_moe_layers > 1:
        assert bool(stats.prefetch_recall) == (saved.family.name not in NOT_FORESEEN)
    if header.top_k > slots_a_layer:
        assert stats.waves > (NEW_TOKENS - 1) * header.num_moe_layers, "no MoE layer was ever served in waves"
    assert len(trace) == 2 * int(given.mask.sum()) + 2 * (NEW_TOKENS - 1)
    swept.setdefault(saved.family.name, []).append(layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_verify_finds_the_same_bits(saved: Saved, layout: str) -> None:
    layers = list(runtime.verify(saved.folders[layout]))
    assert layers and all(layer.experts_compared == EXPERTS for layer in layers)
    assert not [layer for layer in layers if not layer.identical]


def test_every_decorated_family_is_run_or_says_why_not() -> None:
    found = decorated_families()
    assert len(found) - len(NOT_RUN) >= LEAST_FAMILIES
    assert not NOT_RUN.keys() - found.keys(), "a reason for a family that transformers no longer has"
    assert all(len(reason.split()) > 5 for reason in NOT_RUN.values())
    assert sorted([*FAMILIES, *NOT_RUN]) == sorted(found)


@pytest.mark.parametrize("flag", ["is_transposed=True", "has_bias=True", "has_gate=False", "has_post_expert_norm=True"])
def test_every_flag_of_the_decorator_is_met(flag: str) -> None:
    assert [name for name in FAMILIES if flag in decorated_families()[name].flags]


def test_no_flag_is_unheard_of() -> None:
    known = {"is_concatenated", "is_transposed", "has_bias", "has_gate", "has_post_expert_norm"}
    used = {part.split("=")[0].strip() for family in decorated_families().values() for part in family.flags.split(",")}
    assert used - {""} <= known
