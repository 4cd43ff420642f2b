"""Which experts have the common gate, ``activation(gate) * up``, that a fused kernel can do; all others gate for themselves."""

from __future__ import annotations

from typing import Any

import torch
from transformers.activations import ACT2CLS
from transformers.integrations import moe


def common_gate(module: Any) -> str | None:
    """Name of the activation (``silu`` or ``gelu_tanh``) of an experts module with the common gate and no bias, else None."""
    if not getattr(module, "has_gate", True) or module.has_bias or not getattr(module, "is_concatenated", True):
        return None
    if type(module)._apply_gate is not getattr(moe, "_default_apply_gate", None):
        return None
    activation = getattr(module, "act_fn", None)
    silu: Any = ACT2CLS["silu"]
    gelu_tanh: Any = ACT2CLS["gelu_pytorch_tanh"]
    if isinstance(activation, (torch.nn.SiLU, silu)):
        return "silu"
    if isinstance(activation, gelu_tanh):
        return "gelu_tanh"
    return None
