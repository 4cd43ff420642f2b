"""Scores of the published encoder for one piece of a document, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from swapless.predict._network_kernels import add_products, sigmoid_all
from swapless.predict._paper_kernels import add_and_norm, attention, gelu, product, relu


def score_piece(weights: Mapping[str, np.ndarray], words: np.ndarray, *, depth: int, heads: int) -> np.ndarray:
    """Likelihoods float32 (L, T, E) of the tokens ``words`` int64 (T,), which all see each other.

    ``weights`` as :func:`matrices` made them.
    """
    layer_vectors = weights["layer_vectors"]
    layers, tokens, width = len(layer_vectors), len(words), layer_vectors.shape[1]
    enter = weights["enter.weight"]
    text = product(weights["words.weight"][words], enter[: 4 * width], weights["enter.bias"])
    x = np.tile(text, (layers, 1))
    add_products(np.repeat(layer_vectors, tokens, axis=0), enter[4 * width :], x)
    for number in range(depth):
        own: dict[str, Any] = {
            name.removeprefix(f"encoder.layers.{number}."): value
            for name, value in weights.items()
            if name.startswith(f"encoder.layers.{number}.")
        }
        attended = attention(
            x,
            heads,
            own["self_attn.in_proj_weight"],
            own["self_attn.in_proj_bias"],
            own["self_attn.out_proj.weight"],
            own["self_attn.out_proj.bias"],
        )
        add_and_norm(x, attended, own["norm1.weight"], own["norm1.bias"])
        inner = product(x, own["linear1.weight"], own["linear1.bias"])
        relu(inner)
        fed = product(inner, own["linear2.weight"], own["linear2.bias"])
        add_and_norm(x, fed, own["norm2.weight"], own["norm2.bias"])
    inner = product(x, weights["head.0.weight"], weights["head.0.bias"])
    gelu(inner)
    logits = product(inner, weights["head.3.weight"], weights["head.3.bias"])
    sigmoid_all(logits.reshape(-1))
    return logits.reshape(layers, tokens, -1)


def matrices(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The network's arrays with each matrix input by input."""
    kept = ("words.weight", "layer_vectors")
    return {
        name: np.ascontiguousarray(value if value.ndim < 2 or name in kept else value.T, np.float32)
        for name, value in arrays.items()
    }
