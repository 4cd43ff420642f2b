"""A set-up played through for a second: the model without its weights, with real products, real reads, and made hits.

What compute and the read path take from each other has no formula that holds: reader threads want their share of the
processors, both want the memory bus, a disk that had nothing to do wakes up, threads that waited begin cold. So some tokens are
decoded in which as many experts of each MoE layer are missing as the set-up's hits say, by the engine itself.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from swapless.plan.hollow import HollowRun
from swapless.plan.products import ColdExperts
from swapless.plan.speed import Rehearsal
from swapless.plan.traffic import Traffic, bandwidth
from swapless.runtime.ahead import Foreseen, Lookahead
from swapless.runtime.routing import Step

_WARM_UP = 4
_STEPS = 20
"""With those, as many as a run reads ahead before it tries without."""
_PIECE = 5
"""Steps between two probes of the bandwidth."""
_PROBE_S = 0.1


def drawn(misses: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """So many numbers of misses, int64 (count,), each as often as ``misses`` (float64 (K + 1,)) says, to within one."""
    edges = np.round(np.cumsum(misses / misses.sum()) * count).astype(np.int64)
    return rng.permutation(np.searchsorted(edges, np.arange(count), side="right"))


class Places:
    """The blocks that a budget would have, in the memory of a few: each lies somewhere else whenever it was computed.

    Parameters
    ----------
    cold : ColdExperts
        Slots and how experts in them are computed.
    blocks : int
        How many there seem to be.
    """

    def __init__(self, cold: ColdExperts, blocks: int) -> None:
        self.slots = blocks
        self._cold = cold
        self._turn = itertools.cycle(range(cold.pool.slots))
        self._place = list(itertools.islice(self._turn, blocks))

    def bytes_of(self, slot: int) -> np.ndarray:
        """Where the block is now."""
        return self._cold.pool.bytes_of(self._place[slot])

    def compute(self, module: Any, moe_layer: int, blocks: Sequence[int], hidden: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The experts in these blocks, which lie elsewhere from then on."""
        places = [self._place[block] for block in blocks]
        for block in blocks:
            self._place[block] = next(self._turn)
        return self._cold.compute(module, 0, places, hidden)

    def close(self) -> None:
        """The slots are their owner's."""


class Foresight:
    """Asks ``lookahead``, for the time that takes, and names what ``hollow`` wants next, with mistakes.

    Of the experts that are missing the share ``recall`` is named, and others that are missing in place of the rest.
    """

    def __init__(self, lookahead: Lookahead, hollow: HollowRun, recall: float, rng: np.random.Generator) -> None:
        self._lookahead, self._hollow, self._recall, self._rng = lookahead, hollow, recall, rng

    def begin(self, step: Step) -> None:
        """A forward call begins."""
        self._lookahead.begin(step)

    def seen(self, moe_layer: int, ids_TK: torch.Tensor) -> None:
        """The experts of a MoE layer are known."""
        self._lookahead.seen(moe_layer, ids_TK)

    def foresee(self, moe_layer: int, hidden_TD: torch.Tensor | None) -> list[Foreseen]:
        """What will be wanted of the MoE layers that routers can be asked about."""
        return [self._named(found.moe_layer) for found in self._lookahead.foresee(moe_layer, hidden_TD)]

    def _named(self, moe_layer: int) -> Foreseen:
        hollow, named = self._hollow, list[int]()
        others = iter(expert for expert in range(hollow.top_k, hollow.num_experts) if not hollow.resident(moe_layer, expert))
        for expert in range(hollow.top_k):
            right = hollow.resident(moe_layer, expert) or self._rng.random() < self._recall
            named.append(expert if right else next(others, expert))
        return Foreseen(moe_layer, named, len(named))


def rehearse(
    hollow: HollowRun,
    cold: ColdExperts,
    traffic: Traffic,
    threads: int,
    misses: np.ndarray,
    *,
    ahead: bool = False,
    recall: float = 1.0,
) -> Rehearsal:
    """Decode some tokens and time them.

    Parameters
    ----------
    hollow : HollowRun
        The model; its linear layers compute what they were told to.
    cold : ColdExperts
        Experts of the set-up's precision.
    traffic : Traffic
        Reads of that precision.
    threads : int
        Reads in flight.
    misses : float64 ndarray of shape (K + 1,)
        Share of (token, MoE layer) pairs with 0 to K misses.
    ahead : bool
        Whether the next MoE layer's experts are foreseen and read while the link is idle.
    recall : float
        Share of those missing that are foreseen.

    Raises
    ------
    ReadError
        A file changed while it was read.
    """
    rng = np.random.default_rng(0)
    foresight = Foresight(hollow.lookahead, hollow, recall, rng) if ahead else None
    layers = hollow.num_moe_layers
    blocks = hollow.blocks + (hollow.top_k if ahead else 0)
    made = drawn(misses, _STEPS * layers, rng).reshape(_STEPS, layers)
    first = drawn(misses, _WARM_UP * layers, rng).reshape(_WARM_UP, layers)
    places = [cold.pool.bytes_of(slot) for slot in range(cold.pool.slots)]
    probed, seconds = list[float](), list[float]()

    def probe() -> None:
        probed.append(bandwidth(traffic, threads, places, _PROBE_S))

    with hollow.reading(Places(cold, blocks), traffic, threads, foresight) as step:
        for missing in first:
            step(missing, rng)
        probe()
        for number, missing in enumerate(made, start=1):
            seconds.append(step(missing, rng))
            if number % _PIECE == 0:
                probe()
    return Rehearsal(
        token_s=statistics.fmean(seconds),
        misses=np.bincount(made.reshape(-1), minlength=len(misses)) / made.size,
        bytes_per_s=statistics.harmonic_mean(probed),
    )
