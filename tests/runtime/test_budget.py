"""The byte budget: every part listed, nothing beyond the total, the floor named, warnings below the token cycle."""

from __future__ import annotations

import re
from typing import Any

import pytest

from swapless.errors import BudgetError
from swapless.runtime.budget import AHEAD_WORTH, STAGING_SLOTS, plan_budget

MIB = 1 << 20
FIXED = {"base": 300 * MIB, "non_expert": 50 * MIB, "kv_cache": 7 * MIB}


def plan(total: int | None = None, share: float | None = None, **changes: Any) -> Any:
    shape = {
        "slot_bytes": 6 * MIB,
        "expert_bytes": 6 * MIB - 100,
        "num_experts_total": 512,
        "experts_a_token": 64,
        "context_tokens": 4096,
    }
    return plan_budget(total_bytes=total, resident_share=share, fixed_parts=FIXED, **{**shape, **changes})


@pytest.mark.parametrize("total", [500 * MIB, 1000 * MIB + 1, 2000 * MIB, 3000 * MIB, 100_000 * MIB])
def test_parts_are_listed_and_stay_within_the_total(total: int) -> None:
    budget = plan(total)
    assert FIXED.items() <= budget.parts.items()
    assert {"slack", "staging", "slots"} <= budget.parts.keys()
    assert sum(budget.parts.values()) <= total == budget.total_bytes
    unused = total - sum(budget.parts.values())
    assert unused < budget.slot_bytes or budget.slots == 512, "a slot more would have fitted"
    assert budget.parts["slots"] == budget.slots * budget.slot_bytes
    assert budget.parts["staging"] == budget.staging_slots * budget.slot_bytes


@pytest.mark.parametrize(("share", "slots"), [(0.25, 128), (0.1, 51), (1.0, 512), (0.0001, 1), (1 / 3, 170)])
def test_a_share_becomes_slots_and_a_total(share: float, slots: int) -> None:
    budget = plan(share=share)
    assert budget.slots == slots
    assert budget.total_bytes == sum(budget.parts.values())
    assert plan(budget.total_bytes).slots == slots, "the total that a share needs gives the same slots"


def test_everything_resident_needs_no_staging() -> None:
    assert plan(share=1.0).staging_slots == 0
    assert plan(100_000 * MIB).staging_slots == 0
    assert plan(share=0.5).staging_slots == STAGING_SLOTS


def test_slots_for_reading_ahead_are_set_aside_where_the_cache_keeps_most() -> None:
    least = AHEAD_WORTH * 8 + 8
    for share in (least / 512, 0.5):
        budget = plan(share=share, ahead_slots=8, ahead_if_worth=True)
        assert (budget.slots, budget.ahead_slots) == (int(share * 512), 8)
    assert plan(share=(AHEAD_WORTH * 8 - 1) / 512, ahead_slots=8, ahead_if_worth=True).ahead_slots == 0
    assert plan(share=1.0, ahead_slots=8, ahead_if_worth=True).ahead_slots == 0
    total = plan(share=AHEAD_WORTH * 8 / 512, ahead_slots=8).total_bytes
    asked = plan(total, ahead_slots=8, ahead_if_worth=True)
    assert (asked.slots, asked.ahead_slots) == (AHEAD_WORTH * 8, 8)
    less = plan(total - 1, ahead_slots=8, ahead_if_worth=True)
    assert (less.slots, less.ahead_slots) == (AHEAD_WORTH * 8 + 7, 0), "what is not set aside is the cache's"
    assert less == plan(total - 1), "as if it had not been asked for, the floor too"


def test_the_floor_is_where_it_says() -> None:
    floor = plan(2000 * MIB).floor_bytes
    budget = plan(floor)
    assert budget.slots == 1 and budget.floor_bytes == floor
    with pytest.raises(BudgetError, match=rf"too small.*{floor - 1} bytes.*at least .*{floor} bytes.*non_expert.*Raise"):
        plan(floor - 1)


def test_below_the_floor_is_a_memory_error_too() -> None:
    with pytest.raises(MemoryError):
        plan(1)


def test_a_model_of_fewer_experts_than_staging_slots() -> None:
    shape = {"num_experts_total": 2, "experts_a_token": 1}
    floor = plan(2000 * MIB, **shape).floor_bytes
    assert plan(floor, **shape).slots >= 1
    with pytest.raises(BudgetError):
        plan(sum(FIXED.values()), **shape)


def test_a_warning_below_the_token_cycle_and_none_above() -> None:
    below, at = plan(share=63 / 512), plan(share=64 / 512)
    (warning,) = below.warnings
    assert re.search(r"63 slots.*64 experts", warning) and not at.warnings
    assert below.token_cycle_bytes == 64 * (6 * MIB - 100)


def test_as_plain_values() -> None:
    import json

    budget = plan(share=0.25)
    plain = json.loads(json.dumps(budget.to_dict()))
    assert plain["resident_share"] == 0.25 and plain["parts"]["base"] == FIXED["base"]


def test_a_loaded_model_keeps_to_its_budget(olmoe: Any, load: Any) -> None:
    by_share = load(olmoe, resident=0.5).swapless.budget
    assert by_share.slots == 12
    names = {
        "base",
        "non_expert",
        "loading",
        "kv_cache",
        "activations",
        "io_buffers",
        "slack",
        "staging",
        "ahead",
        "slots",
        "policy",
        "products",
        "routing",
        "views",
        "prompt",
    }
    assert by_share.parts.keys() == names
    assert by_share.parts["kv_cache"] >= 2 * 3 * 2 * 16 * 2 * 64, "keys and values of 64 tokens in bf16"


def test_load_below_the_floor_names_it(olmoe: Any, load: Any) -> None:
    with pytest.raises(BudgetError, match="at least") as caught:
        load(olmoe, memory="100MiB")
    floor = int(re.search(r"\((\d+) bytes\): ", str(caught.value))[1])  # type: ignore[index]
    model = load(olmoe, memory=floor + (64 << 20))
    assert model.swapless.budget.total_bytes == floor + (64 << 20)
