"""What is expected of the set-ups of a checkpoint: products and reads timed form by form, and each set-up played through."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from swapless.plan.hits import Expected
from swapless.plan.hollow import HollowRun, Times
from swapless.plan.products import ColdExperts, expert_time, linear_products
from swapless.plan.reads import Reads
from swapless.plan.rehearsal import rehearse
from swapless.plan.speed import Costs, Rehearsal, Speed, speed, speed_ahead
from swapless.runtime.open import OpenCheckpoint

Products = Mapping[str, Callable[[torch.Tensor], torch.Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """What a set-up's speed follows from.

    Parameters
    ----------
    costs : Costs
        Of the parts of a token.
    hits : Expected
        Of its slots.
    prefetch : str or None
        What is read ahead.
    recall : float
        Share of the next MoE layer's experts that is foreseen then.
    rehearsal : Rehearsal or None
        Of this set-up; None where the weights are not there.
    without : Rehearsal or None
        The same without reading ahead.
    """

    costs: Costs
    hits: Expected
    prefetch: str | None
    recall: float
    rehearsal: Rehearsal | None
    without: Rehearsal | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        found = asdict(self) | {"hits": self.hits._asdict()}
        return dict(json.loads(json.dumps(found, default=np.ndarray.tolist)))

    def speed(self, bytes_per_s: float | None = None, misses: np.ndarray | None = None) -> Speed:
        """What that comes to, where wanted with a bandwidth or misses (float64 (K + 1,)) other than the expected ones."""
        costs = self.costs if bytes_per_s is None else self.costs.at(bytes_per_s)
        misses = self.hits.misses if misses is None else misses
        if self.prefetch is None:
            return speed(costs, misses, self.rehearsal)
        return speed_ahead(costs, misses, self.recall, rehearsal=self.rehearsal, without=self.without)


class Timing:
    """Times the forms of one checkpoint; what two of them have in common, once.

    Parameters
    ----------
    hollow : HollowRun
        Its model without weights.
    module : torch.nn.Module
        One of its experts modules.
    reads : Reads
        Of its experts.
    recall : float
        Share of the next MoE layer's experts that its router foresees.
    """

    def __init__(self, hollow: HollowRun, module: Any, reads: Reads, recall: float) -> None:
        self._hollow, self._module, self._reads, self._recall = hollow, module, reads, recall
        step = hollow.step()
        self._called = step.linears
        self._miss_s = max(0.0, hollow.missing_s() - step.seconds) / (hollow.num_moe_layers * hollow.top_k)
        self._ahead_s = max(0.0, hollow.foreseeing_s() - step.seconds)
        self._linears: dict[int, Products] = {}
        self._others_s: dict[tuple[int, bool], Times] = {}

    def expected(self, form: OpenCheckpoint, hits: Mapping[str | None, Expected]) -> dict[str | None, Expectation]:
        """What is expected of ``form`` with these hits, which are said, as the answers are, by what is read ahead."""
        if not hits:
            return {}
        hollow, dense_bits = self._hollow, form.bits[1]
        if dense_bits not in self._linears:
            self._linears[dense_bits] = linear_products(form, self._called)
        hollow.compute_as(form)
        found: dict[str | None, Expectation] = {}
        with ColdExperts(form) as cold:
            costs = self._costs(form, cold)
            with hollow.computing(self._linears[dense_bits]):
                for prefetch in sorted(hits, key=lambda prefetch: prefetch is not None):
                    rehearsal = self._rehearsal(form, cold, hits[prefetch], prefetch)
                    without = found[None].rehearsal if None in found else rehearsal
                    found[prefetch] = Expectation(
                        costs=costs,
                        hits=hits[prefetch],
                        prefetch=prefetch,
                        recall=self._recall,
                        rehearsal=rehearsal,
                        without=without,
                    )
        return found

    def _costs(self, form: OpenCheckpoint, cold: ColdExperts) -> Costs:
        hollow, same = self._hollow, (form.bits[1], form.rounded)
        if same not in self._others_s:
            with hollow.computing(self._linears[form.bits[1]]):
                self._others_s[same] = hollow.steps_s()
        others, products = self._others_s[same], expert_time(cold, self._module, hollow.experts_s)
        return Costs(
            num_moe_layers=hollow.num_moe_layers,
            top_k=hollow.top_k,
            other_s=others.median,
            expert_s=products.together_s,
            lone_expert_s=products.alone_s,
            miss_s=self._miss_s,
            ahead_s=self._ahead_s,
            least_compute_s=others.least + form.experts_a_token * products.least_s,
            **self._reads.costs(form),
        )

    def _rehearsal(self, form: OpenCheckpoint, cold: ColdExperts, hits: Expected, prefetch: str | None) -> Rehearsal | None:
        traffic = self._reads.traffic(form)
        if traffic is None:
            return None
        return rehearse(
            self._hollow,
            cold,
            traffic,
            self._reads.threads(form),
            hits.misses,
            ahead=prefetch is not None,
            recall=self._recall,
        )
