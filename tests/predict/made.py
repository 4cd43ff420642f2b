"""Traces with tokens for tests of predictors: routing that depends on the token, on the past and on earlier layers."""

from __future__ import annotations

import numpy as np

from swapless.trace import Trace, TraceHeader

WORDS = ("the", " cat", " sat", " on", " a", " mat", ".", " dog", " ran", " to", " Rome", " 17")


def made_trace(lengths=(30, 17, 1, 40, 26, 33), layers=4, experts=8, top_k=2, seed=0, model_id="made/moe", **columns):
    """Documents of random words whose routing a predictor can learn."""
    rng = np.random.default_rng(seed)
    taste = np.random.default_rng(7).normal(size=(len(WORDS), layers, experts)) * 2
    follow = np.random.default_rng(8).normal(size=(layers, experts, experts))
    tokens = sum(lengths)
    words = rng.integers(0, len(WORDS), tokens)
    document = np.repeat(np.arange(len(lengths)), lengths)
    ids = np.empty((tokens, layers, top_k), np.int16)
    scores = np.empty((tokens, layers, experts), np.float16)
    for t in range(tokens):
        last = np.zeros(experts)
        for layer in range(layers):
            score = taste[words[t], layer] + last @ follow[layer] + rng.gumbel(size=experts) * 0.5
            if t and document[t - 1] == document[t]:
                score[ids[t - 1, layer]] += 0.7
            scores[t, layer] = score
            ids[t, layer] = np.argsort(-score)[:top_k]
            last = np.zeros(experts)
            last[ids[t, layer]] = 1
    header = TraceHeader(model_id=model_id, num_experts=experts, top_k=top_k, moe_blocks=tuple(range(layers)))
    given = {"token": [WORDS[word] for word in words], "router_scores": scores, "document": document, **columns}
    return Trace.from_arrays(header, expert_ids=ids, **given)
