"""The compiled timeline: the replay's loop with a clock, a link and a staging area for what was read ahead."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from swapless.cache._loop import gather
from swapless.cache.compiled import compiled, compiled_apart
from swapless.cache.policy import on_document, on_scores
from swapless.cache.serve import serve


class Costs(NamedTuple):
    """Seconds: ``transfer_s`` one expert over the link, ``fixed_s`` a read's other time, ``attention_s`` and ``shared_s`` a
    block, ``expert_s`` one expert, ``landing_s`` what one that is waited for costs besides; ``depth`` reads in flight."""

    transfer_s: float
    fixed_s: float
    depth: int
    attention_s: float
    shared_s: float
    expert_s: float
    landing_s: float


class Ahead(NamedTuple):
    """What was read ahead. ``scores`` float32 (rows, L, E) or (0, 0, 0); ``lead`` and ``width`` int64 (1,).

    ``wanted`` int64 (n,) a queue of keys, from place ``ends[0]`` to ``ends[1]``, int64 (2,). ``staged``
    int64 (slots,) keys or -1, ``lands`` float64 (slots,) when each is there.
    """

    scores: np.ndarray
    lead: np.ndarray
    width: np.ndarray
    wanted: np.ndarray
    ends: np.ndarray
    staged: np.ndarray
    lands: np.ndarray


class Times(NamedTuple):
    """Of each forward call (N,): float64 ``compute_s``, ``stall_s``, ``end_s``; int64 demand ``reads``, prefetch reads
    ``ahead``, and of those ``useful`` (there in time), ``late`` (still under way) and ``wasted``."""

    compute_s: np.ndarray
    stall_s: np.ndarray
    end_s: np.ndarray
    reads: np.ndarray
    ahead: np.ndarray
    useful: np.ndarray
    late: np.ndarray
    wasted: np.ndarray


@compiled_apart
def _want(row_scores: Any, num_experts: int, moe_layer: int, slot_of_key: Any, ahead: Any) -> None:
    """Queue the ``width`` likeliest experts of a MoE layer that are neither resident nor staged."""
    for _ in range(ahead.width[0]):
        best = -1
        for expert in range(num_experts):
            key = moe_layer * num_experts + expert
            score = row_scores[moe_layer, expert]
            if slot_of_key[key] < 0 and score > 0.0 and (best < 0 or score > row_scores[moe_layer, best]):
                known = False
                for place in range(ahead.ends[0], ahead.ends[1]):
                    known = known or ahead.wanted[place] == key
                for place in range(ahead.staged.size):
                    known = known or ahead.staged[place] == key
                if not known:
                    best = expert
        if best < 0 or ahead.ends[1] == ahead.wanted.size:
            return
        ahead.wanted[ahead.ends[1]] = moe_layer * num_experts + best
        ahead.ends[1] += 1


@compiled_apart
def _read_ahead(now: float, until: float, link: float, moe_layer: int, num_experts: int, costs: Any, ahead: Any) -> float:
    """Use the idle link from ``now`` to ``until`` for what is wanted, ending what was begun. Returns when it is free."""
    while ahead.ends[0] < ahead.ends[1]:
        key = ahead.wanted[ahead.ends[0]]
        start = max(link, now)
        if key // num_experts < moe_layer:  # gone past already
            ahead.ends[0] += 1
            continue
        if start >= until:
            break
        free = -1
        for place in range(ahead.staged.size):
            if ahead.staged[place] < 0:
                free = place
                break
        if free < 0:
            break
        ahead.ends[0] += 1
        link = start + costs.fixed_s + costs.transfer_s
        ahead.staged[free] = key
        ahead.lands[free] = link
    return link


@compiled
def timeline_calls(
    state: Any,
    residency: Any,
    ids: Any,
    scores: Any,
    rows: Any,
    starts: Any,
    phase: Any,
    begins: Any,
    first_call: int,
    end_call: int,
    num_experts: int,
    single: bool,
    buffers: Any,
    costs: Any,
    ahead: Any,
    landed: Any,
    clock: Any,
    times: Any,
) -> None:
    """Run the calls ``first_call .. end_call - 1``; ``clock`` float64 (2,) holds the time and when the link is free.

    ``landed`` float64 (E,) is room for the landing times of one demand set.
    """
    b = buffers
    layers = ids.shape[1]
    now, link = clock[0], clock[1]
    for c in range(first_call, end_call):
        if begins[c]:
            on_document(state, residency)
        begun = now
        compute = 0.0
        foresee = ahead.scores.shape[0] > 0 and starts[c + 1] - starts[c] == 1
        ahead.ends[0] = 0
        ahead.ends[1] = 0
        for moe_layer in range(layers):
            if foresee:
                if moe_layer == 0:
                    for target in range(min(layers, ahead.lead[0])):
                        _want(ahead.scores[rows[starts[c]]], num_experts, target, residency.slot_of_key, ahead)
                link = _read_ahead(now, now + costs.attention_s, link, moe_layer, num_experts, costs, ahead)
            now += costs.attention_s
            if scores.shape[0] > 0:
                for i in range(starts[c], starts[c + 1]):
                    on_scores(state, residency, moe_layer, scores[i - starts[first_call], moe_layer])
            n = gather(ids, moe_layer, rows, starts[c], starts[c + 1], num_experts, b)
            experts = b.experts[:n]
            serve(state, residency, moe_layer, num_experts, experts, np.int64(phase[c]), b.hit, b.slot, b.wave)
            base = moe_layer * num_experts
            misses = 0
            hits = 0
            for i in range(n):
                if b.hit[i]:
                    hits += 1
                    continue
                staged = -1
                for place in range(ahead.staged.size):
                    if ahead.staged[place] == base + experts[i]:
                        staged = place
                if staged >= 0:
                    there = ahead.lands[staged]
                    ahead.staged[staged] = -1
                    if there <= now:
                        times.useful[c] += 1
                    else:
                        times.late[c] += 1
                    times.ahead[c] += 1
                else:
                    issued = now if misses < costs.depth else max(now, landed[misses - costs.depth])
                    link = max(link, issued + costs.fixed_s) + costs.transfer_s
                    there = link
                    times.reads[c] += 1
                    landed[misses] = there
                    misses += 1
                    continue
                # What was read ahead is computed with the residents, or when it lands.
                if there > now:
                    landed[misses] = there
                    misses += 1
                else:
                    hits += 1
            for place in range(ahead.staged.size):
                if ahead.staged[place] >= 0 and ahead.staged[place] // num_experts <= moe_layer:
                    ahead.staged[place] = -1
                    times.wasted[c] += 1
                    times.ahead[c] += 1
            busy = now + costs.shared_s + hits * costs.expert_s
            for i in range(misses):
                soonest = i
                for j in range(i + 1, misses):
                    if landed[j] < landed[soonest]:
                        soonest = j
                there = landed[soonest]
                landed[soonest] = landed[i]
                landed[i] = there
                busy = max(busy, there) + costs.landing_s + costs.expert_s
            if foresee:
                if moe_layer + ahead.lead[0] < layers:  # such a prediction may use the routing of this MoE layer
                    _want(ahead.scores[rows[starts[c]]], num_experts, moe_layer + ahead.lead[0], residency.slot_of_key, ahead)
                link = _read_ahead(now, busy, link, moe_layer + 1, num_experts, costs, ahead)
            compute += costs.attention_s + costs.shared_s + n * costs.expert_s
            now = busy
        times.compute_s[c] = compute
        times.stall_s[c] = now - begun - compute
        times.end_s[c] = now
    clock[0] = now
    clock[1] = link
