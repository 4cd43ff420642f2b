"""Attention of a decode step with the heads of a group side by side: the same sums, by another way through torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import swapless
from swapless import embedded
from swapless.runtime.door.attention import GROUPED
from swapless.runtime.packing import pack

TOKENS = 37


class Module(torch.nn.Module):
    """What transformers' function asks its attention module for."""

    is_causal = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def step(heads: int, groups: int, width: int, value_width: int, rows: int = 1) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(heads + width)
    shapes = ((2, heads, rows, width), (2, heads // groups, TOKENS, width), (2, heads // groups, TOKENS, value_width))
    return tuple(torch.randn(shape, generator=rng).to(torch.bfloat16) for shape in shapes)


def both(groups: int, given: tuple[torch.Tensor, ...], mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    ours, theirs = ALL_ATTENTION_FUNCTIONS[GROUPED], sdpa_attention_forward
    got, expected = (attend(Module(groups), *given, mask, scaling=0.1)[0] for attend in (ours, theirs))
    assert got.shape == expected.shape and got.is_contiguous() == expected.is_contiguous()
    return got, expected


@pytest.mark.parametrize(("heads", "groups", "value_width"), [(8, 4, 32), (8, 1, 32), (8, 8, 32), (8, 4, 16), (4, 1, 16)])
@pytest.mark.parametrize("masked", [False, True])
def test_a_decode_step_agrees_with_transformers(heads: int, groups: int, value_width: int, masked: bool) -> None:
    mask = torch.ones(2, 1, 1, TOKENS, dtype=torch.bool)
    mask[1, :, :, :20] = False
    got, expected = both(groups, step(heads, groups, 32, value_width), mask if masked else None)
    torch.testing.assert_close(got, expected, rtol=2**-7, atol=1e-3)


def test_a_mask_of_each_head_and_many_rows_are_left_to_transformers() -> None:
    per_head = torch.randn(2, 8, 1, TOKENS, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    assert torch.equal(*both(4, step(8, 4, 32, 32), per_head))
    assert torch.equal(*both(4, step(8, 4, 32, 32, rows=5), None))


@pytest.mark.few(1)
@pytest.mark.parametrize("bits", [16, 8])
def test_only_rounded_stores_take_it_by_themselves(tmp_path: Path, bits: int) -> None:
    pack(embedded.path(), tmp_path / "store", bits=bits)
    model: Any = swapless.load(tmp_path / "store", resident=1.0)
    with model:
        assert (model.config._attn_implementation == GROUPED) == (bits < 16)
    model = swapless.load(tmp_path / "store", resident=1.0, attn_implementation="eager")
    with model:
        assert model.config._attn_implementation == "eager"
