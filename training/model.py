"""The architecture of the embedded model, and the balance loss it is trained with.

The model is transformers' own Qwen3-MoE; nothing here is needed to load or run it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from swapless.oracle.sorted_experts import SORTED, register_sorted_experts


def embedded_config(vocab_size: int, *, pad: int, bos: int, eos: int, **changes: Any) -> Qwen3MoeConfig:
    """The shape of the embedded model; `changes` shrink it for tests."""
    shape: dict[str, Any] = {
        "hidden_size": 192,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 72,
        "max_position_embeddings": 1024,
    }
    shape |= changes
    return Qwen3MoeConfig(
        vocab_size=vocab_size,
        intermediate_size=4 * shape["hidden_size"],
        decoder_sparse_step=1,
        mlp_only_layers=[],
        norm_topk_prob=True,
        tie_word_embeddings=True,
        pad_token_id=pad,
        bos_token_id=bos,
        eos_token_id=eos,
        **shape,
    )


def build_model(config: Qwen3MoeConfig) -> Qwen3MoeForCausalLM:
    """A freshly initialised float32 model that trains through the quick experts forward."""
    register_sorted_experts()
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation(SORTED)
    return model


def balance_loss(router_logits: Sequence[Tensor], top_k: int) -> Tensor:
    """Mean over MoE layers of E * sum(load * mean probability), each over the whole batch: 1 when balanced.

    Every layer is balanced by itself, and only over the batch, which mixes domains: a sequence may use few experts, a
    batch may not.
    """
    losses = []
    for logits_TE in router_logits:
        experts = logits_TE.shape[-1]
        chosen = logits_TE.detach().topk(top_k, dim=-1).indices.reshape(-1)
        load_E = torch.bincount(chosen, minlength=experts) / chosen.numel()
        losses.append(experts * (load_E * logits_TE.softmax(dim=-1).mean(dim=0)).sum())
    return torch.stack(losses).mean()
