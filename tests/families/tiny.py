"""Tiny random models of every Mixture-of-Experts family of the installed transformers: found by themselves, sized by a table.

A family is a modelling file that carries transformers' decorator for experts, named by its folder. What it takes to make it
small is one row of ``OVERRIDES``; what cannot be run says why in ``NOT_RUN``. A family that a new transformers brings and
nobody has written a row for is tried with the common sizes, and fails the sweep where these do not do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

DECORATOR = re.compile(r"^@use_experts_implementation\b(?:\((.*?)\))?", re.MULTILINE)

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
"""Sizes that every configuration takes, as far as it knows the name."""

_GROUPS = {"n_group": 2, "topk_group": 1}
_DENSE_FIRST = _GROUPS | {"first_k_dense_replace": 1, "n_shared_experts": 1}
_LATENT = _GROUPS | {
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
_LATENT_QUERY = _LATENT | {"q_lora_rank": 16, "n_shared_experts": 1}
_INDEXER = {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 64}
_LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
_LINEAR_LINEAR_FULL = {"layer_types": ["linear_attention", "linear_attention", "full_attention"]}
_DENSE_SPARSE_SPARSE = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
_SHARED = {"shared_expert_intermediate_size": 32}
_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
_SAM = {
    "hidden_size": 32,
    "output_channels": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 64,
    "window_size": 2,
    "global_attn_indexes": [0],
    "downsample_channels": [16, 32],
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "afmoe": {"num_dense_layers": 1, "num_shared_experts": 1},
    "aria": {"moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 1},
    "axk1": _LATENT_QUERY,
    "axk2": _LATENT_QUERY | _INDEXER | {"head_dim": 8},
    "bailing_hybrid": _GROUPS | _LINEAR_LINEAR_FULL | _DENSE_SPARSE_SPARSE | {"num_key_value_heads": 4},
    "beam": _DENSE_SPARSE_SPARSE | _GROUPS,
    "deepseek_ocr2": {
        "text_config": _DENSE_SPARSE_SPARSE | {"topk_method": "greedy", "num_key_value_heads": 4},
        "vision_config": {
            "sam_config": _SAM | {"mlp_dim": 32},
            "encoder_config": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        },
    },
    "deepseek_v2": _LATENT_QUERY | {"first_k_dense_replace": 1, "head_dim": 8, "topk_method": "greedy"},
    "deepseek_v3": _LATENT_QUERY | {"first_k_dense_replace": 1},
    "deepseek_v32": _LATENT_QUERY | _INDEXER | {"first_k_dense_replace": 1, "head_dim": 8},
    "deepseek_v4": {
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "q_lora_rank": 16,
        "o_lora_rank": 16,
        "index_head_dim": 16,
        "index_topk": 64,
    },
    "dots1": _DENSE_FIRST,
    "dots3_note": _LATENT_QUERY
    | _INDEXER
    | {"head_dim": 8, "shared_experts_intermediate_size": 32, "layer_types": ["full_attention"] * 3},
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 2, "moe_layer_start_index": 1, "moe_num_shared_experts": 1},
    "ernie4_5_vl_moe": {
        "text_config": {"moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1, "moe_intermediate_size": [24, 16]}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 4]}},
        "vision_config": {name: size for name, size in _VISION.items() if name != "out_hidden_size"},
    },
    "exaone_moe": _GROUPS | {"first_k_dense_replace": 1},
    "gemma4": {
        "enable_moe_block": True,
        "top_k_experts": 2,
        "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 16,
    },
    "glm4_moe": _DENSE_FIRST,
    "glm4_moe_lite": _LATENT_QUERY | {"head_dim": 8},
    "glm4v_moe": {
        "text_config": _DENSE_FIRST
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}},
        "vision_config": _VISION,
    },
    "glm5_next": {
        "text_config": _LATENT_QUERY
        | _INDEXER
        | _DENSE_SPARSE_SPARSE
        | _LINEAR_LINEAR_FULL
        | {"head_dim": 0, "qk_rope_head_dim": 0, "linear_head_dim": 16, "linear_num_heads": 2, "index_kpool": 4},
        "vision_config": _VISION | {"projection_intermediate_size": 32},
    },
    "glm_moe_dsa": _LATENT_QUERY | _INDEXER | {"first_k_dense_replace": 1, "head_dim": 8},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    "granitemoehybrid": {
        "shared_intermediate_size": 32,
        "layer_types": ["mamba", "attention", "mamba"],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "mamba_expand": 2,
        "mamba_chunk_size": 16,
    },
    "granitemoeshared": {"shared_intermediate_size": 32},
    "hunyuan_v1_moe": {"moe_topk": 2},
    "hy_v4": {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16} | _INDEXER,
    "inkling": {"swa_head_dim": 16, "rel_extent": 64},
    "inkling2": {"swa_head_dim": 16, "rel_extent": 64, "unpadded_vocab_size": 128},
    "jamba": {
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_dt_rank": 4,
        "mamba_d_state": 8,
    },
    "kimi_linear": _LATENT | _LINEAR_LINEAR_FULL | _DENSE_SPARSE_SPARSE | {"linear_head_dim": 16, "linear_num_heads": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "minimax_m3_vl": {"shared_intermediate_size": 32, "dense_intermediate_size": 32, "index_head_dim": 16},
    "mistral4": _LATENT_QUERY
    | {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "llama_4_scaling_beta": 0.1,
        }
    },
    "mistral_large4": {
        "text_config": _LATENT | _INDEXER | {"n_shared_experts": 1, "head_dim": 8, "first_k_dense_replace": 1},
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "head_dim": 16,
        },
    },
    "muse_spark": {
        "text_config": _DENSE_SPARSE_SPARSE | {"moe_hidden_size": 32},
        "vision_config": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        "audio_config": {"num_hidden_layers": 4, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "out_hidden_size": 64},
        "out_hidden_size": 64,
        "projector_hidden_size": 32,
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "ssm_state_size": 16,
        "moe_shared_expert_intermediate_size": 32,
        "n_group": 2,
        "topk_group": 1,
    },
    "qwen2_moe": _SHARED | {"decoder_sparse_step": 1},
    "qwen3_5_moe": _LINEAR | _LINEAR_LINEAR_FULL | _SHARED,
    "qwen3_moe": {"decoder_sparse_step": 1, "norm_topk_prob": True},
    "qwen3_next": _LINEAR | _LINEAR_LINEAR_FULL | _SHARED,
    "qwen3_omni_moe": {
        "vision_start_token_id": 3,
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}},
        "vision_config": _VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        "audio_config": {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "d_model": 32}
        | {"output_dim": 64, "downsample_hidden_size": 8, "num_mel_bins": 16},
    },
    "qwen3_vl_moe": {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}},
        "vision_config": _VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    },
    "qwen4_exp": _LINEAR
    | _SHARED
    | {
        "num_hidden_layers": 4,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 16,
    },
    "solar_open": _GROUPS | {"n_shared_experts": 1},
    "unlimited_ocr": {
        "text_config": _DENSE_SPARSE_SPARSE | {"n_group": 1, "topk_group": 1, "num_key_value_heads": 4},
        "vision_config": {
            "sam_config": _SAM | {"mlp_dim": 32},
            "encoder_config": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        },
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""What a family needs beyond the common sizes. A name that its configuration does not know is an error: the row is stale."""

