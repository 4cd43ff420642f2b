"""The encoder of MoE-Beyond: every (MoE layer, token) row attends to every other, future tokens and deeper layers included."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PaperNetwork(nn.Module):
    """Linear to the width, post-norm encoder without positions or mask, two-layer head.

    Parameters
    ----------
    words, layers, experts : int
        Vocabulary, L and E.
    width, depth, heads : int
        Of the encoder.
    """

    layer_vectors: Tensor

    def __init__(self, words: int, layers: int, experts: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, 4 * width)
        self.register_buffer("layer_vectors", torch.randn(layers, width))
        self.enter = nn.Linear(5 * width, width)
        one = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.1, activation="relu", batch_first=True)
        self.encoder = nn.TransformerEncoder(one, depth, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Dropout(0.1), nn.Linear(width, experts))

    def forward(self, words_T: Tensor) -> Tensor:
        """Logits (L, T, E) of the tokens of one piece."""
        layers, tokens = len(self.layer_vectors), len(words_T)
        text = self.words(words_T).expand(layers, tokens, -1)
        which = self.layer_vectors[:, None].expand(layers, tokens, -1)
        rows = self.enter(torch.cat([text, which], 2)).view(1, layers * tokens, -1)
        logits: Tensor = self.head(self.encoder(rows))
        return logits.view(layers, tokens, -1)
