"""Every decorated family of the installed transformers, offloaded, against transformers' own eager experts: every bit.

Each family is saved in both layouts, loaded with a slot or three a MoE layer, and must give the same logits in prefill and
decode and the same greedy tokens. Types, sharding, padding, policy and residency change from family to family, so that every
combination is met somewhere and the sweep stays short.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.families.tiny import NOT_RUN, OVERRIDES, Family, decorated_families, language_model, tiny_model

FAMILIES = sorted(decorated_families().keys() - NOT_RUN.keys())
LAYOUTS = ("original", "fused")
LEAST_FAMILIES = 40
DTYPES = ("bfloat16", "float32", "float16", "float32")
NEVER_PADDED: dict[str, str] = {}


class Saved(NamedTuple):
    """A tiny model on disk in both layouts, and its place in the list of families."""

    family: Family
    cls: Any
    folders: dict[str, Path]
    index: int
    top_k: int


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    import torch

    index = FAMILIES.index(request.param)
    family = decorated_families()[request.param]
    model = tiny_model(family).to(getattr(torch, DTYPES[index % len(DTYPES)]))
    root = tmp_path_factory.mktemp(family.name)
    folders = {layout: root / layout for layout in LAYOUTS}
    for layout, folder in folders.items():
        model.save_pretrained(
            folder, save_original_format=layout == "original", max_shard_size="150KB" if index % 3 == 0 else "1GB"
        )
    yield Saved(family, type(model), folders, index, 1)
    shutil.rmtree(root)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_equals_eager_bit_for_bit(saved: Saved, layout: str, swept: dict[str, list[str]]) -> None:
    import torch

    import swapless
    from tests.families.compare import prompts, reference, run

    folder = saved.folders[layout]
    turn = saved.index + LAYOUTS.index(layout)
    given = prompts(left_padded=saved.index % 2 == 1)
    plain = reference(folder, saved.cls)
    expected = run(plain, given)
    assert expected.prefill.isfinite().all() and expected.prefill.float().std() > 1e-3, "the tiny model is degenerate"
    with swapless.load(folder, resident=(0.125, 0.375)[turn % 2], policy=("lru", "lfu")[turn // 2 % 2], context=64) as model:
        got = run(model, given)
        stats = model.swapless.stats()
        slots = model.swapless.budget.slots
    assert torch.equal(got.prefill, expected.prefill)
    assert torch.equal(got.steps, expected.steps)
    assert torch.equal(got.tokens, expected.tokens)
    print(saved.family.name, layout, stats.requests, stats.hits, stats.waves, slots)
    assert stats.requests > stats.hits, "nothing was ever missing"
    swept.setdefault(saved.family.name, []).append(layout)
