"""Hit-rate curves of LRU, LFU and Belady's clairvoyant over every cache size, in one pass each.

Three request models: ``snapshot`` judges all references of a token on the state before it and then processes them one by one
(the published definition); ``token`` also pins them, which is what an engine does; ``single`` judges each reference on the
state that it meets. For LRU the first two agree from K experts on. See ``docs/formats/locality.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from swapless.errors import UnknownNameError, UsageError, message
from swapless.trace.capacity import CapacityCurves, Level, Source, StackPass, capacity_curves
from swapless.trace.parallel import Advance, nothing

POLICIES = ("lru", "lfu", "belady")
Requests = Literal["snapshot", "token", "single"]


def hit_rate_curves(
    source: Source,
    policies: Sequence[str] = POLICIES,
    *,
    level: Level = "moe_layer",
    requests: Requests = "snapshot",
    kept: bool = False,
    marks: Sequence[int] = (),
    advance: Advance = nothing,
) -> list[CapacityCurves]:
    """Hit rate of every cache size under each policy.

    Parameters
    ----------
    source : Trace or TraceFile
        What to measure.
    policies : sequence of {"lru", "lfu", "belady"}
        LFU counts all uses so far, those of evicted experts too, and breaks ties by least recent use.
    level : {"moe_layer", "model"}
        One cache of 1..E experts a MoE layer, or one pool of 1..L*E for all.
    requests : {"snapshot", "token", "single"}
        The request model. Under ``token`` a demand set is one token at one MoE layer, at either level, and rates below K
        experts mean nothing: no such cache can hold what is pinned.
    kept : bool
        Carry the cache (and the clairvoyant's view) from one document to the next instead of starting empty.
    marks : sequence of int
        Capacities for which the counts of each document are kept.

    Returns
    -------
    list of CapacityCurves
        One a policy; both conventions for first uses are in each.

    Raises
    ------
    UnknownNameError
        No such policy.
    UsageError
        No such request model, or a mark out of range.

    References
    ----------
    .. [1] R. Mattson et al., "Evaluation techniques for storage hierarchies", IBM Systems Journal 9(2), 1970.
    .. [2] L. Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5(2), 1966.

    Examples
    --------
    >>> from swapless.trace import Trace, TraceHeader
    >>> header = TraceHeader(model_id=None, num_experts=3, top_k=1, moe_blocks=(0,))
    >>> trace = Trace.from_arrays(header, expert_ids=[[[0]], [[1]], [[0]], [[2]]])
    >>> hit_rate_curves(trace, ["lru"])[0].rate("miss")
    array([[0.  , 0.25, 0.25]])
    """
    from swapless.trace.pinned import pinned_hits
    from swapless.trace.stacks import FREQUENCY, NEXT_USE, RECENCY, stack_hits

    rules = {"lru": RECENCY, "lfu": FREQUENCY, "belady": NEXT_USE}
    if requests not in ("snapshot", "token", "single"):
        raise UsageError(message("Unknown request model.", got=repr(requests), allowed="snapshot, token, single"))
    for policy in policies:
        if policy not in rules:
            raise UnknownNameError.of("curve", policy, rules)

    def kernel_of(rule: int) -> StackPass:
        def kernel(refs: np.ndarray, offsets: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
            if requests == "token":
                return pinned_hits(refs, offsets, width, rule=rule, kept=kept)
            return stack_hits(refs, offsets, width, rule=rule, live=requests == "single", kept=kept)

        return StackPass(next(name for name, value in rules.items() if value == rule), kernel)

    passes = [kernel_of(rules[policy]) for policy in policies]
    return capacity_curves(
        source, passes, level=level, marks=marks, kept=kept, demand_sets=requests == "token", advance=advance
    )
