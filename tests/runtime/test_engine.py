"""The engine's counts, waves, prefill beside decode, and the one loop that it shares with the replay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from swapless.cache import DEFAULT_POLICY, POLICIES
from swapless.cache.replay import replay
from swapless.cache.residency import layer_pools
from swapless.cache.serve import ExpertCache
from swapless.notation import Phase
from tests.runtime.conftest import SHAPE
from tests.runtime.slots import assert_no_slot_lies, resident, used_in_decode

NEW_TOKENS = 8
DECODE_STEPS = NEW_TOKENS - 1  # the first new token comes out of prefill
LAYERS, TOP_K = SHAPE.num_moe_layers, SHAPE.top_k


@pytest.fixture(params=["olmoe", "qwen3_moe"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.mark.few(4)
@pytest.mark.parametrize("resident_share", [0.125, 0.25, 0.5])
@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_counts_agree_with_each_other(
    folder: Path, resident_share: float, policy: str, load: Any, generate: Any, prompt: Any
) -> None:
    model = load(folder, resident=resident_share, policy=policy)
    generate(model, prompt, NEW_TOKENS)
    stats, trace = model.swapless.stats(), model.swapless.trace()
    assert stats.requests == DECODE_STEPS * LAYERS * TOP_K
    misses = stats.requests - stats.hits
    assert 0 < misses == stats.decode_reads
    assert stats.decode_bytes_read == stats.decode_reads * SHAPE.expert_bytes
    assert stats.bytes_read == stats.reads * SHAPE.expert_bytes
    prefill = trace.expert_ids[: prompt.shape[1]]
    assert stats.reads - stats.decode_reads == sum(len(np.unique(prefill[:, layer])) for layer in range(LAYERS))
    assert (stats.steps, stats.prefill_tokens, stats.decode_tokens) == (NEW_TOKENS, prompt.shape[1], DECODE_STEPS)
    assert stats.hit_rate == stats.hits / stats.requests
    assert stats.read_s > 0 and stats.prefill_s > 0 and stats.decode_s > 0 and stats.first_token_s == stats.prefill_s
    assert 0 <= stats.decode_stall_s <= stats.stall_s < stats.prefill_s + stats.decode_s
    assert stats.stall_s + stats.compute_s == pytest.approx(stats.prefill_s + stats.decode_s)
    assert stats.peak_memory_bytes > 100 << 20 and stats.peak_memory_source in ("cgroup", "rss_anon")


def test_counts_as_json_and_afresh(olmoe: Path, load: Any, generate: Any, prompt: Any) -> None:
    model = load(olmoe)
    empty = model.swapless.stats()
    assert (empty.requests, empty.hit_rate, empty.decode_tokens_per_s, empty.first_token_s) == (0, None, None, None)
    generate(model, prompt)
    stats = model.swapless.stats()
    plain = json.loads(json.dumps(stats.to_dict()))
    assert plain["hits"] == stats.hits and plain["hit_rate"] == stats.hit_rate
    before = resident(model)
    model.swapless.reset_stats()
    assert model.swapless.stats().requests == 0
    assert resident(model) == before, "the cache stays as it is"


def test_everything_resident_reads_every_expert_once(olmoe: Path, load: Any, generate: Any, prompt: Any) -> None:
    model = load(olmoe, resident=1.0)
    for _ in range(3):
        generate(model, prompt, 16)
    first = model.swapless.stats()
    assert first.reads == len(resident(model)) <= LAYERS * SHAPE.num_experts
    model.swapless.reset_stats()
    generate(model, prompt, 16)
    again = model.swapless.stats()
    assert again.reads == again.bytes_read == 0 and again.hit_rate == 1.0
    assert again.waves == 15 * LAYERS


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("share", "slots"), [(0.01, 1), (2 / 24, 2), (3 / 24, 3), (5 / 24, 5), (6 / 24, 6), (23 / 24, 23), (1.0, 24)]
)
def test_any_number_of_slots_gives_the_same_output(
    olmoe: Path, share: float, slots: int, load: Any, eager: Any, prompt: Any
) -> None:
    model, plain = load(olmoe, resident=share), eager(olmoe)
    assert model.swapless.budget.slots == slots
    batch = torch.cat([prompt, prompt.flip(1)])
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_logits": True}
    ours, theirs = (m.generate(batch, return_dict_in_generate=True, **options) for m in (model, plain))
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(torch.stack(ours.logits), torch.stack(theirs.logits))
    assert_no_slot_lies(model, plain)


def test_a_demand_set_larger_than_its_slots_goes_in_waves(olmoe: Path, load: Any, generate: Any, prompt: Any) -> None:
    model = load(olmoe, resident=LAYERS / 24)  # one slot a MoE layer, two experts a token
    generate(model, prompt, NEW_TOKENS)
    assert model.swapless.stats().waves == 2 * DECODE_STEPS * LAYERS
    model = load(olmoe, resident=TOP_K * LAYERS / 24)
    generate(model, prompt, NEW_TOKENS)
    assert model.swapless.stats().waves == DECODE_STEPS * LAYERS


def test_prefill_takes_nothing_from_decode(olmoe: Path, load: Any, generate: Any, eager: Any, prompt: Any) -> None:
    model = load(olmoe, resident=0.5)
    with torch.no_grad():
        model(input_ids=prompt)
    assert resident(model) and not used_in_decode(model), "prefill fills free slots, and claims none for decode"
    generate(model, prompt, 12)
    before = used_in_decode(model)
    assert len(before) >= LAYERS * TOP_K
    others = torch.arange(3, SHAPE.vocabulary)[:60][None]
    model.swapless.reset_trace()
    with torch.no_grad():
        model(input_ids=others)
    asked = model.swapless.trace().expert_ids
    needed = {(layer, int(expert)) for layer in range(LAYERS) for expert in np.unique(asked[:, layer])}
    assert len(needed - before.keys()) > 0, "the long prompt asked for nothing new"
    assert len(needed) > model.swapless.budget.slots, "the long prompt would have fitted"
    assert before.items() <= resident(model).items()
    assert before == used_in_decode(model)
    assert_no_slot_lies(model, eager(olmoe))


def test_an_unused_slot_of_prefill_is_the_first_to_go(olmoe: Path, load: Any, eager: Any, prompt: Any) -> None:
    model = load(olmoe, resident=0.25)
    with torch.no_grad():
        model(input_ids=prompt)
        first = resident(model)
        model(input_ids=torch.arange(40, 100)[None])
    assert len(first) == model.swapless.budget.slots
    assert_no_slot_lies(model, eager(olmoe))


def engine_hits(model: Any, policy: str) -> tuple[int, int]:
    """Hits and requests that the engine's own trace gives in a fresh cache, served step by step."""
    trace, slots = model.swapless.trace(), model.swapless.budget.slots
    pools = layer_pools(trace.num_moe_layers, trace.num_experts, slots)
    cache = ExpertCache(POLICIES.get(policy)(), trace.num_moe_layers, trace.num_experts, *pools)
    hits = requests = 0
    for step in range(int(trace.step.max()) + 1):
        rows = trace.step == step
        phase = Phase(int(trace.phase[rows][0]))
        for layer in range(trace.num_moe_layers):
            served = cache.request(layer, trace.expert_ids[rows, layer].astype(np.int64), phase)
            if phase is Phase.DECODE:
                hits += int(served.hit.sum())
                requests += len(served.experts)
    return hits, requests


