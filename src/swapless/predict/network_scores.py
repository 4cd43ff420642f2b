"""Scores of the learned predictor for whole documents, by the loops that a stream calls token by token: the same bits."""

from __future__ import annotations

import numpy as np

from swapless.predict._network_kernels import add_products, add_text, attend_all, document_scores
from swapless.predict.features import Inputs
from swapless.predict.network_shape import Weights
from swapless.predict.predictor import Lead, known_layers


def score_document(weights: Weights, inputs: Inputs, groups: np.ndarray, ids: np.ndarray, lead: Lead) -> np.ndarray:
    """Likelihoods float32 (T, L, E) of one document.

    Parameters
    ----------
    weights : Weights
        In single precision.
    inputs : Inputs
        Of the document's tokens.
    groups : int64 ndarray of shape (T, G)
        Letter groups of the tokens' texts, ``buckets`` for none.
    ids : int16 ndarray of shape (T, L, K)
        Routing; a row is used for later rows, and up to what the lead allows for itself.
    lead : int or "token"
        The cut.
    """
    shape, tokens = weights.shape, len(ids)
    flat = inputs.blocks.reshape(len(inputs.blocks), tokens, -1)
    x = np.repeat(weights.bias[None], tokens, axis=0)
    words = np.where(inputs.words < shape.words, inputs.words, 0)
    for t in range(tokens):
        add_text(weights.word[words[t]], weights.letters, groups[t], x[t])
    add_products(inputs.scalars, weights.linear["scalars"], x)
    add_products(flat[0] + flat[1] + flat[2], weights.linear["prior"], x)
    add_products(flat[3], weights.linear["before"], x)
    add_products(flat[6], weights.linear["faded"], x)
    for layer in weights.attention:
        keys, values = rings(weights)
        attend_all(x, keys, values, layer)
    known = np.array([known_layers(layer, lead) for layer in range(shape.num_moe_layers)])
    scores = np.empty((tokens, shape.num_moe_layers, shape.num_experts), np.float32)
    document_scores(x, inputs.blocks, ids, known, weights.base, weights.step, weights.read, scores)
    return scores


def rings(weights: Weights) -> tuple[np.ndarray, np.ndarray]:
    """Empty keys (D, W) and values (W, D) of one attention layer."""
    shape = weights.shape
    return np.zeros((shape.width, shape.window), np.float32), np.zeros((shape.window, shape.width), np.float32)
