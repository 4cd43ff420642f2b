"""Traces made for tests: random, with locality, with scores."""

from __future__ import annotations

import numpy as np

from swapless.trace import Trace, TraceHeader


def made_trace(tokens=120, layers=3, experts=8, top_k=2, documents=3, seed=0, scores=True):
    """Routing in which each expert's popularity drifts, so that policies differ."""
    rng = np.random.default_rng(seed)
    drift = np.cumsum(rng.normal(size=(tokens, layers, experts)), axis=0) * 0.4
    outputs = (drift + rng.gumbel(size=drift.shape)).astype(np.float16)
    ids = np.argsort(-outputs.astype(np.float32), axis=2, kind="stable")[:, :, :top_k].astype(np.int16)
    header = TraceHeader(
        model_id="made",
        num_experts=experts,
        top_k=top_k,
        moe_blocks=tuple(range(layers)),
        hidden_size=8,
        moe_intermediate_size=4,
    )
    document = np.sort(rng.integers(0, documents, tokens)).astype(np.int32)
    return Trace.from_arrays(header, expert_ids=ids, document=document, router_scores=outputs if scores else None)