@pytest.mark.few(2)
@pytest.mark.parametrize("policy", ["lru", "lfu"])
@pytest.mark.parametrize("share", [0.125, 0.25, 0.5])
def test_the_trace_replayed_gives_the_engines_own_hits(
    olmoe: Path, policy: str, share: float, load: Any, generate: Any, prompt: Any
) -> None:
    model = load(olmoe, resident=share, policy=policy)
    batch = torch.cat([prompt, prompt.flip(1)])
    for ids in (prompt, batch, prompt.flip(1)):
        generate(model, ids, 12)
    stats = model.swapless.stats()
    assert 0 < stats.hits < stats.requests
    assert engine_hits(model, policy) == (stats.hits, stats.requests)


@pytest.mark.parametrize("policy", ["lru", DEFAULT_POLICY])
@pytest.mark.parametrize("slots_a_layer", [2, 4])
def test_the_replay_of_the_library_gives_the_engines_own_hits(
    olmoe: Path, policy: str, slots_a_layer: int, load: Any, generate: Any, prompt: Any
) -> None:
    model = load(olmoe, resident=slots_a_layer / SHAPE.num_experts, policy=policy)
    for ids in (prompt, prompt.flip(1)):
        generate(model, ids, 20)
    stats = model.swapless.stats()
    replayed = replay(model.swapless.trace(), policy, slots_a_layer)
    assert (replayed.hits, replayed.requests) == (stats.hits, stats.requests)
    assert replayed.prefill_reads == stats.reads - stats.decode_reads
