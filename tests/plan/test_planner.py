"""Plans against the engine: the same budget, the same slots, the sizes of real packed stores, and refusals that help."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import swapless
from swapless.errors import BudgetError, UsageError
from swapless.plan.commands import commands
from swapless.plan.hits import CurveHits
from swapless.plan.planner import _TENSOR_BYTES, PRECISIONS, plan
from swapless.plan.precision import as_packed, disk_bytes
from swapless.plan.trial import example
from swapless.runtime.open import open_checkpoint
from swapless.runtime.packing import pack
from swapless.runtime.parts import budget_shape, computation
from tests.fresh import numbers_of
from tests.plan.conftest import made_machine

MIB = 1 << 20


def planned(opened: Any, memory: int, **options: Any) -> Any:
    machine = options.pop("machine", made_machine())
    return plan(opened, "owner/model", memory, machine, CurveHits(opened), **{"context": 256} | options)


@pytest.fixture(scope="module")
def roomy(opened: Any) -> Any:
    """A plan with room for everything."""
    return planned(opened, 600 * MIB)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Ghosts of a model whose experts are large enough for bits to matter."""
    return example(tmp_path_factory.mktemp("ghosts"), intermediate_size=8192, num_experts_per_tok=2)


@pytest.fixture(scope="module")
def least(large: Any) -> int:
    """The smallest budget of that one that works, in any precision, by its own refusal."""
    with pytest.raises(BudgetError) as refused:
        planned(large, 100 * MIB, whole=False)
    return int(str(refused.value).split("(")[2].split(" bytes")[0])


@pytest.mark.few(3)
@pytest.mark.parametrize("bits, dense", [(16, 8), (8, 16), (8, 8), (4, 16), (4, 8), (4, 4)])
def test_a_store_that_is_not_there_is_as_large_as_the_real_one(
    bits: int, dense: int, opened: Any, checkpoint: Path, tmp_path: Path
) -> None:
    pack(checkpoint, tmp_path / "store", bits=bits, dense_bits=dense)
    real, foreseen = open_checkpoint(tmp_path / "store"), as_packed(opened, bits, dense)
    assert budget_shape(foreseen, 256, [1]) == budget_shape(real, 256, [1])
    assert foreseen.layout.non_expert_bytes == real.layout.non_expert_bytes
    assert foreseen.layout.linear_keys == real.layout.linear_keys
    assert computation(foreseen).scratch_bytes == computation(real).scratch_bytes
    assert disk_bytes(foreseen) == disk_bytes(real)
    written = sum(file.stat().st_size for file in (tmp_path / "store").glob("*.safetensors"))
    assert disk_bytes(foreseen) <= written <= disk_bytes(foreseen) + 100_000, "headers are all that is not counted"


