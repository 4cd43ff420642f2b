"""What the trace says of batches (padding, ends, beams, packed rows, continuous batching) and of other doors to the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    StoppingCriteria,
)
from transformers.generation.streamers import BaseStreamer

from tests.runtime.texts import GREEDY, Cycle, check, check_counts, generate, prefix_cache


@pytest.fixture
def padded(repetitive: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    batch = torch.cat([repetitive, repetitive.flip(1), repetitive + 20])
    mask = torch.ones_like(batch)
    for sequence, missing in ((1, 5), (2, 12)):
        batch[sequence, :missing], mask[sequence, :missing] = 0, 0
    return batch, mask


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "options",
    [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"prefill_chunk_size": 4}, {"num_beams": 2}],
    ids=lambda options: "".join(options) or "dynamic",
)
def test_a_left_padded_batch(options: dict[str, Any], model: Any, plain: Any, padded: Any) -> None:
    batch, mask = padded
    output = model.generate(batch, attention_mask=mask, **GREEDY | options)
    texts = [sequence[13 - n : -1].tolist() for sequence, n in zip(output, mask.sum(1).tolist(), strict=True)]
    check(model.swapless.trace(), plain, texts)


def test_a_right_padded_call(model: Any, plain: Any, padded: Any) -> None:
    batch, mask = padded[0].flip(1), padded[1].flip(1)
    with torch.no_grad():
        model(batch, attention_mask=mask)
    check(model.swapless.trace(), plain, [ids[: int(n)].tolist() for ids, n in zip(batch, mask.sum(1), strict=True)])


class Ends(LogitsProcessor):
    """Lets sequence i of a batch end after 3 + 2 i tokens."""

    def __init__(self, prompt: int, token: int) -> None:
        self.prompt, self.token = prompt, token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for sequence in range(len(scores)):
            over = input_ids.shape[1] - self.prompt >= 3 + 2 * sequence
            scores[sequence, self.token] = 1e3 if over else -1e3
        return scores


@pytest.mark.parametrize("prompt_has_it", [False, True])
def test_a_text_ends_where_it_says_so(prompt_has_it: bool, model: Any, plain: Any, padded: Any) -> None:
    """What is run after that, because others of the batch go on, is padding."""
    batch, mask = padded
    if prompt_has_it:
        batch[:, -1] = 2
    output = model.generate(batch, attention_mask=mask, max_new_tokens=12, do_sample=False, logits_processor=[Ends(13, 2)])
    assert output.shape[1] == 13 + 3 + 2 * 2 + 1
    starts = (13 - mask.sum(1)).tolist()
    lengths = [4, 6, 7]  # the last one's own end is never fed back
    texts = [sequence[start : 13 + n].tolist() for sequence, start, n in zip(output, starts, lengths, strict=True)]
    check(model.swapless.trace(), plain, texts)
    assert model.swapless.stats().taken_back_tokens == 3 + 1


def test_a_beam_that_ends_early_is_a_text(model: Any, plain: Any, repetitive: torch.Tensor) -> None:
    class EndsOnce(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores[:, 2] = -1e3
            if input_ids.shape[1] == 16:
                scores[0, 2] = scores[0].max() + 0.5
            return scores

    options = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": -4.0, "max_new_tokens": 10, "do_sample": False}
    output = model.generate(repetitive, logits_processor=[EndsOnce()], **options)
    assert (output == 2).any()
    texts = {tuple(ids[: ids.index(2)] if 2 in ids else ids[:-1]) for ids in output.tolist()}
    check(model.swapless.trace(), plain, sorted(texts))


def test_a_stopping_rule_of_ones_own(model: Any, plain: Any, padded: Any) -> None:

    class Stop(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.tensor([input_ids.shape[1] >= 15 + 3 * sequence for sequence in range(len(input_ids))])

    batch, mask = padded
    output = model.generate(batch, attention_mask=mask, **GREEDY, stopping_criteria=[Stop()])
    texts = [
        ids[int(13 - n) : min(15 + 3 * sequence, output.shape[1] - 1)].tolist()
        for sequence, (ids, n) in enumerate(zip(output, mask.sum(1), strict=True))
    ]
    check(model.swapless.trace(), plain, texts)


def test_texts_packed_into_one_row(model: Any, plain: Any) -> None:
    ids = torch.arange(10, 22)[None]
    positions = torch.tensor([[*range(5), *range(4), *range(3)]])
    with torch.no_grad():
        model(ids, position_ids=positions, use_cache=False)
    check(model.swapless.trace(), plain, [ids[0, :5].tolist(), ids[0, 5:9].tolist(), ids[0, 9:].tolist()])


def test_a_mask_that_is_no_chain_is_named(model: Any) -> None:
    ids = torch.arange(10, 16)[None]
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    mask[3:, :3] = False
    with torch.no_grad():
        model(ids, attention_mask=mask[None, None], use_cache=False)
    assert "an attention mask of its own was given" in model.swapless.trace().header.notes


def test_embeddings_instead_of_ids(model: Any, plain: Any, repetitive: torch.Tensor) -> None:
    embeds = model.get_input_embeddings()(repetitive)
    for beams in (1, 2):
        model.swapless.reset_trace()
        output = model.generate(inputs_embeds=embeds, **GREEDY | {"num_beams": beams})
        trace = model.swapless.trace()
        text = repetitive[0].tolist() + output[0, :-1].tolist()
        check(trace, plain, [text])
        assert trace.token_id.tolist() == [-1] * 13 + output[0, :-1].tolist()


def test_guidance_by_a_second_prompt(model: Any, plain: Any, repetitive: torch.Tensor) -> None:
    other = repetitive[:, :4] + 30
    output = model.generate(repetitive, negative_prompt_ids=other, guidance_scale=1.5, **GREEDY)
    new = output[0, 13:-1].tolist()
    check(model.swapless.trace(), plain, [repetitive[0].tolist() + new, other[0].tolist() + new])


def test_a_way_to_generate_of_ones_own(model: Any, plain: Any, repetitive: torch.Tensor) -> None:
    """As contrastive search does: try the best few at once, keep one."""

    def decode(model: Any, input_ids: torch.Tensor, generation_config: Any, **kwargs: Any) -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        logits = model(input_ids, past_key_values=cache).logits
        for turn in range(5):
            best = logits[0, -1].topk(3).indices[:, None]
            cache.batch_repeat_interleave(3)
            tried = model(best, past_key_values=cache).logits
            cache.batch_select_indices(torch.tensor([turn % 3]))
            input_ids, logits = torch.cat([input_ids, best[turn % 3][None]], 1), tried[turn % 3][None]
        return input_ids

    output = model.generate(repetitive, custom_generate=decode, max_new_tokens=5)
    check(model.swapless.trace(), plain, output.tolist())
    check_counts(model)


@pytest.mark.few(1)
@pytest.mark.parametrize("copies", [1, 2])
def test_continuous_batching(copies: int, model: Any, plain: Any, repetitive: torch.Tensor) -> None:
    prompts = [repetitive[0].tolist(), [40, 41, 42], [60]]
    config = GenerationConfig(max_new_tokens=6, do_sample=copies > 1, eos_token_id=127, num_return_sequences=copies)
    pages = ContinuousBatchingConfig(page_size=16, num_blocks=64, max_batch_tokens=64)
    output = model.generate_batch(prompts, generation_config=config, continuous_batching_config=pages)
    assert len(output) == 3 * copies and not any(result.error for result in output.values())
    texts = [[*result.prompt_ids, *result.generated_tokens[:-1]] for result in output.values()]
    check(model.swapless.trace(), plain, texts)


def test_a_streamed_generation_that_is_interrupted(model: Any, plain: Any, repetitive: torch.Tensor) -> None:
    class Stop(BaseStreamer):
        left = 6

        def put(self, value: Any) -> None:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

        def end(self) -> None: ...

    text = generate(model, repetitive)[0]
    model.swapless.reset_trace()
    with pytest.raises(KeyboardInterrupt):
        generate(model, repetitive, streamer=Stop())
    texts = generate(model, repetitive.flip(1))
    check(model.swapless.trace(), plain, [text[: 13 + 4], *texts])


def test_an_interrupted_draft_is_no_text(model: Any, plain: Any, repetitive: torch.Tensor) -> None:
    """Ctrl-C between a call that holds drafts and the choice among them."""

    class Interrupts(Cycle):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if input_ids.shape[1] == 19:
                raise KeyboardInterrupt
            return super().__call__(input_ids, scores)

    with pytest.raises(KeyboardInterrupt):
        generate(model, repetitive, prompt_lookup_num_tokens=4, logits_processor=[Interrupts()])
    trace = model.swapless.trace()
    check(trace, plain, [trace.token_id.tolist()])
    assert len(trace) < 19 and trace.token_id[:13].tolist() == repetitive[0].tolist()


def test_a_call_that_failed_leaves_no_place(model: Any, repetitive: torch.Tensor) -> None:
    """Its cache is half filled: what follows on it says that it does not know what went before."""
    cache = prefix_cache(model, repetitive)

    def fail(*_: Any) -> None:
        raise RuntimeError("on purpose")

    hook = model.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError), torch.no_grad():
        model(torch.arange(40, 60)[None], past_key_values=cache)
    hook.remove()
    cache.layers[2].keys = torch.cat([cache.layers[2].keys, cache.layers[1].keys[:, :, 13:]], 2)
    cache.layers[2].values = torch.cat([cache.layers[2].values, cache.layers[1].values[:, :, 13:]], 2)
    with torch.no_grad():
        model(torch.tensor([[60]]), past_key_values=cache)
    trace = model.swapless.trace()
    assert trace.position.tolist() == [*range(13), 13 + 20] and "not here: 1" in trace.header.notes


def test_forward_by_its_name(model: Any, plain: Any, repetitive: torch.Tensor) -> None:
    with torch.no_grad():
        model.forward(input_ids=repetitive)
        model.forward(repetitive.flip(1), return_dict=False, use_cache=True)
    check(model.swapless.trace(), plain, [repetitive[0].tolist(), repetitive[0].flip(0).tolist()])


def test_the_cache_of_a_tuple(model: Any, plain: Any, repetitive: torch.Tensor) -> None:
    with torch.no_grad():
        _, cache, *_ = model(repetitive, return_dict=False, use_cache=True)
        model(torch.tensor([[40]]), past_key_values=cache)
    check(model.swapless.trace(), plain, [[*repetitive[0].tolist(), 40]])
