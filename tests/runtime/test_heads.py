"""Eager attention some heads at a time: the family's own function, every bit as it was, in a fraction of the memory."""

from __future__ import annotations

import copy
from importlib import import_module
from typing import Any

import pytest
import torch

from swapless.runtime.door import heads as door
from swapless.runtime.door import part_heads, whole_attention
from swapless.runtime.memory import Spike
from tests.families.tiny import decorated_families, tiny_model

EAGER = ("gpt_oss", "flint", "granitemoe_swa", "hy_v4", "deepseek_v4", "inkling", "qwen3_moe")


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Module(torch.nn.Module):
    """What the functions ask an attention module for."""

    def __init__(self, heads: int, groups: int, dtype: torch.dtype, sinks: bool) -> None:
        super().__init__()
        self.num_key_value_groups = heads // groups
        if sinks:
            self.sinks = torch.nn.Parameter(torch.randn(heads).to(dtype), requires_grad=False)
        self.eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", EAGER)
def test_every_bit_is_as_with_all_heads_at_once(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = import_module(f"transformers.models.{family}.modeling_{family}").eager_attention_forward
    torch.manual_seed(0)
    for heads, groups, width, rows, batch in ((8, 2, 64, 65, 1), (6, 2, 16, 193, 1), (4, 4, 32, 33, 2)):
        query = torch.randn(batch, rows, heads, width).to(dtype).transpose(1, 2)
        key, value = (torch.randn(batch, groups, rows, width).to(dtype) for _ in range(2))
        mask = torch.full((rows, rows), torch.finfo(dtype).min, dtype=dtype).triu(1)[None, None]
        module = Module(heads, groups, dtype, "sinks" in eager.__code__.co_names)
        more = {"position_bias": torch.randn(1, heads, rows, rows).to(dtype)} if family == "inkling" else {}
        whole, _ = eager(module, query, key, value, mask, scaling=0.125, **more)
        for at_once in (1, 2, heads - 1):
            monkeypatch.setattr(door, "PART_BYTES", at_once * rows * rows * query.element_size())
            parts, weights = door._in_parts(eager)(module, query, key, value, mask, scaling=0.125, **more)
            assert torch.equal(parts, whole) and parts.is_contiguous() and weights is None, (heads, groups, rows, at_once)


@pytest.mark.parametrize("family", ["gpt_oss", "flint"])
def test_a_model_gives_the_same_logits_and_the_class_stays_as_it_is(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = tiny_model(decorated_families()[family]).to(torch.bfloat16)
    ours = copy.deepcopy(theirs)
    part_heads(ours)
    monkeypatch.setattr(door, "PART_BYTES", 1)
    ids = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(input_ids=ids, output_attentions=True)
        got = ours(input_ids=ids)
        with whole_attention():
            asked = ours(input_ids=ids, output_attentions=True)
    assert torch.equal(got.logits, expected.logits) and torch.equal(asked.logits, expected.logits)
    assert all(torch.equal(a, b) for a, b in zip(asked.attentions, expected.attentions, strict=True))


def test_it_takes_the_memory_of_some_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = import_module("transformers.models.gpt_oss.modeling_gpt_oss").eager_attention_forward
    module, rows = Module(16, 4, torch.bfloat16, True), 700
    query, key = torch.zeros(1, 16, rows, 16, dtype=torch.bfloat16), torch.zeros(1, 4, rows, 16, dtype=torch.bfloat16)
    mask = torch.zeros(1, 1, rows, rows, dtype=torch.bfloat16)
    held = []
    for part_bytes in (1 << 40, 1):
        monkeypatch.setattr(door, "PART_BYTES", part_bytes)
        with Spike() as spike:
            door._in_parts(eager)(module, query, key, key, mask, scaling=0.25)
        held.append(spike.nbytes)
    assert held[0] > 16 * rows * rows * 2 * 3 and held[1] < held[0] / 4


def test_what_cannot_be_told_apart_by_heads_is_left_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = import_module("transformers.models.gpt_oss.modeling_gpt_oss").eager_attention_forward
    monkeypatch.setattr(door, "PART_BYTES", 1)
    module = Module(4, 2, torch.float32, True)
    query, key = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 9, 16)
    _, weights = door._in_parts(eager)(module, query, key, key, None, scaling=0.25, odd=torch.zeros(1, 4, 9, 9))
    assert weights is not None, "computed at once, and so with weights"
