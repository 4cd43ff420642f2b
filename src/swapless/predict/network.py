"""The learned predictor's network: a small causal transformer over tokens, then one state that walks the MoE layers.

Shapes: N tokens (documents one after the other), L MoE layers, E experts, D width, H hidden units.

1. *Before the token.* A token's text, its prior, the choices of the token before and fading sums of all before become one
   vector; causal attention over a window of tokens and a hidden layer a MoE layer make D-wide context and base logits.
2. *Through the layers.* The state starts as the context. Each routed MoE layer adds what its choices say, gated by the state
   itself: the residual stream of the model in small.
3. *Reading.* The logits of any later MoE layer are its base logits and a linear reading of the state, tuned by the distance
   between the two. So one network serves every lead, and one pass serves all later layers.

This is the form that is trained. What is asked of a trained one is computed by ``network_scores`` and ``stream``, which are the
same sums in an order that no machine changes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swapless.predict.features import BLOCKS, SCALARS
from swapless.predict.network_shape import NetworkShape
from swapless.predict.vocabulary import MOST_GROUPS


def rms(x: Tensor) -> Tensor:
    """``x`` scaled to a mean square of 1 in its last axis."""
    return F.rms_norm(x, x.shape[-1:])


class Attention(nn.Module):
    """Causal attention over a window of W tokens of the same document, and a feed-forward layer, both residual."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.distance = nn.Parameter(-0.05 * torch.arange(window, dtype=torch.float32).repeat(heads, 1))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, x_ND: Tensor, document_N: Tensor, drop: float) -> Tensor:
        """State after the layer, (N, D)."""
        width, window, heads = x_ND.shape[1], self.window, self.heads
        rows = len(x_ND)
        short = -rows % window
        qkv = F.pad(self.qkv(rms(x_ND)), (0, 0, 0, short))
        blocks = qkv.shape[0] // window
        query, key, value = qkv.view(blocks, window, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        key, value = (torch.cat([F.pad(part, (0, 0, 0, 0, 0, 0, 1, 0))[:-1], part], 2) for part in (key, value))
        document = F.pad(document_N, (0, short), value=-1).view(blocks, window)
        before = torch.cat([F.pad(document, (0, 0, 1, 0), value=-2)[:-1], document], 1)
        back = torch.arange(window)[:, None] + window - torch.arange(2 * window)[None, :]
        seen = (back >= 0) & (back < window) & (document[:, :, None] == before[:, None, :])
        bias = self.distance[:, back.clamp(0, window - 1)].masked_fill(~seen[:, None], float("-inf"))
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        found = found.transpose(1, 2).reshape(-1, width)[:rows]
        x_ND = x_ND + F.dropout(self.out(found), drop, self.training)
        return x_ND + F.dropout(self.down(F.silu(self.up(rms(x_ND)))), drop, self.training)


class Network(nn.Module):
    """See the module's text.

    Parameters
    ----------
    shape : NetworkShape
        Sizes.
    popularity : Tensor of shape (L, E)
        Where the base logits start.
    """

    def __init__(self, shape: NetworkShape, popularity: Tensor) -> None:
        super().__init__()
        self.shape = shape
        layers, experts, width, hidden = shape.num_moe_layers, shape.num_experts, shape.width, shape.hidden
        fed, step, flat = BLOCKS * experts, shape.step_hidden, layers * experts

        def stacked(*sizes: int, fan: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*sizes) * fan**-0.5)

        self.word = nn.Parameter(torch.randn(shape.words, width) * 0.3)
        self.letters = nn.Parameter(torch.randn(shape.buckets + 1, width) * 0.5)
        self.prior = nn.Linear(flat, width, bias=False)
        self.before = nn.Linear(flat, width, bias=False)
        self.faded = nn.Linear(flat, width, bias=False)
        self.scalars = nn.Linear(SCALARS, width)
        for part, gain in ((self.prior, 0.5), (self.before, 1.0), (self.faded, 0.5)):
            nn.init.normal_(part.weight, std=gain * (layers * shape.top_k) ** -0.5)
        self.attention = nn.ModuleList(Attention(width, shape.heads, shape.window) for _ in range(shape.attention_layers))
        # base logits: a linear reading of the blocks, and a hidden layer over blocks and context
        self.base_bias = nn.Parameter(torch.logit(popularity.clamp(1e-4, 1 - 1e-4)).clone())
        direct = torch.zeros(layers, fed, experts)
        for block, weight in enumerate((1.8, 1.8, 1.0)):
            direct[:, block * experts : (block + 1) * experts] = weight * torch.eye(experts)
        self.base = nn.Parameter(direct)
        self.base_in = stacked(layers, fed, hidden, fan=fed)
        self.base_context = stacked(layers, width, hidden, fan=width)
        self.base_hidden = nn.Parameter(torch.zeros(layers, 1, hidden))
        self.base_out = nn.Parameter(torch.zeros(layers, hidden, experts))
        # the walk: what the choices of each layer add to the state
        self.step_state = stacked(layers, width, step, fan=width)
        self.step_choice = stacked(layers, experts, step, fan=shape.top_k)
        self.step_bias = nn.Parameter(torch.zeros(layers, 1, step))
        self.step_out = stacked(layers, step, width, fan=4 * step)
        self.step_direct = stacked(layers, experts, width, fan=4 * shape.top_k)
        # reading: distance 1 to L between the last routed layer and the one asked for
        self.gain = nn.Parameter(torch.ones(layers, width))
        self.shift = nn.Parameter(torch.zeros(layers, width))
        self.read = nn.Parameter(torch.randn(layers, width, experts) * 0.5 * width**-0.5)
        self.near = nn.Parameter(torch.zeros(shape.near, layers, shape.near * experts, experts))

    def context(
        self, words_N: Tensor, groups_N: Tensor, blocks_LNX: Tensor, scalars_NS: Tensor, document_N: Tensor, drop: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """State (N, D) and base logits (L, N, E) before each token.

        ``groups_N`` (N, MOST_GROUPS) letter groups; ``blocks_LNX`` (L, N, BLOCKS*E) the blocks of
        :class:`~swapless.predict.features.Inputs` side by side.
        """
        layers, rows, experts = blocks_LNX.shape[0], blocks_LNX.shape[1], self.shape.num_experts
        parts = blocks_LNX.view(layers, rows, BLOCKS, experts)

        def flat(*blocks: int) -> Tensor:
            picked = parts[:, :, blocks[0]]
            for block in blocks[1:]:
                picked = picked + parts[:, :, block]
            return picked.transpose(0, 1).reshape(rows, -1)

        counted = (groups_N < self.shape.buckets).sum(1, keepdim=True).clamp(min=1)
        letters = F.embedding_bag(groups_N, self.letters, mode="sum", padding_idx=self.shape.buckets) / counted.sqrt()
        text = F.embedding(words_N, self.word) + letters
        x = F.dropout(text, drop, self.training) + self.scalars(scalars_NS)
        x = x + self.prior(flat(0, 1, 2)) + self.before(flat(3)) + self.faded(flat(6))
        for layer in self.attention:
            x = layer(x, document_N, drop)
        hidden = torch.baddbmm(self.base_hidden, blocks_LNX, self.base_in) + torch.matmul(rms(x), self.base_context)
        base = torch.baddbmm(self.base_bias[:, None], blocks_LNX, self.base)
        kept = F.dropout(torch.ones(rows, self.shape.hidden), drop, self.training)  # one mask for all layers
        return x, torch.baddbmm(base, F.silu(hidden) * kept, self.base_out)

    def walk(self, state_ND: Tensor, chosen_LNE: Tensor, drop: float = 0.0) -> Tensor:
        """Normed state before any layer and after each but the last, (L, N, D), from the choices (L, N, E)."""
        kept = F.dropout(torch.ones(len(state_ND), self.shape.step_hidden), drop, self.training)
        # unbind: the gradient of an index would fill and add the whole stack once a layer
        chosen_step = torch.baddbmm(self.step_bias, chosen_LNE, self.step_choice).unbind()
        chosen_direct = torch.bmm(chosen_LNE, self.step_direct).unbind()
        step_state, step_out = self.step_state.unbind(), self.step_out.unbind()
        state, seen = state_ND, [rms(state_ND)]
        for layer in range(self.shape.num_moe_layers - 1):
            inner = F.silu(torch.addmm(chosen_step[layer], seen[-1], step_state[layer])) * kept
            state = torch.addmm(state + chosen_direct[layer], inner, step_out[layer])
            seen.append(rms(state))
        return torch.stack(seen)

    def logits(self, seen_LND: Tensor, base_LNE: Tensor, chosen_LNE: Tensor, known_L: Tensor) -> Tensor:
        """Logits (L, N, E) of every layer l, read from the state after its first ``known_L[l]`` <= l layers."""
        gap = torch.arange(self.shape.num_moe_layers) - known_L  # 0: the layer right below is known
        read = self.gain[gap][:, :, None] * self.read
        base_LNE = base_LNE + torch.bmm(self.shift[gap][:, None], self.read)
        logits = torch.baddbmm(base_LNE, seen_LND.index_select(0, known_L), read)
        for back in range(self.shape.near):  # the choices of the latest known layers, straight into the nearest ones asked for
            near = ((gap < self.shape.near) & (known_L > back)).nonzero().flatten()
            if len(near):
                rows = slice(back * chosen_LNE.shape[2], (back + 1) * chosen_LNE.shape[2])
                added = torch.bmm(chosen_LNE.index_select(0, known_L[near] - 1 - back), self.near[gap[near], near, rows])
                logits = logits.index_add(0, near, added)
        return logits


__all__ = ["MOST_GROUPS", "Attention", "Network", "NetworkShape", "rms"]
