"""What the trace says of caches that are kept, copied, cropped, filled elsewhere and used in turns."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    DynamicCache,
    QuantizedCache,
    StaticCache,
)

from swapless.notation import Phase
from tests.runtime.texts import GREEDY, check, check_counts, continued, generate, prefix_cache, routed_by

TAILS = ([10, 11, 12], [20, 21, 22, 23], [30])


def test_copies_of_one_prefix(model: Any, plain: Any, repetitive: torch.Tensor) -> None:
    cache, texts = prefix_cache(model, repetitive), []
    for tail in TAILS:
        texts += generate(model, continued(repetitive, tail), past_key_values=copy.deepcopy(cache))
    trace = model.swapless.trace()
    check(trace, plain, texts)
    assert trace.token_id[trace.document == 2].tolist() == texts[2], "texts stand in the order in which they were run"
    assert [len(set(trace.step[trace.position == 3].tolist())), trace.header.notes.count("share a beginning")] == [1, 1]


def test_a_cache_that_is_cropped_for_the_next_text(model: Any, plain: Any, repetitive: torch.Tensor) -> None:
    cache, texts = prefix_cache(model, repetitive), []
    for tail in TAILS:
        texts += generate(model, continued(repetitive, tail), past_key_values=cache)
        cache.crop(repetitive.shape[1] - cache.get_seq_length())
    check(model.swapless.trace(), plain, texts)
    assert model.swapless.stats().taken_back_tokens == 0


def test_choices_that_are_scored_on_one_prefix(model: Any, plain: Any, repetitive: torch.Tensor) -> None:
    """A call each, and the cache taken back in between."""
    cache, n = prefix_cache(model, repetitive), repetitive.shape[1]
    for tail in TAILS:
        with torch.no_grad():
            model(torch.tensor([tail]), past_key_values=cache)
        cache.crop(n - cache.get_seq_length())
    check(model.swapless.trace(), plain, [[*repetitive[0].tolist(), *tail] for tail in TAILS])


def test_drafts_that_a_loop_of_ones_own_takes_back(model: Any, plain: Any, repetitive: torch.Tensor) -> None:
    cache = prefix_cache(model, repetitive)
    with torch.no_grad():
        for draft in ([40, 41, 42, 43], [40, 51, 52]):
            model(torch.tensor([draft]), past_key_values=cache)
            cache.crop(-2)
    trace = model.swapless.trace()
    check(trace, plain, [[*repetitive[0].tolist(), 40, 41, 40]])
    assert "taken for a draft: 2" in trace.header.notes


def test_a_cache_whose_tensors_were_cut_by_hand(model: Any, plain: Any, repetitive: torch.Tensor) -> None:
    cache = prefix_cache(model, repetitive)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :6], layer.values[:, :, :6]
    with torch.no_grad():
        model(torch.tensor([[40, 41]]), past_key_values=cache)
    check(model.swapless.trace(), plain, [[*repetitive[0, :6].tolist(), 40, 41]])


def test_turns_of_a_conversation_on_one_cache(model: Any, plain: Any, repetitive: torch.Tensor) -> None:
    cache = DynamicCache(config=model.config)
    ids = repetitive
    for _ in range(3):
        ids = model.generate(ids, past_key_values=cache, **GREEDY)
        ids = continued(ids, [30, 31])
    check(model.swapless.trace(), plain, [ids[0, :-3].tolist()])
    assert model.swapless.trace().phase.tolist().count(Phase.PREFILL) == 13 + 2 * 3


@pytest.mark.parametrize("kind", ["static", "quantized", "repeated"])
def test_other_caches(kind: str, model: Any, plain: Any, repetitive: torch.Tensor) -> None:
    texts: list[list[int]] = []
    if kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=64)
        for prompt in (repetitive, repetitive.flip(1)):
            texts += generate(model, prompt, past_key_values=cache)
            cache.reset()
    elif kind == "quantized":
        cache = QuantizedCache(backend="fp8", config=model.config)
        (text,) = generate(model, repetitive, past_key_values=cache)
        trace = model.swapless.trace()
        assert trace.position.tolist() == list(range(24)) and trace.token_id.tolist() == text
        return
    else:
        cache = prefix_cache(model, repetitive)
        cache.batch_repeat_interleave(3)
        texts = generate(model, torch.cat([continued(repetitive, [tail]) for tail in (50, 60, 70)]), past_key_values=cache)
    check(model.swapless.trace(), plain, texts)


def test_a_cache_that_was_filled_elsewhere(model: Any, plain: Any, repetitive: torch.Tensor) -> None:
    cache = prefix_cache(plain, repetitive)
    (text,) = generate(model, continued(repetitive, [40, 41]), past_key_values=cache)
    trace = model.swapless.trace()
    assert trace.position.tolist() == list(range(13, 26)) and trace.token_id.tolist() == text[13:]
    assert np.array_equal(trace.expert_ids, routed_by(plain, text)[0][13:])
    assert trace.header.notes == "documents that begin after tokens whose rows are not here: 1"


def test_a_trace_that_begins_within_a_text(model: Any, plain: Any, repetitive: torch.Tensor) -> None:
    cache = prefix_cache(model, repetitive)
    model.swapless.reset_trace()
    (text,) = generate(model, continued(repetitive, [40, 41]), past_key_values=cache)
    trace = model.swapless.trace()
    assert trace.position.tolist() == list(range(13, 26)) and "not here: 1" in trace.header.notes
    assert np.array_equal(trace.expert_ids, routed_by(plain, text)[0][13:])


def test_a_cache_through_a_file(model: Any, plain: Any, repetitive: torch.Tensor, tmp_path: Path) -> None:
    torch.save(prefix_cache(model, repetitive), tmp_path / "cache.pt")
    cache = torch.load(tmp_path / "cache.pt", weights_only=False)
    (text,) = generate(model, continued(repetitive, [40]), past_key_values=cache)
    assert model.swapless.trace().num_documents == 2, "the file does not say whose rows it holds"
    assert model.swapless.trace().position.tolist() == [*range(13), *range(13, len(text))]


def test_texts_that_take_turns(model: Any, plain: Any, repetitive: torch.Tensor) -> None:
    """Two generations, token by token, on one model."""
    prompts = [repetitive, repetitive.flip(1)]
    caches, texts = [prefix_cache(model, prompt) for prompt in prompts], [prompt[0].tolist() for prompt in prompts]
    with torch.no_grad():
        for token in range(40, 46):
            for number in range(2):
                model(torch.tensor([[token + number]]), past_key_values=caches[number])
                texts[number].append(token + number)
    check(model.swapless.trace(), plain, texts)
    check_counts(model)


def test_a_text_run_anew_for_every_token(model: Any, plain: Any, repetitive: torch.Tensor) -> None:
    """A loop of one's own that ignores the cache: one text, and the trace says that it took it for one."""
    ids = repetitive
    for _ in range(4):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    trace = model.swapless.trace()
    check(trace, plain, [ids[0, :-1].tolist()])
    assert trace.step[12:].tolist() == [0, 1, 2, 3] and "is taken to go on with it: 3" in trace.header.notes


def test_nothing_goes_on_from_before_a_reset(model: Any, plain: Any, repetitive: torch.Tensor) -> None:
    with torch.no_grad():
        model(repetitive[:, :8], use_cache=False)
        model.swapless.reset_trace()
        model(repetitive, use_cache=False)
    check(model.swapless.trace(), plain, [repetitive[0].tolist()])
    assert model.swapless.trace().header.notes is None


def test_texts_that_only_look_alike(model: Any, plain: Any, repetitive: torch.Tensor) -> None:
    for _ in range(2):
        with torch.no_grad():
            model(repetitive)
    texts = generate(model, repetitive) + generate(model, continued(repetitive, [9]))
    check(model.swapless.trace(), plain, [repetitive[0].tolist()] * 2 + texts)
