"""Traces for tests: seeded random ones, and hypothesis strategies that shrink; hypothesis is imported only by those."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from swapless.trace.header import TraceHeader
from swapless.trace.trace import Trace

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = ["random_trace", "traces"]


def random_trace(
    rng: np.random.Generator,
    *,
    num_moe_layers: int = 2,
    num_experts: int = 8,
    top_k: int = 2,
    lengths: tuple[int, ...] = (40, 7),
    inertia: float = 0.7,
    skew: float = 0.5,
    missing: float = 0.0,
    domains: tuple[str, ...] = (),
    **columns: Any,
) -> Trace:
    """Trace whose router scores drift, so that routing is local, imbalanced and full of near ties.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of all randomness.
    lengths : tuple of int
        Tokens of each document.
    inertia : float
        How much of a token's score carries over to the next, in [0, 1); 0 is no locality.
    skew : float
        Standard deviation of each expert's fixed advantage.
    missing : float
        Chance that a place holds no expert (-1).
    domains : tuple of str
        Labels given to the documents in turn.
    **columns
        Further columns, as :meth:`Trace.from_arrays` takes them.
    """
    shape = (num_moe_layers, num_experts)
    header = TraceHeader(model_id="test/random", num_experts=num_experts, top_k=top_k, moe_blocks=tuple(range(num_moe_layers)))
    advantage = rng.normal(size=shape) * skew
    ids = np.empty((sum(lengths), num_moe_layers, top_k), np.int16)
    row = 0
    for length in lengths:
        score = rng.normal(size=shape)
        for _ in range(length):
            score = inertia * score + np.sqrt(1 - inertia**2) * rng.normal(size=shape)
            ids[row] = np.argsort(-(score + advantage), axis=1, kind="stable")[:, :top_k]
            row += 1
    ids[rng.random(ids.shape) < missing] = -1
    document = np.repeat(np.arange(len(lengths)), lengths)
    if domains:
        columns["domain"] = [domains[number % len(domains)] for number in document]
    return Trace.from_arrays(header, expert_ids=ids, document=document, **columns)


def traces(*, max_tokens: int = 40, max_layers: int = 3, max_experts: int = 9) -> SearchStrategy[Trace]:
    """Strategy of small traces: short documents, every K up to E, absent experts and unused places included."""
    from hypothesis import strategies as st

    @st.composite
    def draw_trace(draw: Any) -> Trace:
        experts = draw(st.integers(1, max_experts))
        top_k = draw(st.integers(1, min(4, experts)))
        layers = draw(st.integers(1, max_layers))
        lengths = tuple(draw(st.lists(st.integers(1, max(1, max_tokens // 4)), min_size=1, max_size=4)))
        seed = draw(st.integers(0, 2**32 - 1))
        return random_trace(
            np.random.default_rng(seed),
            num_moe_layers=layers,
            num_experts=experts,
            top_k=top_k,
            lengths=lengths,
            inertia=draw(st.sampled_from((0.0, 0.5, 0.95))),
            skew=draw(st.sampled_from((0.0, 1.0, 3.0))),
            missing=draw(st.sampled_from((0.0, 0.0, 0.2))),
        )

    return draw_trace()
