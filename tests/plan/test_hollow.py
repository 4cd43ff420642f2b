"""The model without its weights: the same KV cache as the real one, in no memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swapless.cache import POLICIES
from swapless.plan.hollow import HollowRun
from swapless.plan.products import ColdExperts, expert_time, linear_products
from swapless.runtime.budget import plan_budget
from swapless.runtime.door import IMPLEMENTATION, experts_of
from swapless.runtime.dry import dry_run
from swapless.runtime.hollow import hollow_model
from swapless.runtime.parts import budget_shape
from tests.families.tiny import NOT_RUN, decorated_families, tiny_model

FEW = ("deepseek_v2", "gpt_oss", "jamba", "mixtral", "qwen3_moe", "qwen3_next")
FAMILIES = sorted(decorated_families().keys() - NOT_RUN.keys())


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in FAMILIES])
def test_the_kv_cache_is_as_large_as_the_real_one(name: str) -> None:
    real = tiny_model(decorated_families()[name])
    opened: Any = SimpleNamespace(cls=type(real), config=real.config, layout=SimpleNamespace(dtype=torch.float32))
    hollow = hollow_model(opened)
    real.set_experts_implementation(IMPLEMENTATION)
    assert dry_run(hollow) == dry_run(real)
    held = {parameter.untyped_storage().data_ptr(): parameter.untyped_storage().nbytes() for parameter in hollow.parameters()}
    assert max(held.values()) <= 8, "no parameter has memory of its own"


def test_a_step_runs_the_engine_and_counts_the_linear_layers(opened: Any) -> None:
    budget = plan_budget(total_bytes=None, resident_share=0.5, fixed_parts={}, **budget_shape(opened, 64, []))
    model = hollow_model(opened)
    asked = []

    def compute(module: Any, moe_layer: int, blocks: Any, hidden: Any) -> list[torch.Tensor]:
        asked.append((moe_layer, len(blocks)))
        return [torch.zeros_like(tokens) for tokens in hidden]

    with HollowRun(model, opened, POLICIES.get("next_use")(), budget) as hollow:
        step = hollow.step(steps=3)
        usual, least = hollow.experts_s(compute, steps=2)
        assert 0 < least <= usual < 10
        before = hollow._engine.stats().decode_reads
        assert hollow.missing_s(steps=2) > 0
        assert hollow._engine.stats().decode_reads - before == 5 * opened.experts_a_token, "no expert is found, in any step"
        assert hollow.foresees and hollow.foreseeing_s(steps=2) > 0
        products = linear_products(opened, step.linears)
        with hollow.computing(products):
            usual, least = hollow.steps_s(steps=2)
        assert 0 < least <= usual
        head = next(linear for linear in step.linears if linear.path == "lm_head")
        assert products["lm_head"](torch.ones(1, 1, head.inputs)).shape == (1, 1, head.outputs)
    layers, top_k = len(opened.layout.moe_layers), opened.experts_a_token // len(opened.layout.moe_layers)
    assert asked[:layers] == [(layer, top_k) for layer in range(layers)], "in one call a MoE layer: all are resident"
    assert step.seconds > 0
    assert sum(step.linears.values()) == 6 * 4 + 1, "q, k, v, o of six blocks, and the head"
    assert all(linear.inputs == 192 for linear in step.linears if not linear.path.endswith("o_proj"))


@pytest.mark.few(1)
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_products_are_timed_in_every_precision(bits: int, opened: Any) -> None:
    from swapless.plan.precision import as_packed

    module = next(module for _, module in experts_of(hollow_model(opened)))
    with ColdExperts(opened if bits == 16 else as_packed(opened, bits, 16)) as cold:
        found = expert_time(cold, module)
    assert 0 < found.least_s <= found.together_s and 0 < found.alone_s < 1
