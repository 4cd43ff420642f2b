"""Hit rates of models that were traced before, for a model of which there is no trace: small tables, figures only.

A curve is known at some capacities between K and E experts a MoE layer. Another model's capacity is placed on it by its share
of the way from K (one token's demand, where a cache begins to keep something) to E (everything).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from importlib.resources import files

import numpy as np

from swapless.errors import UnknownNameError


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Hit rate by capacity of one traced model.

    ``capacity_experts`` ascend from K to E; ``hit_rate`` maps a policy to as many rates.
    """

    model_id: str
    num_experts: int
    top_k: int
    num_moe_layers: int
    tokens: int
    source: str
    capacity_experts: tuple[int, ...]
    hit_rate: dict[str, tuple[float, ...]]

    def rate(self, policy: str, capacity: float, num_experts: int, top_k: int) -> float:
        """Hit rate of a model of ``num_experts`` and ``top_k`` with ``capacity`` experts a MoE layer.

        Below K what is left of the rate at K, in proportion; with all experts resident, 1.

        Raises
        ------
        UnknownNameError
            The policy has no curve.
        """
        if policy not in self.hit_rate:
            raise UnknownNameError.of("policy with a stored curve", policy, self.hit_rate)
        if capacity >= num_experts:
            return 1.0
        first, last = self.capacity_experts[0], self.capacity_experts[-1]
        way = (capacity - top_k) / max(1, num_experts - top_k)
        place = first + max(0.0, way) * (last - first)
        rate = float(np.interp(place, self.capacity_experts, self.hit_rate[policy]))
        return rate * min(1.0, capacity / top_k)


def stored_curves() -> list[Curve]:
    """All curves that come with the package."""
    rows = json.loads(files("swapless.plan").joinpath("curves.json").read_text(encoding="utf-8"))
    return [
        Curve(
            **row
            | {
                "capacity_experts": tuple(row["capacity_experts"]),
                "hit_rate": {name: tuple(rates) for name, rates in row["hit_rate"].items()},
            }
        )
        for row in rows
    ]


def nearest_curve(num_experts: int, top_k: int) -> Curve:
    """The curve of the model that is nearest in E and K, each by its ratio."""

    def distance(curve: Curve) -> float:
        return abs(math.log(num_experts / curve.num_experts)) + abs(math.log(top_k / curve.top_k))

    return min(stored_curves(), key=distance)
