"""The door into transformers: every use of its private interface is in this folder, and the project has no second one.

transformers builds every Mixture-of-Experts family around experts modules marked by one decorator, which looks their forward
function up in a registry. We register ours, and load models through a subclass whose experts hold no parameters, so that
``from_pretrained`` does all else by itself and never reads an expert. Which bytes of the checkpoint make up an expert is asked
of transformers' declarative conversion table, in its own words, so that no family is named here.
"""

from __future__ import annotations

from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from swapless.runtime.door.attention import group_heads
from swapless.runtime.door.cache import ROOM_TOKENS, grow_in_place, windows_of
from swapless.runtime.door.config import computable, model_config, own_config, refuse_unknown, stated_dtype
from swapless.runtime.door.dequantize import check_block_size, dequantize_on_load, is_served
from swapless.runtime.door.foreign import foreign_errors
from swapless.runtime.door.gates import common_gate
from swapless.runtime.door.generation import generation_config
from swapless.runtime.door.heads import most_heads, part_heads, whole_attention
from swapless.runtime.door.layout import ExpertParameter, Layout, MoeLayer
from swapless.runtime.door.logs import write_out_logs
from swapless.runtime.door.made_by import foreign
from swapless.runtime.door.match import checkpoint_layout, expert_parameters, is_experts
from swapless.runtime.door.model import (
    IMPLEMENTATION,
    experts_of,
    float32_tensors,
    load_non_experts,
    model_class,
    skeleton,
    strip_experts,
)
from swapless.runtime.door.origin import DTYPES
from swapless.runtime.door.packed import check_packed_model, expert_pieces, packed_layout
from swapless.runtime.door.reference import Reference
from swapless.runtime.door.sizes import bounded_modules, check_values
from swapless.runtime.door.tokenizer import text_ids, tokenizer_of

write_out_logs()

__all__ = [
    "ALL_EXPERTS_FUNCTIONS",
    "DTYPES",
    "IMPLEMENTATION",
    "ROOM_TOKENS",
    "ExpertParameter",
    "Layout",
    "MoeLayer",
    "Reference",
    "bounded_modules",
    "check_block_size",
    "check_packed_model",
    "check_values",
    "checkpoint_layout",
    "common_gate",
    "computable",
    "dequantize_on_load",
    "expert_parameters",
    "expert_pieces",
    "experts_of",
    "float32_tensors",
    "foreign",
    "foreign_errors",
    "generation_config",
    "group_heads",
    "grow_in_place",
    "is_experts",
    "is_served",
    "load_non_experts",
    "model_class",
    "model_config",
    "most_heads",
    "own_config",
    "packed_layout",
    "part_heads",
    "refuse_unknown",
    "skeleton",
    "stated_dtype",
    "strip_experts",
    "text_ids",
    "tokenizer_of",
    "use_experts_implementation",
    "whole_attention",
    "windows_of",
]
