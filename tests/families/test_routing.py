"""Every family, offloaded: the trace of each way to generate holds the texts, and the experts that plain transformers chooses.

The reference is a plain model that runs over each final text in one call; what its experts modules are called with is seen
through hooks. And what ``record`` writes can be simulated.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import swapless
from swapless.trace import Trace, read_trace
from tests.families.test_families import FAMILIES
from tests.families.tiny import decorated_families, tiny_model

OTHERWISE = 0.02
"""Of choices, the share that may differ, where two experts are nearly alike: one row is rounded otherwise than many."""

NOT_REORDERED = {"minimax"}
"""Families whose running states stay where they are when beams change places: what they choose then is no text's choice."""

RECORDED = FAMILIES[::6]
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, Any]]:
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_model(decorated_families()[request.param])
    model.save_pretrained(folder)
    yield request.param, folder, type(model)
    shutil.rmtree(folder)


def chosen(plain: Any, tokens: list[int]) -> list[list[set[int]]]:
    """The experts (T, L) that a plain model's experts modules are called with over a text."""
    import torch

    from swapless.runtime.door import experts_of

    seen: dict[int, Any] = {}

    def hook(moe_layer: int) -> Any:
        def note(module: Any, args: Any, kwargs: Any) -> None:
            seen[moe_layer] = (args[1] if len(args) > 1 else kwargs["top_k_index"]).tolist()

        return note

    modules = [module for _, module in experts_of(plain)]
    handles = [module.register_forward_pre_hook(hook(layer), with_kwargs=True) for layer, module in enumerate(modules)]
    with torch.no_grad():
        plain(input_ids=torch.tensor([tokens]), use_cache=False)
    for handle in handles:
        handle.remove()
    return [[set(seen[layer][row]) for layer in range(len(modules))] for row in range(len(tokens))]


def check(trace: Trace, plain: Any, texts: list[list[int]]) -> None:
    assert trace.num_documents == len(texts)
    differ = total = 0
    for document, text in enumerate(texts):
        rows = trace.rows(trace.document == document)
        assert rows.position.tolist() == list(range(len(text))) and rows.token_id.tolist() == text
        for ours, theirs in zip(rows.expert_ids.tolist(), chosen(plain, text), strict=True):
            for experts, expected in zip(ours, theirs, strict=True):
                total += 1
                differ += set(experts) - {-1} != {expert for expert in expected if expert < trace.num_experts}
    assert differ <= OTHERWISE * total, f"{differ} of {total} differ"


@pytest.mark.slow
def test_texts_and_experts_of_each_way_to_generate(saved: tuple[str, Path, Any]) -> None:
    import torch

    from tests.families.compare import prompts, reference
    from tests.runtime.texts import Cycle

    name, folder, cls = saved
    plain, given = reference(folder, cls), prompts(left_padded=True)
    prompt = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7]])
    modes: dict[str, tuple[Any, dict[str, Any]]] = {
        "batch": (given.ids, {"attention_mask": given.mask}),
        "drafts": (prompt, {"prompt_lookup_num_tokens": 4, "logits_processor": [Cycle()]}),
        "beams": (prompt, {"num_beams": 3}),
        "no cache": (prompt, {"use_cache": False}),
        "pieces": (prompt, {"prefill_chunk_size": 4}),
        "static cache": (given.ids, {"attention_mask": given.mask, "cache_implementation": "static"}),
    }
    done = []
    with swapless.load(folder, resident=0.5, context=96) as model:
        for mode, (ids, options) in modes.items():
            model.swapless.reset_trace()
            try:
                output = model.generate(ids, **GREEDY | options)
            except (ValueError, RuntimeError, KeyError) as error:  # a family that cannot do it in plain transformers either
                with pytest.raises(type(error)):
                    plain.generate(ids, **GREEDY | options)
                continue
            padding = (options["attention_mask"] == 0).sum(1).tolist() if "attention_mask" in options else [0] * len(output)
            if mode != "beams" or name not in NOT_REORDERED:
                check(model.swapless.trace(), plain, [row[n:-1].tolist() for row, n in zip(output, padding, strict=True)])
            done.append(mode)
    assert {"batch", "beams", "no cache"} <= set(done)


@pytest.mark.slow
@pytest.mark.parametrize("decode_tokens", [None, 6])
@pytest.mark.parametrize("name", RECORDED)
def test_what_is_recorded_can_be_simulated(name: str, decode_tokens: int | None, tmp_path: Path) -> None:
    from swapless.cache.replay import replay
    from swapless.runtime.record import Document, record
    from tests.runtime.conftest import word_tokenizer

    tiny_model(decorated_families()[name]).save_pretrained(tmp_path / "model")
    texts = ["w5 w9 w77 w5 w9", "w100 w4 w5 w6 w7 w8"]
    with swapless.load(tmp_path / "model", resident=0.5, policy="lru", context=64) as model:
        documents = [Document(text) for text in texts]
        record(model, word_tokenizer(), documents, tmp_path / "t.parquet", decode_tokens=decode_tokens)
        stats, slots = model.swapless.stats(), model.swapless.budget.slots
    trace = read_trace(tmp_path / "t.parquet")
    assert trace.num_documents == 2 and trace.header.model_type
    found = replay(trace, "lru", slots / model.swapless.budget.num_experts_total)
    assert found.decode_tokens == stats.decode_tokens > 0
    assert (found.requests, found.hits) == (stats.requests, stats.hits), "the simulator sees what the engine did"
