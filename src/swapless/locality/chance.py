"""What routing without any locality would score: the level that every measure has to be read against.

SRP grows with K / E by itself: a router that draws K of E experts at random reaches 45 % at 16 tokens with K / E = 1/4 and 16 %
with 1/64. Two controls: *uniform* routing of the same E and K (closed forms, or a simulated trace with the same documents),
and the *shuffled* trace (the same tokens in random order: global imbalance stays, locality goes).
"""

from __future__ import annotations

import numpy as np

from swapless.locality.srp import Thresholded, best_threshold
from swapless.trace.capacity import Source
from swapless.trace.header import TraceHeader
from swapless.trace.trace import Trace


def uniform_srp(segment_tokens: int, num_experts: int, top_k: int) -> Thresholded:
    """SRP of uniform random routing: the same formula with uses that follow a binomial of S trials at K / E.

    Examples
    --------
    >>> round(float(uniform_srp(16, 64, 8).value), 3)
    0.321
    """
    chances = _binomial(segment_tokens, top_k, num_experts)
    return best_threshold(np.cumsum(chances[::-1])[::-1])


def floor_srp(num_experts: int, top_k: int) -> float:
    """SRP of the router that keeps every expert on: 2 r / (1 + r) with r = K / E.

    Examples
    --------
    >>> round(floor_srp(64, 8), 4)
    0.2222
    """
    rate = top_k / num_experts
    return 2 * rate / (1 + rate)


def uniform_overlap(num_experts: int, top_k: int) -> float:
    """Expected share of experts that two tokens of uniform routing have in common: K / E."""
    return top_k / num_experts


def uniform_working_set(segment_tokens: int, num_experts: int, top_k: int) -> float:
    """Expected number of different experts in S tokens of uniform routing."""
    return num_experts * uniform_reuse(segment_tokens, num_experts, top_k)


def uniform_reuse(tokens: int, num_experts: int, top_k: int) -> float:
    """Chance that an expert is used within ``tokens`` tokens of uniform routing."""
    never = 1.0
    for _ in range(tokens):  # a product, since powers are rounded in other ways on other machines
        never *= (num_experts - top_k) / num_experts
    return 1 - never


def _binomial(trials: int, top_k: int, num_experts: int) -> np.ndarray:
    """Chances of 0 to ``trials`` successes at K / E, float64: from the likeliest count on, by ratios of neighbours."""
    chances = np.zeros(trials + 1)
    top = min(trials, (trials + 1) * top_k // num_experts)
    chances[top] = 1.0
    for count in range(top, trials):
        chances[count + 1] = chances[count] * ((trials - count) * top_k / ((count + 1) * (num_experts - top_k)))
    for count in range(top, 0, -1):
        chances[count - 1] = chances[count] * (count * (num_experts - top_k) / ((trials - count + 1) * top_k))
    return chances / chances.sum()


def first_documents(source: Source, max_tokens: int) -> Trace:
    """The first whole documents, at most ``max_tokens`` in all (at least one document)."""
    return next(iter(source.pieces(max_tokens)))


def uniform_trace(
    header: TraceHeader, lengths: np.ndarray, *, rng: np.random.Generator, num_moe_layers: int | None = None
) -> Trace:
    """Trace of uniform random routing: K different experts drawn anew for each token and MoE layer, in ascending order.

    Parameters
    ----------
    header : TraceHeader
        E and K, and L unless ``num_moe_layers`` is given (MoE layers are alike, so one often does).
    lengths : int ndarray of shape (D,)
        Tokens of each document.
    """
    layers = num_moe_layers or header.num_moe_layers
    shape = TraceHeader(
        model_id=None,
        num_experts=header.num_experts,
        top_k=header.top_k,
        moe_blocks=tuple(range(layers)),
        source="uniform random routing",
    )
    tokens = int(lengths.sum())
    ids = np.empty((tokens, layers, header.top_k), np.int16)
    for start in range(0, tokens, 2048):
        drawn = rng.random((min(2048, tokens - start), layers, header.num_experts), np.float32)
        chosen = np.argsort(drawn, axis=2, kind="stable")[:, :, : header.top_k]
        ids[start : start + 2048] = np.sort(chosen, axis=2)
    return Trace.from_arrays(shape, expert_ids=ids, document=np.repeat(np.arange(len(lengths)), lengths))


def shuffled_trace(trace: Trace, *, rng: np.random.Generator) -> Trace:
    """The same tokens in random order over documents of the same lengths; all MoE layers of a token stay together."""
    whole = trace.grouped()
    order = rng.permutation(len(whole))
    return Trace.from_arrays(whole.header, expert_ids=whole.expert_ids[order], document=whole.document, position=whole.position)
