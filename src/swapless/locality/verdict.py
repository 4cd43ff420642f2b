"""The measures in words: does this model suit offloading, where is the knee, how many experts a MoE layer are worth holding?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SUITS, SUITS_PARTLY = 0.75, 0.9
"""Miss factors up to which a model suits offloading, or does so in part."""
LEAST_TOKENS, LEAST_USES = 100, 10
"""Fewest tokens that are judged, and how often an expert must be asked for on average: before, first uses decide the curve."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Judgement of one model by its LRU curve against chance.

    Parameters
    ----------
    suits : {"suits", "suits in part", "does not suit", "too few tokens"}
        By the miss factor: up to 0.75, up to 0.9, above; or that the trace is too short for a judgement.
    capacity_experts : int
        The capacity judged at: a quarter of E, at least K.
    hit_rate, chance : float
        LRU with one cache a MoE layer there, and the same for uniform random routing.
    miss_factor : float
        Misses over the misses of random routing: 1 means that a cache gains nothing from this model's routing.
    knee_experts : int
        Where the LRU curve turns: the capacity farthest above the straight line from K to E experts.
    knee_hit_rate : float
        LRU hit rate at the knee.
    clairvoyant : float
        Belady's hit rate at ``capacity_experts``.
    tokens, least_tokens : int or None, int
        Tokens of the trace, and those that a judgement needs.
    """

    suits: str
    capacity_experts: int
    hit_rate: float
    chance: float
    miss_factor: float
    knee_experts: int
    knee_hit_rate: float
    clairvoyant: float
    tokens: int | None
    least_tokens: int

    def sentence(self, num_experts: int) -> str:
        """The judgement as one or two sentences with their figures."""
        words = {
            "suits": "This model suits offloading",
            "suits in part": "This model suits offloading in part",
            "does not suit": "This model does not suit offloading",
            "too few tokens": f"{self.tokens} tokens are too few to say whether this model suits offloading; "
            f"{self.least_tokens} would do. In these",
        }[self.suits]
        return (
            f"{words}: with {self.capacity_experts} of {num_experts} experts a MoE layer in memory, LRU serves "
            f"{self.hit_rate:.1%} of the requests (random routing {self.chance:.1%}, the clairvoyant optimum "
            f"{self.clairvoyant:.1%}), which leaves {self.miss_factor:.2f} of random routing's misses. The curve turns at "
            f"{self.knee_experts} experts a MoE layer ({self.knee_hit_rate:.1%}): hold that many, or more if memory allows."
        )


def judge(lru: np.ndarray, belady: np.ndarray, chance: np.ndarray, *, top_k: int, tokens: int | None = None) -> Verdict:
    """Verdict from hit-rate curves over 1..E experts a MoE layer, each float64 (E,), first uses as misses.

    ``tokens`` is the length of the trace that they are of; None takes it to be long enough.
    """
    experts = len(lru)
    capacity = min(experts, max(top_k, round(experts / 4)))
    factor = _factor(float(lru[capacity - 1]), float(chance[capacity - 1]))
    suits = "suits" if factor <= SUITS else "suits in part" if factor <= SUITS_PARTLY else "does not suit"
    least_tokens = max(LEAST_TOKENS, -(-LEAST_USES * experts // top_k))
    suits = "too few tokens" if tokens is not None and tokens < least_tokens else suits
    knee = knee_of(lru, top_k)
    return Verdict(
        suits=suits,
        capacity_experts=capacity,
        hit_rate=float(lru[capacity - 1]),
        chance=float(chance[capacity - 1]),
        miss_factor=factor,
        knee_experts=knee,
        knee_hit_rate=float(lru[knee - 1]),
        clairvoyant=float(belady[capacity - 1]),
        tokens=tokens,
        least_tokens=least_tokens,
    )


def _factor(rate: float, chance: float) -> float:
    return (1 - rate) / (1 - chance) if chance < 1 else 1.0


def knee_of(curve: np.ndarray, top_k: int) -> int:
    """Capacity at which a curve over 1..E stands farthest above the chord from K to E; K for a straight or short one.

    Examples
    --------
    >>> knee_of(np.array([0.0, 0.5, 0.8, 0.9, 0.95, 1.0]), 1)
    3
    """
    first = min(top_k, len(curve)) - 1
    part = curve[first:]
    if len(part) < 3:
        return first + 1
    chord = part[0] + (part[-1] - part[0]) * np.arange(len(part)) / (len(part) - 1)
    above = part - chord
    return first + 1 + int(np.argmax(np.where(above > 1e-12, above, 0.0)))
