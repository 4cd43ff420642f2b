"""Attention of a decode step with the query heads that share keys side by side.

torch's flash attention on a processor takes a lone query row many times slower than several: of 32 heads over 4 key heads and
1024 tokens 3.5 ms, where the 8 heads of a group as 8 rows take 0.19. The sums are the same but for the order of additions, so
the last bit may differ. That is why nothing asks for it by itself but packed stores with rounded weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

GROUPED = "swapless_grouped"
"""What transformers' configuration calls it, and ``attn_implementation`` may."""

_NOT_OURS = ("position_bias", "cache", "softcap")
"""Arguments of transformers' own function with which a step is left to it."""


def _grouped(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Outputs (B, T, H, value width) of queries (B, H, T, D), keys and values (B, key heads, tokens, width)."""
    batch, heads, rows, _ = query.shape
    groups = heads // key.shape[1]
    per_head = attention_mask is not None and attention_mask.shape[1] != 1
    twice = groups == 1 and key.shape[-1] == value.shape[-1]  # two equal rows are still faster than one
    if rows > 1 or per_head or (groups == 1 and not twice) or any(others.get(name) is not None for name in _NOT_OURS):
        given = {"dropout": dropout, "scaling": scaling} | others
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given)
    side_by_side = query.expand(-1, -1, 2, -1) if twice else query.reshape(batch, heads // groups, groups, -1)
    out = F.scaled_dot_product_attention(side_by_side, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling)
    return (out[:, :, :1] if twice else out).reshape(batch, 1, heads, -1).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(GROUPED, _grouped)
ALL_MASK_ATTENTION_FUNCTIONS.register(GROUPED, sdpa_mask)


def group_heads(model: PreTrainedModel, grouped: bool) -> None:
    """Have a built model attend so or not, where transformers has chosen ``"sdpa"`` for its text.

    Not asked for while it is built: some families look up classes by the name then.
    """
    text = model.config.get_text_config()
    if text._attn_implementation in ("sdpa", GROUPED):
        text._attn_implementation = GROUPED if grouped else "sdpa"
