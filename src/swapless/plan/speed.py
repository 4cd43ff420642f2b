"""How long a token takes: compute and reads of each MoE layer laid side by side as the engine does it.

A MoE layer's misses are read one after the other over one link while its residents are computed; what has landed when the
computation is free again is computed in one call. That is the timeline's rule (``cache/timeline``) for a layer by itself, so a
share of layers with so many hits and so many misses says all, whether it was counted in a replay or follows from a hit rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

GATE_RECALL = 0.8
"""Share of the next MoE layer's experts that its router names when asked early: 0.74 to 0.89 were measured, at leads of two and
one (``docs/log.md``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What a token is made of, on one machine.

    Parameters
    ----------
    num_moe_layers, top_k : int
        L and K.
    other_s : float
        Seconds a token beside experts and reads.
    expert_s, lone_expert_s : float
        Seconds of an expert, computed with others or by itself.
    miss_s : float
        Seconds the engine is busy about an expert that is missing, read and product aside.
    read_bytes : int
        Bytes fetched for one expert.
    parts : int
        Reads that one expert is cut into.
    bytes_per_s : mapping of int to float
        Bandwidth by reads in flight, the copy of an expert that needs one included.
    link_bytes_per_s : float, optional
        Bandwidth of the link alone, which bounds everything; by default the best of those.
    ahead_s : float
        Seconds a token of foreseeing, where there is reading ahead.
    least_compute_s : float, optional
        The least that the compute of a token can take; by default what it usually takes.
    """

    num_moe_layers: int
    top_k: int
    other_s: float
    expert_s: float
    lone_expert_s: float
    read_bytes: int
    parts: int
    bytes_per_s: Mapping[int, float]
    link_bytes_per_s: float | None = None
    miss_s: float = 0.0
    ahead_s: float = 0.0
    least_compute_s: float | None = None

    def at(self, bytes_per_s: float) -> Costs:
        """The same with this bandwidth at the most reads in flight, and all others in proportion."""
        share = bytes_per_s / self.bytes_per_s[max(self.bytes_per_s)]
        return replace(
            self,
            bytes_per_s={depth: share * rate for depth, rate in self.bytes_per_s.items()},
            link_bytes_per_s=None if self.link_bytes_per_s is None else share * self.link_bytes_per_s,
        )

    def reading_s(self, misses: float) -> float:
        """Seconds an expert's read takes by itself, where so many are asked for at once."""
        flight = misses * self.parts
        depth = max((depth for depth in self.bytes_per_s if depth <= flight), default=min(self.bytes_per_s))
        return self.read_bytes / self.bytes_per_s[depth]

    def together_s(self, experts: int) -> float:
        """Seconds of so many experts in one call: what is measured for one and for K, and a straight line between them."""
        if experts < 2 or self.top_k < 2:
            return experts * self.lone_expert_s
        more_s = (self.top_k * self.expert_s - self.lone_expert_s) / (self.top_k - 1)
        return self.lone_expert_s + (experts - 1) * more_s

    def layer_s(self, hits: int, misses: int) -> float:
        """Seconds of one MoE layer's experts, from the moment they are known."""
        read = self.reading_s(misses)
        landings = [(number + 1) * read for number in range(misses)]
        busy = self.together_s(hits) + misses * self.miss_s
        while landings:
            begun = max(busy, landings[0])
            there = sum(landing <= begun for landing in landings)
            busy, landings = begun + self.together_s(there), landings[there:]
        return busy


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """A token that was timed with made hits and misses, real products and real reads (``plan/rehearsal``).

    ``misses`` is what was made, float64 (K + 1,) as in :func:`speed`; ``bytes_per_s`` the bandwidth that was probed meanwhile.
    """

    token_s: float
    misses: np.ndarray
    bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Expected time of a token, and the least that it could be.

    ``floor_s`` is the larger of computing everything at the best pace and of reading the bytes at the best bandwidth.
    """

    token_s: float
    floor_s: float
    compute_s: float
    bytes_a_token: float

    @property
    def tokens_per_s(self) -> float:
        """Expected tokens a second."""
        return 1 / self.token_s

    @property
    def most_tokens_per_s(self) -> float:
        """Tokens a second that the floor allows."""
        return 1 / self.floor_s


def binomial(top_k: int, hit_rate: float) -> np.ndarray:
    """Chance of 0 to K misses of a MoE layer and token whose requests each hit with ``hit_rate``: float64 (K + 1,)."""
    miss = 1 - hit_rate
    return np.array([math.comb(top_k, m) * miss**m * hit_rate ** (top_k - m) for m in range(top_k + 1)])


def speed(costs: Costs, misses: np.ndarray, rehearsal: Rehearsal | None = None) -> Speed:
    """What a token takes.

    Parameters
    ----------
    costs : Costs
        Of its parts.
    misses : float64 ndarray of shape (K + 1,)
        Share of (token, MoE layer) pairs with 0 to K misses; they sum to 1.
    rehearsal : Rehearsal, optional
        Of about such a token: then the costs only say what the differences between it and this one make.
    """
    return _speed(costs, _expected_s(_plain_s, costs, misses, rehearsal), costs.num_moe_layers * _mean(misses))


def speed_ahead(
    costs: Costs,
    misses: np.ndarray,
    recall: float = GATE_RECALL,
    *,
    rehearsal: Rehearsal | None = None,
    without: Rehearsal | None = None,
) -> Speed:
    """The same with the next MoE layer's experts foreseen and read while the link is idle.

    An estimate: of what is missing, the share ``recall`` is foreseen, and so many of the reads begin ahead as fit into the time
    in which nothing is read on demand; those foreseen in vain take the same time and bytes. Foreseeing itself takes its time. A
    run goes without where that is faster, for which ``without`` is a rehearsal.
    """

    def ahead_s(costs: Costs, misses: np.ndarray) -> float:
        _, spread = _read_ahead(costs, misses, recall)
        return costs.other_s + costs.ahead_s + costs.num_moe_layers * _experts_s(costs, spread)

    token_s = _expected_s(_plain_s, costs, misses, without)
    if not _mean(misses):
        return _speed(costs, token_s, 0.0)
    ahead, _ = _read_ahead(costs, misses, recall)
    token_s = min(token_s, _expected_s(ahead_s, costs, misses, rehearsal))
    return _speed(costs, token_s, costs.num_moe_layers * (_mean(misses) + ahead * (1 - recall)))


def _expected_s(
    model: Callable[[Costs, np.ndarray], float], costs: Costs, misses: np.ndarray, rehearsal: Rehearsal | None
) -> float:
    if rehearsal is None:
        return model(costs, misses)
    return rehearsal.token_s + model(costs, misses) - model(costs.at(rehearsal.bytes_per_s), rehearsal.misses)


def _plain_s(costs: Costs, misses: np.ndarray) -> float:
    return costs.other_s + costs.num_moe_layers * _experts_s(costs, misses)


def _experts_s(costs: Costs, misses: np.ndarray) -> float:
    return float(sum(share * costs.layer_s(costs.top_k - count, count) for count, share in enumerate(misses.tolist())))


def _read_ahead(costs: Costs, misses: np.ndarray, recall: float) -> tuple[float, np.ndarray]:
    """Reads a MoE layer that begin ahead, and the misses that are left."""
    missing = _mean(misses)
    read_s = costs.reading_s(missing)
    idle_s = max(0.0, _plain_s(costs, misses) / costs.num_moe_layers - missing * read_s)
    ahead = min(missing, idle_s / read_s)
    rate = 1 - (missing - ahead * recall) / costs.top_k
    return ahead, binomial(costs.top_k, min(1.0, rate))


def _mean(misses: np.ndarray) -> float:
    return float(np.sum(misses * np.arange(len(misses))))


def _speed(costs: Costs, token_s: float, reads: float) -> Speed:
    nbytes = reads * costs.read_bytes
    compute_s = costs.other_s + costs.num_moe_layers * costs.top_k * costs.expert_s
    reading_s = nbytes / (costs.link_bytes_per_s or max(costs.bytes_per_s.values()))
    floor_s = max(compute_s if costs.least_compute_s is None else costs.least_compute_s, reading_s)
    return Speed(token_s=max(token_s, floor_s), floor_s=floor_s, compute_s=compute_s, bytes_a_token=nbytes)
