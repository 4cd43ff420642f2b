"""An ordinary transformers model: batches, types, streamers, pipelines, and two of them side by side."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runtime.conftest import SHAPE, word_tokenizer


def test_two_models_at_once_do_not_touch_each_other(
    olmoe: Path, qwen3_moe: Path, load: Any, eager: Any, generate: Any, prompt: Any
) -> None:
    first, second = load(olmoe, resident=0.125, policy="lru"), load(qwen3_moe, resident=0.5, policy="lfu")
    third = load(olmoe, resident=0.25, policy="lfu")
    expected = {folder: generate(eager(folder), prompt, 10) for folder in (olmoe, qwen3_moe)}
    for model, folder in ((first, olmoe), (second, qwen3_moe), (third, olmoe), (first, olmoe)):
        assert torch.equal(generate(model, prompt, 10), expected[folder])
    assert first.swapless.stats().steps == 20 and second.swapless.stats().steps == third.swapless.stats().steps == 10
    second.swapless.close()
    assert torch.equal(generate(first, prompt, 10), expected[olmoe])


def test_two_models_in_two_threads(olmoe: Path, qwen3_moe: Path, load: Any, eager: Any, generate: Any, prompt: Any) -> None:
    models = [(load(folder, resident=0.125), generate(eager(folder), prompt, 12)) for folder in (olmoe, qwen3_moe)]
    got: dict[int, Any] = {}

    def work(index: int) -> None:
        torch.set_num_threads(1)
        got[index] = [generate(models[index][0], prompt, 12) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for index, (_, expected) in enumerate(models):
        assert len(got[index]) == 3 and all(torch.equal(tokens, expected) for tokens in got[index])


def test_a_left_padded_batch_equals_single_runs(olmoe: Path, load: Any, generate: Any, prompt: Any) -> None:
    model = load(olmoe, dtype="float32", resident=0.25)
    short = prompt[:, 5:]
    batch = torch.cat([prompt, torch.cat([torch.zeros((1, 5), dtype=torch.long), short], 1)])
    mask = torch.ones_like(batch)
    mask[1, :5] = 0
    together = generate(model, batch, 10, attention_mask=mask)
    assert torch.equal(together[0], generate(model, prompt, 10)[0])
    assert torch.equal(together[1, 5:], generate(model, short, 10)[0])


@pytest.mark.parametrize("dtype", ["float32", torch.float32, "float16"])
def test_another_type_than_the_checkpoints(dtype: Any, qwen3_moe: Path, load: Any, eager: Any, prompt: Any) -> None:
    wanted = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
    model, plain = load(qwen3_moe, dtype=dtype), eager(qwen3_moe, dtype=wanted)
    with torch.no_grad():
        ours, theirs = model(input_ids=prompt).logits, plain(input_ids=prompt).logits
    assert ours.dtype == wanted == model.dtype
    assert torch.equal(ours, theirs)
    expert = model.swapless._pool.parameters(0, 0)["gate_up_proj"]
    assert expert.dtype == wanted


def test_ids_that_stand_for_no_expert_are_passed_over(olmoe: Path, load: Any, eager: Any, prompt: Any) -> None:
    model, plain = load(olmoe, resident=0.125), eager(olmoe)
    ours, theirs = model.model.layers[1].mlp.experts, plain.model.layers[1].mlp.experts
    generator = torch.Generator().manual_seed(0)
    for tokens in (1, 5):
        hidden_TD = torch.randn(tokens, SHAPE.hidden_size, generator=generator).to(torch.bfloat16)
        weights_TK = torch.rand(tokens, 2, generator=generator).to(torch.bfloat16)
        ids_TK = torch.tensor([[3, SHAPE.num_experts], [SHAPE.num_experts] * 2, [0, 7], [7, 3], [SHAPE.num_experts, 3]])[
            :tokens
        ]
        with torch.no_grad():
            assert torch.equal(ours(hidden_TD, ids_TK, weights_TK), theirs(hidden_TD, ids_TK, weights_TK))
            nobody = torch.full((tokens, 2), SHAPE.num_experts)
            assert not ours(hidden_TD, nobody, weights_TK).any()


def test_a_streamer_gets_every_token_as_it_comes(olmoe: Path, load: Any, generate: Any, prompt: Any) -> None:
    from transformers.generation.streamers import BaseStreamer

    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.pieces: list[Any] = []
            self.steps: list[int] = []

        def put(self, value: Any) -> None:
            self.pieces.append(value.reshape(-1))
            self.steps.append(model.swapless.stats().steps)

        def end(self) -> None:
            self.pieces.append(None)

    model, collect = load(olmoe), Collect()
    tokens = generate(model, prompt, 6, streamer=collect)
    assert collect.pieces.pop() is None
    assert torch.equal(torch.cat(collect.pieces), tokens[0])
    assert collect.steps == [0, 1, 2, 3, 4, 5, 6], "a token came before or after its step"


@pytest.fixture
def tokenizer() -> Any:
    return word_tokenizer()


def test_the_pipeline_for_text_generation(olmoe: Path, load: Any, eager: Any, tokenizer: Any) -> None:
    from transformers import pipeline

    said = []
    for model in (load(olmoe), eager(olmoe)):
        generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
        said.append(generator(["w5 w9 w77", "w100"], max_new_tokens=6, do_sample=False, batch_size=2))
    assert said[0] == said[1]
    assert len(said[0][0][0]["generated_text"].split()) > 3


def test_sampling_follows_the_seed(olmoe: Path, load: Any, eager: Any, prompt: Any) -> None:
    outputs = []
    for model in (load(olmoe), eager(olmoe)):
        torch.manual_seed(11)
        outputs.append(model.generate(prompt, max_new_tokens=10, do_sample=True, temperature=1.5, top_p=0.9))
    assert torch.equal(*outputs)


def test_a_longer_prompt_through_the_cache(olmoe: Path, load: Any, eager: Any, prompt: Any) -> None:
    """A second turn: several tokens on top of a filled KV cache are prefill, and agree too."""
    outputs = []
    for model in (load(olmoe, resident=0.125), eager(olmoe)):
        with torch.no_grad():
            past = model(input_ids=prompt, use_cache=True).past_key_values
            outputs.append(model(input_ids=prompt.flip(1), past_key_values=past).logits)
    assert torch.equal(*outputs)


def test_embeddings_instead_of_ids(olmoe: Path, load: Any, eager: Any, prompt: Any) -> None:
    outputs = []
    for model in (load(olmoe), eager(olmoe)):
        with torch.no_grad():
            outputs.append(model(inputs_embeds=model.get_input_embeddings()(prompt)).logits)
    assert torch.equal(*outputs)
