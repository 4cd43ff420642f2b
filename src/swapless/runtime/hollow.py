"""The model without its weights: the real classes, and products that answer zero at once.

What its KV cache takes is what the real one takes, and so is what a forward call holds besides. All without a byte of the
checkpoint's weights, and in the memory of a few tensors.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedModel

from swapless.runtime.door import IMPLEMENTATION, float32_tensors, skeleton, strip_experts
from swapless.runtime.open import OpenCheckpoint


def hollow_model(opened: OpenCheckpoint, attn_implementation: str | None = None) -> PreTrainedModel:
    """The model of ``opened`` with every parameter a single zero, seen as often as its shape asks for.

    Linear layers and embeddings answer zeros without a product. Experts are stripped, and run through our door. The attention
    is the one that a load would choose, or ``attn_implementation``.
    """
    config = copy.deepcopy(opened.config)  # the implementation is noted in it
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    dtype = opened.layout.dtype
    model: Any = skeleton(opened.cls, config, dtype)
    strip_experts(model)
    model.set_experts_implementation(IMPLEMENTATION)
    kept = float32_tensors(model, dtype)
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                zeros = _zeros(parameter, torch.float32 if f"{path}.{name}" in kept else dtype)
                module._parameters[name] = torch.nn.Parameter(zeros, requires_grad=parameter.requires_grad)  # products go by it
        for name, buffer in module._buffers.items():
            if buffer is not None:
                # A buffer may be written to, so it has memory of its own.
                kind = torch.float32 if f"{path}.{name}" in kept else buffer.dtype
                module._buffers[name] = torch.zeros(buffer.shape, dtype=kind)
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
