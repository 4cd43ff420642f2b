"""The door into transformers: every use of its private interface is in this folder, and the project has no second one.

transformers builds every Mixture-of-Experts family around experts modules marked by one decorator, which looks their forward
function up in a registry. We register ours, and load models through a subclass whose experts hold no parameters, so that
``from_pretrained`` does all else by itself and never reads an expert. Which bytes of the checkpoint make up an expert is asked
of transformers' declarative conversion table, in its own words, so that no family is named here.
"""

from __future__ import annotations

from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from swapless.runtime.door.attention import group_heads
from swapless.runtime.door.dequantize import check_quantization, dequantize_on_load
from swapless.runtime.door.gates import common_gate
from swapless.runtime.door.layout import ExpertParameter, Layout, MoeLayer
from swapless.runtime.door.match import checkpoint_layout, is_experts
from swapless.runtime.door.model import (
    IMPLEMENTATION,
    experts_of,
    load_non_experts,
    model_class,
    skeleton,
    strip_experts,
)
from swapless.runtime.door.origin import DTYPES
from swapless.runtime.door.packed import check_packed_model, expert_pieces, packed_layout
from swapless.runtime.door.reference import Reference

__all__ = [
    "ALL_EXPERTS_FUNCTIONS",
    "DTYPES",
    "IMPLEMENTATION",
    "ExpertParameter",
    "Layout",
    "MoeLayer",
    "Reference",
    "check_packed_model",
    "check_quantization",
    "checkpoint_layout",
    "common_gate",
    "dequantize_on_load",
    "expert_pieces",
    "experts_of",
    "group_heads",
    "is_experts",
    "load_non_experts",
    "model_class",
    "packed_layout",
    "skeleton",
    "strip_experts",
    "use_experts_implementation",
]
