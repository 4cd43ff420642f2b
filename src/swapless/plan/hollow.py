"""The model without its weights: the real classes, the real engine and cache, and products that answer zero at once.

What a forward call of it takes is what transformers and the engine take beside weights and reads; what its KV cache takes is
what the real one takes. Both without a byte of the checkpoint's weights, and in the memory of a few tensors.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from swapless.cache.policy import Policy
from swapless.cache.residency import layer_pools
from swapless.cache.serve import ExpertCache
from swapless.runtime.budget import Budget
from swapless.runtime.door import IMPLEMENTATION, experts_of, skeleton, strip_experts
from swapless.runtime.engine import Engine
from swapless.runtime.memory import MemoryMeter
from swapless.runtime.open import OpenCheckpoint
from swapless.runtime.routing import RoutingLog
from swapless.runtime.steps import StepHooks
from swapless.store.probe import Probe
from swapless.trace import TraceHeader

_PROMPT_TOKENS = 16
_WARM_UP = 3


class Linear(NamedTuple):
    """A linear layer as it was called: its path, inputs, outputs, and whether it has a bias."""

    path: str
    inputs: int
    outputs: int
    bias: bool


class HollowStep(NamedTuple):
    """``seconds`` of a decode step without weights and reads, and the linear layers that it called, with how often."""

    seconds: float
    linears: dict[Linear, int]


def hollow_model(opened: OpenCheckpoint) -> PreTrainedModel:
    """The model of ``opened`` with every parameter a single zero, seen as often as its shape asks for.

    Linear layers and embeddings answer zeros without a product. Experts are stripped, and run through our door.
    """
    model: Any = skeleton(opened.cls, copy.deepcopy(opened.config))  # the implementation is noted in it
    strip_experts(model)
    model.set_experts_implementation(IMPLEMENTATION)
    dtype = opened.layout.dtype
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                zeros = _zeros(parameter, dtype)
                module._parameters[name] = torch.nn.Parameter(zeros, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                # A buffer may be written to, so it has memory of its own.
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
        # Not where a family's own class computes something else, as phimoe's router does, which calls itself a linear layer.
        forward = type(module).forward
        if forward is torch.nn.Linear.forward:
            module.forward = _answer(module.out_features, None)
        elif forward is torch.nn.Embedding.forward:
            module.forward = _answer(module.embedding_dim, dtype)
    return model.eval()


def _zeros(parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    kind = dtype if parameter.is_floating_point() else parameter.dtype
    return torch.zeros((), dtype=kind).expand(parameter.shape)


def _answer(width: int, dtype: torch.dtype | None) -> Any:
    def forward(x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape, width) if dtype is not None else (*x.shape[:-1], width)
        return torch.zeros(shape, dtype=dtype or x.dtype)

    return forward


@torch.inference_mode()
def hollow_step(model: PreTrainedModel, opened: OpenCheckpoint, policy: Policy, budget: Budget, steps: int = 12) -> HollowStep:
    """Time a decode step of a hollow model with the real engine around experts that are all there and weigh nothing.

    Parameters
    ----------
    model : PreTrainedModel
        From :func:`hollow_model`; it belongs to the engine from now on.
    policy : Policy
        Kept busy as in a run.
    budget : Budget
        Any of this model.
    steps : int
        Timed steps, of which the median counts.
    """
    called: Counter[Linear] = Counter()
    counting = [False]
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            key = Linear(path, module.in_features, module.out_features, module.bias is not None)
            module.register_forward_pre_hook(lambda *_, key=key: called.update([key] if counting[0] else ()))
    with _engine(opened, policy, budget) as engine:
        for moe_layer, (_, module) in enumerate(experts_of(model)):
            module.swapless_engine = engine  # type: ignore[assignment]
            module.swapless_moe_layer = moe_layer  # type: ignore[assignment]
        StepHooks(engine, _PROMPT_TOKENS + _WARM_UP + steps + 1).attach(model)
        cache, seconds = None, []
        for number in range(1 + _WARM_UP + steps):
            ids = torch.ones((1, 1 if number else _PROMPT_TOKENS), dtype=torch.long)
            counting[0] = number == _WARM_UP
            begun = time.perf_counter()
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
            seconds.append(time.perf_counter() - begun)
            cache = getattr(output, "past_key_values", None)
    return HollowStep(statistics.median(seconds[1 + _WARM_UP :]), dict(called))


def _engine(opened: OpenCheckpoint, policy: Policy, budget: Budget) -> Engine:
    layers = opened.layout.moe_layers
    num_experts = max(layer.num_experts for layer in layers)
    header = TraceHeader(
        model_id=None,
        num_experts=num_experts,
        top_k=opened.experts_a_token // len(layers),
        moe_blocks=tuple(layer.block for layer in layers),
    )
    store: Any = _NoStore()
    pool: Any = _NoPool()
    return Engine(
        store=store,
        cache=ExpertCache(policy, len(layers), num_experts, *layer_pools(len(layers), num_experts, budget.slots)),
        pool=pool,
        experts=_zero_experts,
        budget=budget,
        probe=Probe(block_bytes=0, bytes_per_s={1: 1.0}, fixed_s=0.0, depth=1, direct=False),
        meter=MemoryMeter(),
        routing=RoutingLog(header),
    )


def _zero_experts(module: Any, moe_layer: int, blocks: Sequence[int], hidden: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.zeros_like(tokens) for tokens in hidden]


class _NoStore:
    """Experts of no bytes."""

    def bounce_buffer(self) -> np.ndarray:
        return np.empty(0, np.uint8)

    def parts(self, moe_layer: int, expert: int) -> int:
        return 1

    def read_part(self, moe_layer: int, expert: int, part: int, slot: np.ndarray, bounce: np.ndarray) -> int:
        return 0

    def close(self) -> None:
        """There is nothing to close."""


class _NoPool:
    """Slots of no bytes."""

    def bytes_of(self, slot: int) -> np.ndarray:
        return np.empty(0, np.uint8)

    def close(self) -> None:
        """There is nothing to give back."""
