"""A dry run of the loaded model with experts that answer zero: what its KV cache takes, measured instead of derived.

Families keep very different things between steps (keys and values, latent vectors, convolution and recurrent states), and no
formula covers them all. Two short prefills without a single expert read tell the bytes a token and the bytes a sequence.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from swapless.runtime.door import experts_of

_SHORT, _LONG = 4, 20


class DryRun(NamedTuple):
    """``cache_bytes_per_token`` and ``cache_bytes_fixed`` of one sequence, and K as the router really hands it out."""

    cache_bytes_per_token: int
    cache_bytes_fixed: int
    top_k: int


class _ZeroExperts:
    """Stands in for the engine at the door."""

    top_k = 1

    def forward(self, module: Any, hidden_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        self.top_k = ids_TK.shape[1]
        return torch.zeros_like(hidden_TD)


@torch.no_grad()
def dry_run(model: PreTrainedModel) -> DryRun:
    """Measure the cache of ``model``, whose experts modules must not belong to an engine yet. Leaves no trace in it."""
    stand_in = _ZeroExperts()
    modules = [module for _, module in experts_of(model)]
    for module in modules:
        module.swapless_engine = stand_in  # type: ignore[assignment]
    try:
        small, large = (_cache_bytes(model, tokens) for tokens in (_SHORT, _LONG))
    finally:
        for module in modules:
            del module.swapless_engine
    per_token = max(0, large - small) // (_LONG - _SHORT)
    return DryRun(per_token, max(0, small - _SHORT * per_token), stand_in.top_k)


def _cache_bytes(model: PreTrainedModel, tokens: int) -> int:
    out = model(input_ids=torch.zeros((1, tokens), dtype=torch.long), use_cache=True)  # the one id that every vocabulary has
    return _tensor_bytes(getattr(out, "past_key_values", None), set())


def _tensor_bytes(value: Any, seen: set[int]) -> int:
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        if storage.data_ptr() in seen:
            return 0
        seen.add(storage.data_ptr())
        return storage.nbytes()
    if isinstance(value, (list, tuple)):
        return sum(_tensor_bytes(item, seen) for item in value)
    if isinstance(value, dict):
        return sum(_tensor_bytes(item, seen) for item in value.values())
    if hasattr(value, "__dict__") and id(value) not in seen and not isinstance(value, type):
        seen.add(id(value))
        return _tensor_bytes(vars(value), seen)
    return 0


def activation_bytes(config: Any, context_tokens: int, dtype: torch.dtype) -> int:
    """Upper estimate of what one prefill of ``context_tokens`` holds at once besides weights and cache.

    Counts per token the residual stream and its copies, queries, keys, values and attention output, the widest
    feed-forward, and a gathered expert's input and inner values; once, the logits of the last token in float32.
    """
    values = config.get_text_config().to_dict()  # as attributes, those that differ between blocks may refuse to be read

    def size(name: str) -> int:
        value = values.get(name)
        sizes = value if isinstance(value, (list, tuple)) else value.values() if isinstance(value, dict) else [value]
        return int(max((size for size in sizes if isinstance(size, (int, float))), default=0))

    hidden = size("hidden_size")
    heads = size("num_attention_heads") * (size("head_dim") or hidden // max(1, size("num_attention_heads")))
    inner = max(size("intermediate_size"), 2 * size("moe_intermediate_size"), size("shared_expert_intermediate_size"))
    per_token = dtype.itemsize * (8 * hidden + 4 * heads + 3 * inner) + 4 * 2 * hidden
    return context_tokens * per_token + 8 * size("vocab_size")
