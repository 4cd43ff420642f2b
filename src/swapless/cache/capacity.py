"""From what a user asks (a share of the experts, or a count) to pools and their slots."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from swapless.errors import CapacityError, UsageError, message

PoolKind = Literal["layer", "shared", "floor"]


class Pools(NamedTuple):
    """Pool of each MoE layer, slots of each pool, the floor a layer, and the capacity as asked for and as given."""

    pool_of_layer: list[int]
    pool_slots: list[int]
    floor: int
    kind: PoolKind
    capacity_experts: int
    capacity_fraction: float

    def less(self, experts: int, top_k: int) -> tuple[Pools, int]:
        """The same capacity with room for ``experts`` experts taken out of its slots, evenly; and how much there was to take.

        Every MoE layer (or a shared pool as a whole) keeps ``top_k`` slots. The capacity that the pools name stays: it is
        what memory holds in all.
        """
        slots = sum(self.pool_slots)
        least = top_k * (1 if self.kind == "shared" else len(self.pool_of_layer))
        taken = max(0, min(experts, slots - least))
        quota, left = divmod(slots - taken, len(self.pool_slots))
        return self._replace(pool_slots=[quota + (place < left) for place in range(len(self.pool_slots))]), taken


def pools_for(capacity: float | int, num_moe_layers: int, num_experts: int, top_k: int, kind: PoolKind = "layer") -> Pools:
    """Pools of one replay.

    Parameters
    ----------
    capacity : float or int
        A float in (0, 1] is a share of the experts, an int a count: experts a MoE layer for the pool kind ``layer``, experts
        in all for ``shared`` and ``floor``.
    num_moe_layers, num_experts, top_k : int
        L, E, K.
    kind : {"layer", "shared", "floor"}
        Equal quotas a MoE layer; one pool for all; one pool in which each layer keeps at least K.

    Returns
    -------
    Pools
        A share that would leave a layer fewer than K is raised to K (``capacity_experts`` says so); a shared pool may be
        smaller than one token's demand.

    Raises
    ------
    CapacityError
        A count below K a layer, above what there is, or a share outside (0, 1].
    UsageError
        An unknown kind.
    """
    if kind not in get_args(PoolKind):
        raise UsageError(message("Unknown kind of pool.", got=repr(kind), allowed="layer, shared, floor"))
    units = 1 if kind == "layer" else num_moe_layers
    most = num_experts * units
    least = {"layer": top_k, "shared": 1, "floor": top_k * num_moe_layers}[kind]
    if isinstance(capacity, bool) or not isinstance(capacity, (int, float)):
        raise CapacityError(message("A capacity must be a share of the experts or a count.", got=repr(capacity)))
    if isinstance(capacity, float):
        if not 0 < capacity <= 1:
            raise CapacityError(message("A capacity given as a share must lie in (0, 1].", got=capacity))
        # The small addend keeps 0.3 * 10 at 3 although the product is 2.9999999999999996.
        slots = max(least, int(capacity * most + 1e-9))
    else:
        slots = capacity
        if not least <= slots <= most:
            where = "experts a MoE layer" if kind == "layer" else "experts in all"
            step = f"One token needs {top_k} experts of every MoE layer at once." if slots < least else None
            raise CapacityError(
                message("The capacity is out of range.", where=where, got=slots, allowed=f"{least} to {most}", step=step)
            )
    if kind == "layer":
        pools, sizes = list(range(num_moe_layers)), [slots] * num_moe_layers
    else:
        pools, sizes = [0] * num_moe_layers, [slots]
    return Pools(pools, sizes, top_k if kind == "floor" else 0, kind, slots, slots / most)
