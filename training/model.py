"""The architecture of the embedded model, the balance loss it is trained with, and an experts forward that is quick on a CPU.

The model is transformers' own Qwen3-MoE; nothing here is needed to load or run it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

TRAINING_EXPERTS = "sorted_mm"


class _GroupedLinear(torch.autograd.Function):
    """Rows sorted by expert times each expert's matrix: one GEMM an expert, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x_SI: Tensor, weight_EOI: Tensor, ends: list[int]) -> Tensor:
        ctx.save_for_backward(x_SI, weight_EOI)
        ctx.ends = ends
        out_SO = x_SI.new_empty(x_SI.shape[0], weight_EOI.shape[1])
        start = 0
        for expert, end in enumerate(ends):
            torch.mm(x_SI[start:end], weight_EOI[expert].t(), out=out_SO[start:end])
            start = end
        return out_SO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad_SO,) = (grad.contiguous() for grad in grads)
        x_SI, weight_EOI = ctx.saved_tensors
        grad_x_SI, grad_weight_EOI = torch.empty_like(x_SI), torch.empty_like(weight_EOI)
        start = 0
        for expert, end in enumerate(ctx.ends):
            torch.mm(grad_SO[start:end], weight_EOI[expert], out=grad_x_SI[start:end])
            torch.mm(grad_SO[start:end].t(), x_SI[start:end], out=grad_weight_EOI[expert])
            start = end
        return grad_x_SI, grad_weight_EOI, None


class _Dispatch(torch.autograd.Function):
    """Copy each token's row to the place of each of its K choices; the gradient gathers, where autograd would scatter."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_S: Tensor, back_S: Tensor) -> Tensor:
        ctx.save_for_backward(back_S)
        ctx.T = x_TD.shape[0]
        return x_TD.index_select(0, order_S // (order_S.shape[0] // ctx.T))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (back_S,) = ctx.saved_tensors
        return grads[0].index_select(0, back_S).view(ctx.T, -1, grads[0].shape[1]).sum(dim=1), None, None


class _Collect(torch.autograd.Function):
    """Undo the sorting of rows; the gradient is the sorting itself."""

    @staticmethod
    def forward(ctx: Any, y_SD: Tensor, order_S: Tensor, back_S: Tensor) -> Tensor:
        ctx.save_for_backward(order_S)
        return y_SD.index_select(0, back_S)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None


def sorted_experts_forward(self: nn.Module, hidden_TD: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Same sum as transformers' eager experts, with the tokens sorted by expert once and the outputs added by a reshape."""
    T, K = top_k_index.shape
    order_S = torch.argsort(top_k_index.reshape(-1), stable=True)
    ends = torch.bincount(top_k_index.reshape(-1), minlength=self.num_experts).cumsum(0).tolist()
    back_S = torch.empty_like(order_S)
    back_S[order_S] = torch.arange(T * K)
    x_SD = _Dispatch.apply(hidden_TD, order_S, back_S)
    gate_SF, up_SF = _GroupedLinear.apply(x_SD, self.gate_up_proj, ends).chunk(2, dim=-1)
    y_SD = _GroupedLinear.apply(self.act_fn(gate_SF) * up_SF, self.down_proj, ends)
    y_TKD = _Collect.apply(y_SD, order_S, back_S).view(T, K, -1)
    return (y_TKD * top_k_weights.unsqueeze(-1)).sum(dim=1)


def register_training_experts() -> None:
    """Make `experts_implementation="sorted_mm"` known to transformers. Safe to call twice."""
    ALL_EXPERTS_FUNCTIONS.register(TRAINING_EXPERTS, sorted_experts_forward)


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
    register_training_experts()
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation(TRAINING_EXPERTS)
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
