"""What the trace says after every way to generate: a document a text, each position once, the experts of plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from swapless.notation import Phase
from tests.runtime.conftest import SHAPE
from tests.runtime.texts import GREEDY, Cycle, check, check_counts, generate

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3},
    "prompt look-up": {"prompt_lookup_num_tokens": 4},
    "prompt look-up, all wrong": {"prompt_lookup_num_tokens": 3, "repetition_penalty": 2.0},
    "prompt look-up, sampled": {"prompt_lookup_num_tokens": 4, "do_sample": True},
    "no cache": {"use_cache": False},
    "no cache, sampled": {"use_cache": False, "do_sample": True},
    "static cache": {"cache_implementation": "static"},
    "prefill in chunks": {"prefill_chunk_size": 4},
    "prefill in chunks of one": {"prefill_chunk_size": 1},
    "constrained": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "bad_words_ids": [[5]]},
    "beams": {"num_beams": 3},
    "beams, several returned": {"num_beams": 4, "num_return_sequences": 3},
    "beams, sampled": {"num_beams": 3, "do_sample": True},
    "beams without a cache": {"num_beams": 3, "use_cache": False},
    "beams, static cache": {"num_beams": 2, "cache_implementation": "static"},
    "several returned": {"do_sample": True, "num_return_sequences": 3},
    "router logits": {"output_router_logits": True, "return_dict_in_generate": True, "output_scores": True},
}


@pytest.mark.few(8)
@pytest.mark.parametrize("mode", MODES)
def test_each_mode(mode: str, model: Any, plain: Any, repetitive: torch.Tensor) -> None:
    torch.manual_seed(1)
    output = model.generate(repetitive, **GREEDY | MODES[mode])
    sequences = getattr(output, "sequences", output)
    trace = model.swapless.trace()
    texts = {tuple(sequence[:-1].tolist()) for sequence in sequences}
    check(trace, plain, sorted(texts))
    if "beams" not in mode:
        check_counts(model)
    if "chunk" in mode:
        n = repetitive.shape[1]
        calls = [trace.step[:n].tolist().count(step) for step in np.unique(trace.step[:n])]
        assert calls == [MODES[mode]["prefill_chunk_size"]] * (len(calls) - 1) + calls[-1:]
    if mode in ("greedy", "sampling", "static cache"):
        assert trace.phase.tolist() == [Phase.PREFILL] * 13 + [Phase.DECODE] * 11 and trace.header.notes is None


def test_drafts_that_are_accepted_in_part(model: Any, plain: Any, repetitive: torch.Tensor) -> None:
    texts = generate(model, repetitive, prompt_lookup_num_tokens=4, logits_processor=[Cycle()], max_new_tokens=20)
    trace, stats = model.swapless.trace(), model.swapless.stats()
    check(trace, plain, texts)
    check_counts(model)
    assert stats.steps < 15 and stats.taken_back_tokens > 3
    assert f"padding): {stats.taken_back_tokens}" in trace.header.notes
    steps = trace.step[trace.phase == Phase.DECODE]
    assert len(np.unique(steps)) < len(steps), "several accepted tokens share a step"
    assert trace.step.tolist() == sorted(trace.step.tolist())
    assert stats.decode_tokens_per_s == pytest.approx(stats.decode_tokens / stats.decode_s)


def test_requests_of_a_step_that_holds_drafts_are_counted_once_each(model: Any, repetitive: torch.Tensor) -> None:
    """One request a distinct (step, MoE layer, expert), whatever becomes of the drafts."""
    chosen: dict[int, list[set[int]]] = {}
    inner = model.swapless._cache.request

    def request(moe_layer: int, ids: np.ndarray, phase: Phase) -> Any:
        if phase is Phase.DECODE:
            chosen.setdefault(moe_layer, []).append(set(ids.reshape(-1).tolist()))
        return inner(moe_layer, ids, phase)

    model.swapless._cache.request = request
    generate(model, repetitive, prompt_lookup_num_tokens=4, logits_processor=[Cycle()])
    assert model.swapless.stats().requests == sum(len(ids) for layer in chosen.values() for ids in layer)
    assert max(len(ids) for layer in chosen.values() for ids in layer) > SHAPE.top_k


@pytest.mark.parametrize("sampled", [False, True])
def test_an_assistant_that_drafts_for_an_offloaded_model(
    sampled: bool, model: Any, plain: Any, eager: Any, olmoe: Path, repetitive: torch.Tensor
) -> None:
    small = eager(olmoe, dtype=torch.float32)
    small.model.layers = small.model.layers[:1]
    small.config.num_hidden_layers = 1
    torch.manual_seed(4)
    options = {"logits_processor": [Cycle()], "max_new_tokens": 20, "do_sample": sampled}
    texts = generate(model, repetitive, assistant_model=small, **options)
    check(model.swapless.trace(), plain, texts)
    check_counts(model)
    assert model.swapless.stats().steps < 20


def test_an_offloaded_assistant(model: Any, plain: Any, eager: Any, olmoe: Path, repetitive: torch.Tensor) -> None:
    """Its text is what was accepted of its drafts, as far as it was told."""
    target = eager(olmoe, dtype=torch.float32)
    options = {"logits_processor": [Cycle()], "max_new_tokens": 20}
    model.generation_config.num_assistant_tokens = 5
    (text,) = generate(target, repetitive, assistant_model=model, **options)
    trace = model.swapless.trace()
    check(trace, plain, [text[: len(trace)]])
    assert 18 < len(trace) <= len(text) and "nobody said whether they were accepted" in trace.header.notes
    check_counts(model)
    _, cut = generate(target, repetitive, assistant_model=model, **options), model.swapless.trace()
    assert cut.num_documents == 2


def test_a_wrong_assistant(model: Any, plain: Any, eager: Any, olmoe: Path, repetitive: torch.Tensor, load: Any) -> None:
    """Both offloaded, and the assistant nearly always wrong."""
    target = load(olmoe, dtype="float32", resident=0.5, context=128)
    for parameter in model.lm_head.parameters():
        parameter.data.neg_()
    (text,) = generate(target, repetitive, assistant_model=model)
    check(target.swapless.trace(), plain, [text])
    trace = model.swapless.trace()
    check(trace, plain, [text[: len(trace)]])
    assert len(trace) >= len(text) - 1, "the target tells it what became of its last drafts"
    assert target.swapless.stats().taken_back_tokens > 5 and model.swapless.stats().taken_back_tokens > 5


def test_a_model_that_drafts_for_itself_with_its_first_layers(model: Any, plain: Any, repetitive: torch.Tensor) -> None:
    texts = generate(model, repetitive, assistant_early_exit=1, logits_processor=[Cycle()])
    check(model.swapless.trace(), plain, texts)
    check_counts(model)


def test_the_first_token_counts_all_pieces_of_the_prompt(model: Any, repetitive: torch.Tensor) -> None:
    generate(model, repetitive, prefill_chunk_size=2)
    stats = model.swapless.stats()
    assert stats.first_token_s == pytest.approx(stats.prefill_s)
