"""The decoder of the Oracle-MoE family, in transformers' form: `AutoModelForCausalLM` finds it once this module is imported.

GPT-2 with the norm before each sublayer: learned positions, biases, GELU. Some blocks hold experts instead of a feed-forward;
their experts module stands at transformers' own experts interface, so that all that runs through it runs these models too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from swapless.errors import ContextError, UsageError, message
from swapless.oracle.attention import Attention, attention_mask_of
from swapless.oracle.config import OracleMoeConfig
from swapless.oracle.output_loss import next_token_loss
from swapless.oracle.router import OracleMoeRouter, Routing
from swapless.oracle.space import OracleSpace
from swapless.oracle.state import Documents, OracleCache, RouterState, follow
from swapless.oracle.theme import View
from swapless.runtime.door import use_experts_implementation

__all__ = ["OracleMoeForCausalLM", "OracleMoeModel", "OracleMoeOutput"]


@dataclass
class OracleMoeModelOutput(MoeModelOutputWithPast):
    """Adds ``expert_ids``, one (T, K) a MoE layer, and ``restarts`` (T,): 1 where a document begins, -1 for padding."""

    expert_ids: tuple[Tensor, ...] | None = None
    restarts: Tensor | None = None


@dataclass
class OracleMoeOutput(MoeCausalLMOutputWithPast):
    """Adds ``expert_ids``, one (T, K) a MoE layer, and ``restarts`` (T,): 1 where a document begins, -1 for padding."""

    expert_ids: tuple[Tensor, ...] | None = None
    restarts: Tensor | None = None


@use_experts_implementation(has_gate=False, has_bias=True)
class OracleMoeExperts(nn.Module):
    """E two-matrix feed-forwards with biases, stacked."""

    def __init__(self, config: OracleMoeConfig) -> None:
        super().__init__()
        E, D, F_ = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.num_experts = E
        self.up_proj = nn.Parameter(torch.empty(E, F_, D))
        self.up_proj_bias = nn.Parameter(torch.empty(E, F_))
        self.down_proj = nn.Parameter(torch.empty(E, D, F_))
        self.down_proj_bias = nn.Parameter(torch.empty(E, D))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum of each token's experts times their weights, (T, D); experts in ascending order."""
        out_TD = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            place, token = torch.where(top_k_index.t() == expert)
            inner = self.act_fn(F.linear(hidden_states[token], self.up_proj[expert], self.up_proj_bias[expert]))
            y = F.linear(inner, self.down_proj[expert], self.down_proj_bias[expert])
            out_TD.index_add_(0, token, (y * top_k_weights[token, place, None]).to(out_TD.dtype))
        return out_TD


class OracleMoeMlp(nn.Module):
    """The feed-forward of a dense block."""

    def __init__(self, config: OracleMoeConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, view: View) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        return self.down_proj(self.act_fn(self.up_proj(view.hidden_BND)))


class OracleMoeSparseMlp(nn.Module):
    """Router and experts of one MoE layer."""

    def __init__(self, config: OracleMoeConfig, moe_layer: int) -> None:
        super().__init__()
        self.moe_layer = moe_layer
        self.router = OracleMoeRouter(config, moe_layer)
        self.experts = OracleMoeExperts(config)

    def forward(self, view: View, state: RouterState) -> tuple[Tensor, Routing]:
        """(B, N, D) to (B, N, D), with what was chosen; ``state`` is brought up to date."""
        routing = self.router(view, state)
        out_TD = self.experts(view.hidden_BND.flatten(0, 1), routing.ids, routing.weights)
        return out_TD.view_as(view.hidden_BND), routing


class OracleMoeBlock(nn.Module):
    """Attention, then a feed-forward or experts, each behind a norm and added to the stream.

    Attributes
    ----------
    watch : callable of View, optional
        Told what a router of this block would see, before the feed-forward; the fit looks through it.
    """

    def __init__(self, config: OracleMoeConfig, block: int) -> None:
        super().__init__()
        moe_blocks = config.moe_blocks or []
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config, block)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        sparse = block in moe_blocks
        self.mlp = OracleMoeSparseMlp(config, moe_blocks.index(block)) if sparse else OracleMoeMlp(config)
        self.dropout = nn.Dropout(config.dropout)
        self.watch: Callable[[View], None] | None = None

    def forward(
        self, x_BND: Tensor, mask: Tensor | None, documents: Documents, cache: OracleCache | None
    ) -> tuple[Tensor, Routing | None]:
        """The stream after this block, and the routing of a MoE block."""
        attended_BND, probabilities = self.attention(self.attention_norm(x_BND), mask, cache)
        x_BND = x_BND + self.dropout(attended_BND)
        view = View(self.mlp_norm(x_BND), attended_BND, probabilities, documents)
        if self.watch is not None:
            self.watch(view)
        if isinstance(self.mlp, OracleMoeMlp):
            return x_BND + self.dropout(self.mlp(view)), None
        state = cache.routers[self.mlp.moe_layer] if cache is not None else {}
        out_BND, routing = self.mlp(view, state)
        return x_BND + self.dropout(out_BND), routing


