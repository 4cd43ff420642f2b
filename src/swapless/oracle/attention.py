"""Causal attention that also shows, to those who ask, how much each token attends to each key."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swapless.oracle.config import OracleMoeConfig
from swapless.oracle.state import OracleCache

__all__ = ["Attention", "attention_mask_of", "head_mean_probabilities"]

_MOST_SCORES = 1 << 24
"""Scores held at once while probabilities are averaged over heads."""


def attention_mask_of(valid_BS: Tensor, tokens: int, device: torch.device) -> Tensor:
    """What each of the last ``tokens`` tokens may attend to: bool (B, 1, N, S). A padding row attends to itself."""
    S = valid_BS.shape[1]
    key, row = torch.arange(S), torch.arange(S - tokens, S)[:, None]
    mask = ((key <= row) & valid_BS[:, None].cpu()) | (key == row)
    return mask[:, None].to(device)


@torch.no_grad()
def head_mean_probabilities(q_BHNd: Tensor, k_BHSd: Tensor, mask: Tensor | None) -> Tensor:
    """Attention probabilities averaged over heads, float32 (B, N, S) on the CPU; keys after a token get 0.

    Computed beside the attention itself, a few rows at a time, so that the fast kernels stay in use for the output.
    """
    B, H, N, d = q_BHNd.shape
    S = k_BHSd.shape[2]
    out_BNS = torch.empty((B, N, S), dtype=torch.float32)
    k_BHdS = k_BHSd.float().transpose(-1, -2) / d**0.5
    rows = max(1, _MOST_SCORES // (B * H * S))
    for begin in range(0, N, rows):
        end = min(N, begin + rows)
        seen = S - N + end  # no row of this piece looks further
        scores = q_BHNd[:, :, begin:end].float() @ k_BHdS[..., :seen]
        if mask is not None:
            scores.masked_fill_(~mask[:, :, begin:end, :seen], -torch.inf)
        elif end - begin > 1:
            later = torch.ones((end - begin, seen), dtype=torch.bool, device=scores.device).triu(S - N + begin + 1)
            scores.masked_fill_(later, -torch.inf)
        out_BNS[:, begin:end, :seen] = scores.softmax(dim=-1).mean(dim=1)
        out_BNS[:, begin:end, seen:] = 0
    return out_BNS


class Attention(nn.Module):
    """Multi-head self-attention with biases.

    Parameters
    ----------
    config : OracleMoeConfig
        Shape; ``attn_implementation`` ``"eager"`` spells out what ``"sdpa"`` computes at once.
    block : int
        Its place in the cache.
    """

    def __init__(self, config: OracleMoeConfig, block: int) -> None:
        super().__init__()
        self.config = config
        self.block = block
        self.heads = config.num_attention_heads
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_BND: Tensor, mask: Tensor | None, cache: OracleCache | None) -> tuple[Tensor, Callable[[], Tensor]]:
        """Output (B, N, D), and a function that computes the head-mean probabilities of this call.

        ``mask`` bool (B, 1, N, S); None where the call is a whole sequence, or a single token, without padding.
        """
        B, N, D = x_BND.shape
        q_BHNd, k_BHSd, v_BHSd = self.qkv_proj(x_BND).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k_BHSd, v_BHSd = cache.update(k_BHSd, v_BHSd, self.block)
        causal = mask is None and N > 1
        if self.config._attn_implementation == "eager":
            scores = q_BHNd @ k_BHSd.transpose(-1, -2) / q_BHNd.shape[-1] ** 0.5
            if causal:
                scores = scores.masked_fill(torch.ones((N, N), dtype=torch.bool, device=scores.device).triu(1), -torch.inf)
            elif mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf)
            y_BHNd = scores.softmax(dim=-1) @ v_BHSd
        else:
            y_BHNd = F.scaled_dot_product_attention(q_BHNd, k_BHSd, v_BHSd, attn_mask=mask, is_causal=causal)
        y_BND = self.out_proj(y_BHNd.transpose(1, 2).reshape(B, N, D))
        q, k = q_BHNd.detach(), k_BHSd.detach()
        return y_BND, lambda: head_mean_probabilities(q, k, mask)