@pytest.mark.slow
def test_the_lossless_line_has_the_slots_that_load_gives(opened: Any, checkpoint: Path) -> None:
    with swapless.load(checkpoint, resident=0.5, prefetch="auto", context=256) as model:
        own = model.swapless.budget
        depth = model.swapless.probe.depth
    machine = made_machine(base_bytes=own.parts["base"], loading_bytes=own.parts["loading"] - _TENSOR_BYTES * len(opened.refs))
    # Without the prompt's part, which slots lend under a cap and a share has beside them; a total may be more than its parts.
    memory = sum(own.parts.values()) - own.parts["prompt"]
    found = planned(opened, memory, machine=machine, precisions=[(16, 16)]).lossless
    same = ("base", "non_expert", "loading", "kv_cache", "activations", "policy", "slack", "staging", "ahead")
    assert {name: found.budget.parts[name] for name in same} == {name: own.parts[name] for name in same}
    buffers = found.budget.parts["io_buffers"] - own.parts["io_buffers"]  # the number of reader threads is probed each time
    assert buffers % (own.parts["io_buffers"] // depth) == 0
    assert abs(found.budget.slots - own.slots) <= -(-abs(buffers) // own.slot_bytes)
    assert found.commands == (f"swapless run owner/model --memory {memory}B --context 256 --prompt ...",)


@pytest.mark.slow
def test_set_ups_and_recommendations(roomy: Any) -> None:
    assert [(row.bits, row.dense_bits) for row in roomy.set_ups] == list(PRECISIONS)
    assert all(row.hit_rate == 1 and row.speed.bytes_a_token == 0 for row in roomy.set_ups), "nothing to read ahead either"
    assert roomy.lossless is roomy.set_ups[0] and roomy.lossless.perplexity_ratio == 1
    assert all(row.perplexity_ratio is None for row in roomy.set_ups[1:])
    assert roomy.best in roomy.set_ups
    sizes = [row.disk_bytes for row in roomy.set_ups]
    assert sizes == sorted(sizes, reverse=True)
    document = roomy.to_dict()
    assert document["set_ups"][document["lossless"]]["lossless"] is True


def test_the_named_smallest_budget_works_and_one_byte_less_does_not(large: Any, least: int) -> None:
    found = planned(large, least, whole=False)
    assert [row for row in found.set_ups if row.budget] and found.lossless is None
    for row in found.set_ups:
        assert (row.budget is None) == (row.needs_bytes > least)
        assert (row.speed is None) == (row.budget is None) == (row.hit_rate is None)
    with pytest.raises(BudgetError, match="Raise --memory"):
        planned(large, least - 1, whole=False)


@pytest.mark.slow
def test_fewer_bits_need_less(large: Any, least: int) -> None:
    needs = {(row.bits, row.dense_bits): row.needs_bytes for row in planned(large, least, whole=False).set_ups}
    assert needs[16, 16] > needs[4, 16] >= least == min(needs.values())
    found = planned(large, needs[16, 16] - 1, whole=False)
    assert found.lossless is None and found.best.bits < 16
    assert "not here" in found.reads_from
    assert planned(large, needs[16, 16], whole=False).lossless is not None


@pytest.mark.slow
def test_less_memory_is_fewer_slots_and_fewer_hits_and_what_is_missing_is_read_ahead(opened: Any, roomy: Any) -> None:
    tight = roomy.set_ups[0].needs_bytes + 5 * MIB
    found = planned(opened, tight, precisions=[(16, 16), (4, 4)])
    plain, ahead = found.set_ups[:2]
    assert (plain.prefetch, plain.default, ahead.prefetch, ahead.default) == (None, False, "gate", True)
    assert ahead.budget.slots < plain.budget.slots < 96
    assert ahead.hit_rate < plain.hit_rate < 1
    assert found.lossless is ahead, "what run does with no further options"
    assert found.best.default
    assert ahead.commands == (f"swapless run owner/model --memory {tight}B --context 256 --prompt ...",)
    assert plain.commands[0].endswith("--prefetch none --context 256 --prompt ...")
    for row in found.set_ups:
        assert row.budget is None or row.speed.token_s >= row.speed.floor_s > 0
        assert row.budget is None or row.budget.total_bytes == tight


@pytest.mark.slow
def test_what_a_plan_followed_from_can_be_kept(opened: Any, roomy: Any) -> None:
    found = planned(opened, roomy.set_ups[0].needs_bytes + 5 * MIB, precisions=[(16, 16)]).set_ups
    kept = [json.loads(json.dumps(row.expected.to_dict())) for row in found]
    assert [one["prefetch"] for one in kept] == [None, "gate"]
    for row, one in zip(found, kept, strict=True):
        assert one["rehearsal"]["token_s"] > 0 and sum(one["hits"]["misses"]) == pytest.approx(1)
        assert row.speed == row.expected.speed()
        assert row.expected.speed(bytes_per_s=1e3).token_s > row.speed.token_s


@pytest.mark.slow
def test_where_slots_are_few_none_is_set_aside_for_reading_ahead(large: Any, least: int) -> None:
    needs = planned(large, least, whole=False).set_ups[0].needs_bytes
    found = planned(large, needs, precisions=[(16, 16)], whole=False)
    assert found.set_ups[0].budget.ahead_slots == 0
    assert (found.set_ups[0].prefetch, found.set_ups[0].default) == (None, True)
    assert "--prefetch" not in found.lossless.commands[0]


@pytest.mark.slow
def test_where_a_router_cannot_be_asked_nothing_is_promised(opened: Any, roomy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swapless.plan.hollow.HollowRun.foresees", False)
    found = planned(opened, roomy.set_ups[0].needs_bytes + 5 * MIB, precisions=[(16, 16), (4, 4)])
    assert all(row.prefetch is None and row.default for row in found.set_ups)
    assert found.lossless.budget.ahead_slots > 0, "as in a run, which learns it from the first prompt"


@pytest.mark.slow
def test_a_packed_store_has_its_own_precision_alone_and_its_price(checkpoint: Path, tmp_path: Path) -> None:
    from swapless.store.packed import note_perplexity

    pack(checkpoint, tmp_path / "store", bits=4, dense_bits=8)
    note_perplexity(tmp_path / "store", {"original": 10.0, "packed": 10.5, "tokens": 9, "context_tokens": 9, "text_sha256": ""})
    store = open_checkpoint(tmp_path / "store")
    found = plan(store, "store", 600 * MIB, made_machine(), CurveHits(store), context=256)
    (row,) = found.set_ups
    assert (row.bits, row.dense_bits, row.perplexity_ratio) == (4, 8, 1.05)
    assert found.lossless is None and len(row.commands) == 1, "there is nothing left to pack"


def test_a_context_beyond_the_model_is_refused(opened: Any) -> None:
    with pytest.raises(UsageError, match="1 to 1024"):
        planned(opened, 600 * MIB, context=1025)


def test_a_recall_is_a_share(opened: Any) -> None:
    with pytest.raises(UsageError, match="0 to 1"):
        planned(opened, 600 * MIB, recall=98.0)


LONGER = """
import sys
from pathlib import Path

from swapless.runtime.open import open_checkpoint
from tests.plan.test_planner import MIB, planned

opened = open_checkpoint(Path(sys.argv[1]))
for context in (256, 512):
    print(planned(opened, 600 * MIB, context=context, precisions=[(16, 16)]).set_ups[0].needs_bytes)
"""


@pytest.mark.slow
def test_a_longer_context_takes_slots(checkpoint: Path) -> None:
    shorter, longer = numbers_of(LONGER, str(checkpoint))
    assert longer > shorter


def test_commands_can_be_typed() -> None:
    (run,) = commands("my folder/model", 8_000_000_000)
    assert run == "swapless run 'my folder/model' --memory 8GB --prompt ..."
    packing, run = commands("my folder/model", 8 << 30, pack=(8, 16), policy="lru", context=100)
    assert packing == "swapless pack 'my folder/model' --bits 8 --dense-bits 16 --out model-8-16bit"
    assert run == "swapless run model-8-16bit --memory 8GiB --policy lru --context 100 --prompt ..."
    assert "--prefetch none" in commands("model", 8 << 30, prefetch="none")[0]