_UNDECLARED = {"Qwen3OmniMoeThinkerConfig": {"vision_start_token_id"}}
"""Names that a family's code reads from a configuration that does not declare them."""

NOT_RUN: dict[str, str] = {
    "diffusion_gemma": "it writes blocks of text by diffusion: transformers has no class of it that generates token by token",
    "ernie4_5_vl_moe": "text and vision experts lie in one list of the checkpoint, not to be cut out one by one: load says so",
    "openai_privacy_filter": "it labels tokens: transformers has no class of it that generates text",
}
"""Decorated families that the sweep leaves out, each with its reason. The only such list."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One decorated modelling file: its folder name, and the flags that its decorator sets, as written."""

    name: str
    flags: str

    @property
    def modelling(self) -> Any:
        """The modelling module, imported now."""
        return import_module(f"transformers.models.{self.name}.modeling_{self.name}")


@cache
def decorated_families() -> dict[str, Family]:
    """Every family of the installed transformers whose source carries the decorator; imports none of them."""
    spec = find_spec("transformers")
    assert spec is not None and spec.submodule_search_locations, "transformers is not installed"
    found = {}
    for file in sorted(Path(spec.submodule_search_locations[0]).glob("models/*/modeling_*.py")):
        match = DECORATOR.search(file.read_text(encoding="utf-8"))
        if match:
            found[file.parent.name] = Family(name=file.parent.name, flags=match[1] or "")
    return found


def language_model(family: Family) -> Any:
    """The class of ``family`` that generates text: one with a text configuration of its own before a multimodal one."""
    from transformers import GenerationMixin, PreTrainedModel

    candidates = [
        item
        for item in vars(family.modelling).values()
        if isinstance(item, type)
        and issubclass(item, PreTrainedModel)
        and issubclass(item, GenerationMixin)
        and item.__module__ == family.modelling.__name__
    ]
    for ending in ("ForCausalLM", "ForConditionalGeneration"):
        for item in candidates:
            if item.__name__.endswith(ending):
                return item
    raise LookupError(f"{family.name} has no class that generates text")


def tiny_config(config_class: Any, overrides: Mapping[str, Any]) -> Any:
    """A configuration of common sizes and ``overrides``; a nested mapping makes a nested configuration."""
    known = _known_names(config_class) | _UNDECLARED.get(config_class.__name__, set())
    stale = sorted(overrides.keys() - known)
    if stale:
        raise LookupError(f"{config_class.__name__} knows no {', '.join(stale)}: the row of overrides is stale")
    values = {name: value for name, value in COMMON.items() if name in known} | dict(overrides)
    for alias, target in (getattr(config_class, "attribute_map", None) or {}).items():
        if alias in values and target in values and alias not in overrides:
            del values[alias]  # one of the two names: both would fight
    for name, sub_class in (getattr(config_class, "sub_configs", None) or {}).items():
        if isinstance(values.get(name), Mapping) and "model_type" not in values[name]:
            values[name] = tiny_config(sub_class, values[name]).to_dict()
    return config_class(**values)


def _known_names(config_class: Any) -> set[str]:
    known = set(getattr(config_class, "attribute_map", None) or {})
    for cls in config_class.__mro__:
        known |= set(getattr(cls, "__annotations__", {}))
    return known


def tiny_model(family: Family, *, seed: int = 1) -> Any:
    """A float32 model of ``family`` with random weights; large embeddings make tokens take different routes."""
    import torch

    cls = language_model(family)
    config = tiny_config(cls.config_class, OVERRIDES.get(family.name, {}))
    model = cls(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.08)
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):
                module.weight.mul_(10)
    return model


def clone_weights(model: Any) -> Any:
    """Move every weight to memory of its own, 64-byte aligned: less aligned ones change the last bits of products."""
    import torch

    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    unaligned = [name for name, tensor in model.named_parameters() if tensor.data_ptr() % 64]
    assert not unaligned, f"not aligned to 64 bytes: {unaligned[:3]}"
    return model
