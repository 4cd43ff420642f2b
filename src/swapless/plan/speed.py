"""How long a token takes: compute and reads of each MoE layer laid side by side as the engine does it.

A MoE layer's misses are read one after the other over one link while its residents are computed; what has landed when the
computation is free again is computed in one call. That is the timeline's rule (``cache/timeline``) for a layer by itself, so a
share of layers with so many hits and so many misses says all, whether it was counted in a replay or follows from a hit rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from swapless.cache.pace import computed, landed

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
    pace_beside_reads : float
        Share of its speed that compute keeps while reads are under way.
    reading_beside_compute : float
        Share of the bandwidth that reads keep while experts are computed.
    first_read_s : float
        Seconds more that the first read of a MoE layer takes, since the disk had nothing to do before it.
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
    pace_beside_reads: float = 1.0
    reading_beside_compute: float = 1.0
    first_read_s: float = 0.0
    ahead_s: float = 0.0
    least_compute_s: float | None = None

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
        landings = [self.first_read_s + (number + 1) * read for number in range(misses)]
        busy, landings = self._call(0.0, hits, landings, misses * self.miss_s)
        while landings:
            begun = max(busy, landings[0])
            there = sum(landing <= begun for landing in landings)
            busy, landings = self._call(begun, there, landings[there:])
        return busy

    def _call(self, begun: float, experts: int, landings: list[float], more_s: float = 0.0) -> tuple[float, list[float]]:
        """When a call of ``experts`` and ``more_s`` of other work are done, and when what is still being read lands with it."""
        work_s = self.together_s(experts) + more_s
        done = computed.py_func(begun, work_s, max(landings, default=begun), *self._shares)
        return float(done), [float(landed.py_func(landing, begun, done, self._shares[1])) for landing in landings]

    @property
    def _shares(self) -> tuple[float, float]:
        return self.pace_beside_reads, self.reading_beside_compute


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


def speed(costs: Costs, misses: np.ndarray) -> Speed:
    """What a token takes.

    Parameters
    ----------
    costs : Costs
        Of its parts.
    misses : float64 ndarray of shape (K + 1,)
        Share of (token, MoE layer) pairs with 0 to K misses; they sum to 1.
    """
    layers, top_k = costs.num_moe_layers, costs.top_k
    experts_s = sum(share * costs.layer_s(top_k - count, count) for count, share in enumerate(misses.tolist()))
    return _speed(costs, costs.other_s + layers * experts_s, layers * _mean(misses))


def speed_ahead(costs: Costs, misses: np.ndarray, recall: float = GATE_RECALL) -> Speed:
    """The same with the next MoE layer's experts foreseen and read while the link is idle.

    An estimate: of what is missing, the share ``recall`` is foreseen, and so many of the reads begin ahead as fit into the time
    in which nothing is read on demand; those foreseen in vain take the same time and bytes. All of them slow down what is
    computed beside, and foreseeing itself takes its time. A run goes without where that is faster.
    """
    layers = costs.num_moe_layers
    missing = _mean(misses)
    if not missing:
        return speed(costs, misses)
    read_s = costs.reading_s(missing) / costs.reading_beside_compute
    before = speed(costs, misses)
    idle_s = max(0.0, before.token_s / layers - missing * read_s)
    ahead = min(missing, idle_s / read_s)
    left = 1 - ahead * recall / missing
    places = np.arange(len(misses))
    rate = 1 - left * missing / costs.top_k
    spread = binomial(costs.top_k, rate) if left else (places == 0).astype(np.float64)
    experts_s = sum(share * costs.layer_s(costs.top_k - count, count) for count, share in enumerate(spread.tolist()))
    slowed_s = ahead * read_s * (1 - costs.pace_beside_reads)
    token_s = min(before.token_s, costs.other_s + costs.ahead_s + layers * (experts_s + slowed_s))
    return _speed(costs, token_s, layers * (missing + ahead * (1 - recall)))


def _mean(misses: np.ndarray) -> float:
    return float(misses @ np.arange(len(misses)))


def _speed(costs: Costs, token_s: float, reads: float) -> Speed:
    nbytes = reads * costs.read_bytes
    compute_s = costs.other_s + costs.num_moe_layers * costs.top_k * costs.expert_s
    reading_s = nbytes / (costs.link_bytes_per_s or max(costs.bytes_per_s.values()))
    floor_s = max(compute_s if costs.least_compute_s is None else costs.least_compute_s, reading_s)
    return Speed(token_s=max(token_s, floor_s), floor_s=floor_s, compute_s=compute_s, bytes_a_token=nbytes)
