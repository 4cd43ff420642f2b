"""What an offloaded model can do like any other, and what it refuses by name instead of doing it wrong."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import swapless
from swapless.errors import ContextError, UnsupportedOperationError
from swapless.runtime.packing import pack


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


# -- gradients, transforms and tracing -------------------------------------------------------------------------------------


def embedded(model: Any, prompt: Any) -> torch.Tensor:
    return model.get_input_embeddings()(prompt).detach()


def backward(model: Any, embeds: torch.Tensor) -> Any:
    return model(inputs_embeds=embeds.requires_grad_()).logits.sum().backward()


def adapter(model: Any, embeds: torch.Tensor) -> Any:
    model.requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    try:
        return model(inputs_embeds=embeds).logits
    finally:
        model.requires_grad_(True)


def checkpointed(model: Any, embeds: torch.Tensor) -> Any:
    from torch.utils.checkpoint import checkpoint

    out = checkpoint(lambda e: model(inputs_embeds=e).logits, embeds.requires_grad_(), use_reentrant=True)
    return out.sum().backward()


def hooked(model: Any, embeds: torch.Tensor) -> Any:
    """A hook that lets the gradient begin in the middle."""
    hook = model.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0].detach().requires_grad_(), *args[1:]))
    model.requires_grad_(False)
    try:
        return model(inputs_embeds=embeds).logits
    finally:
        model.requires_grad_(True)
        hook.remove()


WANT_GRADIENTS = {
    "backward": backward,
    "an adapter": adapter,
    "a hook": hooked,
    "jacobian": lambda model, e: torch.autograd.functional.jacobian(lambda x: model(inputs_embeds=x).logits[0, -1], e),
    "checkpoint": checkpointed,
    "the inner model": lambda model, e: model.model(inputs_embeds=e.requires_grad_()).last_hidden_state,
}


@pytest.mark.parametrize("want", WANT_GRADIENTS.values(), ids=WANT_GRADIENTS.keys())
def test_gradients_through_the_experts_are_refused_by_name(want: Any, model: Any, prompt: Any) -> None:
    before = model(input_ids=prompt).logits
    with torch.enable_grad(), pytest.raises(UnsupportedOperationError, match=r"No gradient goes through the experts.*no_grad"):
        want(model, embedded(model, prompt))
    model.swapless.check_integrity()
    assert torch.equal(model(input_ids=prompt).logits, before)


def test_gradients_that_do_not_pass_an_expert_are_right(olmoe: Path, load: Any, eager: Any, prompt: Any) -> None:
    grads = []
    for who in (load(olmoe, resident=0.25), eager(olmoe)):
        who.requires_grad_(False)
        who.lm_head.weight.requires_grad_(True)
        who(input_ids=prompt).logits.float().logsumexp(-1).sum().backward()
        grads.append(who.lm_head.weight.grad)
    assert torch.equal(*grads)


def test_weights_want_gradients_as_in_transformers(olmoe: Path, load: Any, eager: Any) -> None:
    ours, theirs = ({n: p.requires_grad for n, p in m.named_parameters()} for m in (load(olmoe, resident=0.25), eager(olmoe)))
    assert ours == {name: theirs[name] for name in ours}  # torch multiplies in another way where they do not


def test_no_graph_is_kept_without_being_asked(model: Any, prompt: Any) -> None:
    with torch.enable_grad():
        out = model(input_ids=prompt, labels=prompt)
    assert not out.logits.requires_grad and not out.loss.requires_grad


@pytest.mark.parametrize("part", ["rounded experts", "rounded layers"])
def test_gradients_through_rounded_weights_are_refused_by_name(
    part: str, qwen3_moe: Path, tmp_path: Path, load: Any, prompt: Any
) -> None:
    pack(qwen3_moe, tmp_path / "store", bits=4, dense_bits=16 if part == "rounded experts" else 4)
    packed = load(tmp_path / "store")
    with pytest.raises(UnsupportedOperationError, match=r"No gradient goes through the (experts|rounded layers)"):
        backward(packed, embedded(packed, prompt))


def make_fx(model: Any, embeds: torch.Tensor) -> Any:
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(lambda e: model(inputs_embeds=e).logits)(embeds)


def dual(model: Any, embeds: torch.Tensor) -> Any:
    from torch.autograd import forward_ad

    with forward_ad.dual_level():
        return model.model.layers[0].mlp.experts(
            forward_ad.make_dual(embeds[0], torch.ones_like(embeds[0])),
            torch.zeros(len(embeds[0]), 1, dtype=torch.long),
            torch.ones(len(embeds[0]), 1, dtype=embeds.dtype),
        )


def fake(model: Any, embeds: torch.Tensor) -> Any:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return model(inputs_embeds=mode.from_tensor(embeds))


def logits_of(model: Any) -> Any:
    return lambda e: model(inputs_embeds=e).logits


TRANSFORMS = {
    "func.grad": lambda model, e: torch.func.grad(lambda x: logits_of(model)(x).sum())(e),
    "func.vmap": lambda model, e: torch.func.vmap(lambda x: logits_of(model)(x[None]))(e.expand(2, -1, -1)),
    "func.jvp": lambda model, e: torch.func.jvp(logits_of(model), (e,), (torch.ones_like(e),)),
    "func.vmap of the inner model": lambda model, e: torch.func.vmap(lambda x: model.model(inputs_embeds=x[None])[0])(e),
    "jit.trace": lambda model, e: torch.jit.trace(lambda x: logits_of(model)(x), (e,)),
    "jit.script": lambda model, e: torch.jit.script(model),
    "make_fx": make_fx,
    "forward mode": dual,
    "fake tensors": fake,
    "deepcopy": lambda model, e: copy.deepcopy(model),
    "deepcopy of a part": lambda model, e: copy.deepcopy(model.model.layers[0]),
    "pickle": lambda model, e: pickle.dumps(model),
    "save": lambda model, e: torch.save(model, io.BytesIO()),
    "export": lambda model, e: torch.export.export(model, (), {"inputs_embeds": e}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_what_would_hold_on_to_weights_is_refused_by_name(transform: Any, model: Any, prompt: Any) -> None:
    before = model(input_ids=prompt).logits
    with torch.no_grad(), pytest.raises(UnsupportedOperationError):
        transform(model, embedded(model, prompt))
    model.swapless.check_integrity()
    assert torch.equal(model(input_ids=prompt).logits, before)


def test_a_shallow_copy_is_the_same_model(model: Any, prompt: Any) -> None:
    twin = copy.copy(model)
    with torch.no_grad():
        assert torch.equal(twin(input_ids=prompt).logits, model(input_ids=prompt).logits)
    assert twin.swapless is model.swapless


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_grad_modes_do_not_matter_in_whatever_order(first: Any, olmoe: Path, load: Any, prompt: Any) -> None:
    model = load(olmoe, resident=0.5)
    seen = []
    for mode in (first, torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            cache = model(input_ids=prompt, use_cache=True).past_key_values
            seen.append(model(input_ids=prompt[:, :1], past_key_values=cache, use_cache=True).logits)
    assert all(torch.equal(logits, seen[0]) for logits in seen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("computed_in", ["float32", "bfloat16"])
def test_autocast_as_transformers_has_it(
    dtype: torch.dtype, computed_in: str, olmoe: Path, load: Any, eager: Any, prompt: Any
) -> None:
    logits = []
    for who in (load(olmoe, resident=0.25, dtype=computed_in), eager(olmoe, dtype=computed_in)):
        with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
            cache = who(input_ids=prompt, use_cache=True).past_key_values
            logits.append(who(input_ids=prompt[:, :1], past_key_values=cache, use_cache=True).logits)
    assert logits[0].dtype == logits[1].dtype and torch.equal(*logits)


@pytest.mark.parametrize("bits", [8, 4])
def test_autocast_of_rounded_weights_answers_in_its_type(
    bits: int, qwen3_moe: Path, tmp_path: Path, load: Any, prompt: Any
) -> None:
    pack(qwen3_moe, tmp_path / "store", bits=bits, dense_bits=bits)
    packed = load(tmp_path / "store", dtype="float32")
    with torch.no_grad():
        plain = packed(input_ids=prompt).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = packed(input_ids=prompt).logits
    assert plain.dtype == torch.float32 and (plain - cast.float()).abs().max() < 0.1 * plain.std()
