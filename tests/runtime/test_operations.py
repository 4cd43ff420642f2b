"""What an offloaded model can do like any other, and what it refuses by name instead of doing it wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import swapless
from swapless.errors import ContextError, UnsupportedOperationError


@pytest.fixture(scope="module")
def model(olmoe: Path) -> Iterator[Any]:
    """One model for all: a refused operation must leave it as it was."""
    with swapless.load(olmoe, resident=0.25, context=64) as loaded:
        yield loaded


REFUSED = {
    "to another device": lambda model, folder: model.to("cuda"),
    "to another type": lambda model, folder: model.to(torch.float32),
    "to another type by name": lambda model, folder: model.to(dtype=torch.float16),
    "to a device and a type": lambda model, folder: model.to("cpu", torch.float64),
    "cuda": lambda model, folder: model.cuda(),
    "half": lambda model, folder: model.half(),
    "float": lambda model, folder: model.float(),
    "double": lambda model, folder: model.double(),
    "bfloat16": lambda model, folder: model.bfloat16(),
    "save_pretrained": lambda model, folder: model.save_pretrained(folder),
    "push_to_hub": lambda model, folder: model.push_to_hub("someone/model"),
    "train": lambda model, folder: model.train(),
    "compile": lambda model, folder: model.compile(),
    "gradient_checkpointing_enable": lambda model, folder: model.gradient_checkpointing_enable(),
    "resize_token_embeddings": lambda model, folder: model.resize_token_embeddings(256),
    "set_experts_implementation": lambda model, folder: model.set_experts_implementation("eager"),
}


@pytest.mark.parametrize("operation", REFUSED.values(), ids=REFUSED.keys())
def test_refused_by_name(operation: Any, model: Any, tmp_path: Path, prompt: Any) -> None:
    with torch.no_grad():
        before = model(input_ids=prompt).logits
        with pytest.raises(UnsupportedOperationError, match="An offloaded model has no"):
            operation(model, tmp_path)
        assert not any(tmp_path.iterdir())
        assert torch.equal(model(input_ids=prompt).logits, before), "the refused operation changed something"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_torch_compile_is_refused_when_it_runs(model: Any, prompt: Any) -> None:
    compiled = torch.compile(model, backend="eager")  # no C++ compiler is needed to find out
    with pytest.raises(UnsupportedOperationError, match="compiled"), torch.no_grad():
        compiled(input_ids=prompt)


def test_what_changes_nothing_is_allowed(model: Any, prompt: Any) -> None:
    with torch.no_grad():
        before = model(input_ids=prompt).logits
        for same in (model.to("cpu"), model.to(torch.bfloat16), model.to(device="cpu"), model.eval(), model.train(False)):
            assert same is model
        assert torch.equal(model(input_ids=prompt).logits, before)
    assert not model.training and model.device == torch.device("cpu") and model.dtype == torch.bfloat16


def test_it_is_the_class_that_users_know(model: Any) -> None:
    from transformers import OlmoeForCausalLM

    assert isinstance(model, OlmoeForCausalLM) and type(model).__name__ == "OlmoeForCausalLM"
    experts = model.model.layers[0].mlp.experts
    assert experts._parameters and all(parameter is None for parameter in experts._parameters.values())
    assert sum(parameter.numel() for parameter in model.parameters()) < 100_000


def test_the_context_is_a_promise(olmoe: Path, load: Any, generate: Any, prompt: Any) -> None:
    model = load(olmoe, context=16)
    assert generate(model, prompt, 5).shape == (1, 17)  # the last token is never fed back
    with pytest.raises(ContextError, match=r"17 tokens.*16 tokens.*larger context"):
        generate(model, prompt, 8)
    with pytest.raises(ContextError):
        model(input_ids=torch.ones((1, 17), dtype=torch.long))
    assert generate(model, prompt, 2).shape == (1, 14), "usable after a refusal"