class OracleMoePreTrainedModel(PreTrainedModel):
    """What the family has in common: its configuration and how weights begin."""

    config: OracleMoeConfig
    config_class = OracleMoeConfig
    base_model_prefix = "model"
    _no_split_modules = ["OracleMoeBlock"]  # noqa: RUF012 (lists, as transformers has them)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["router"]  # noqa: RUF012
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        into_stream = std / math.sqrt(2 * self.config.num_hidden_layers)  # as GPT-2: the stream's variance must not grow
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, OracleMoeExperts):
            init.normal_(module.up_proj, std=std)
            init.normal_(module.down_proj, std=into_stream)
            init.zeros_(module.up_proj_bias)
            init.zeros_(module.down_proj_bias)
        elif isinstance(module, OracleMoeRouter):
            if hasattr(module, "weight"):
                init.normal_(module.weight, std=std)
                init.zeros_(module.bias)
            if hasattr(module, "load"):
                init.constant_(module.load, 1 / module.num_experts)
                init.zeros_(module.stay)
            if hasattr(module, "tau"):
                init.constant_(module.tau, math.nan)
        elif isinstance(module, OracleSpace):
            for buffer in module.buffers():
                init.constant_(buffer, math.nan)
        if isinstance(module, Attention):
            init.normal_(module.out_proj.weight, std=into_stream)
        elif isinstance(module, OracleMoeMlp):
            init.normal_(module.down_proj.weight, std=into_stream)


class OracleMoeModel(OracleMoePreTrainedModel):
    """Embeddings, blocks and the last norm."""

    def __init__(self, config: OracleMoeConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(OracleMoeBlock(config, block) for block in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: OracleCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> OracleMoeModelOutput:
        """Hidden states (B, N, D) after the last norm.

        Raises
        ------
        UsageError
            Neither or both of ids and embeddings, or a cache of another kind.
        ContextError
            More tokens than there are positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UsageError("Exactly one of input_ids and inputs_embeds must be given.")
        embeds_BND = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        B, N, _ = embeds_BND.shape
        cache = past_key_values
        if cache is None and (self.config.use_cache and not self.training if use_cache is None else use_cache):
            cache = OracleCache(self.config)
        if cache is not None and not isinstance(cache, OracleCache):
            raise UsageError(
                message("An Oracle-MoE keeps its routers' state in the cache.", got=type(cache).__name__, allowed="OracleCache")
            )
        past = cache.get_seq_length() if cache is not None else 0
        valid_BS = torch.ones((B, past + N), dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        padded = not bool(valid_BS.all())
        if position_ids is None:
            position_ids = (valid_BS.long().cumsum(dim=1) - 1).clamp(min=0)[:, past:].to(embeds_BND.device)
        if int(position_ids.max()) >= self.config.max_position_embeddings:
            raise ContextError(
                message(
                    "More tokens than the model has positions.",
                    got=int(position_ids.max()) + 1,
                    allowed=self.config.max_position_embeddings,
                    step="Shorten the text.",
                )
            )
        end = self.config.eos_token_id
        known = cache.documents if cache is not None else None
        documents, state_B7 = follow(input_ids, valid_BS[:, past:], end if isinstance(end, int) else None, past, known)
        if cache is not None:
            cache.documents = state_B7
        mask = attention_mask_of(valid_BS, N, embeds_BND.device) if padded or 1 < N < past + N else None
        x_BND = self.dropout(embeds_BND + self.embed_positions(position_ids))
        routings = []
        for block in self.layers:
            x_BND, routing = block(x_BND, mask, documents, cache)
            if routing is not None:
                routings.append(routing)
        return OracleMoeModelOutput(
            last_hidden_state=self.norm(x_BND),
            past_key_values=cache,
            router_logits=tuple(routing.scores for routing in routings),
            expert_ids=tuple(routing.ids for routing in routings),
            restarts=torch.from_numpy(documents.restart).flatten(),
        )


class OracleMoeForCausalLM(OracleMoePreTrainedModel, GenerationMixin):
    """The language model: logits over the vocabulary, and `generate`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers reads a plain dict)

    def __init__(self, config: OracleMoeConfig) -> None:
        super().__init__(config)
        self.model = OracleMoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def routers(self) -> list[OracleMoeRouter]:
        """The router of every MoE layer, in order."""
        return [block.mlp.router for block in self.model.layers if isinstance(block.mlp, OracleMoeSparseMlp)]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: OracleCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> OracleMoeOutput:
        """Logits (B, N, V) of every token, or of the last ``logits_to_keep``; with ``labels`` the mean loss in nats.

        With ``shift_labels`` (B, N), the token that follows each, there is the loss and no logits: for training.

        Raises
        ------
        UsageError, ContextError, NotFittedError
            As the model and its routers.
        """
        out = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if shift_labels is not None:
            logits = None
            loss = next_token_loss(out.last_hidden_state.flatten(0, 1), self.lm_head.weight, shift_labels.flatten())
        else:
            logits = self.lm_head(out.last_hidden_state[:, keep])
            loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return OracleMoeOutput(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            router_logits=out.router_logits,
            expert_ids=out.expert_ids,
            restarts=out.restarts,
        )

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any) -> bool:
        if generation_config.use_cache is False or model_kwargs.get("past_key_values") is not None:
            prepare: Any = super()  # the annotation of its self does not fit transformers' own models
            return bool(prepare._prepare_cache_for_generation(generation_config, model_kwargs, *rest))
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise UsageError(
                message(
                    "An Oracle-MoE keeps its routers' state in a cache of its own.",
                    got=f"cache_implementation={generation_config.cache_implementation!r}",
                    step="Leave cache_implementation out.",
                )
            )
        model_kwargs["past_key_values"] = OracleCache(self.config)
        return True


def register() -> None:
    """Make the family known to transformers' Auto classes. Safe to call twice."""
    AutoConfig.register(OracleMoeConfig.model_type, OracleMoeConfig, exist_ok=True)
    AutoModel.register(OracleMoeConfig, OracleMoeModel, exist_ok=True)
    AutoModelForCausalLM.register(OracleMoeConfig, OracleMoeForCausalLM, exist_ok=True)


register()
