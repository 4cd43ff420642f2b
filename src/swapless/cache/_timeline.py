"""The compiled timeline: the replay's loop with a clock, a link and a staging area for what was read ahead."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from swapless.cache._loop import gather
from swapless.cache.compiled import compiled, compiled_apart
from swapless.cache.pace import computed, landed
from swapless.cache.policy import on_document, on_scores
from swapless.cache.serve import serve


class Costs(NamedTuple):
    """Seconds: ``transfer_s`` one expert over the link, ``fixed_s`` a read's other time, ``attention_s`` and ``shared_s`` a
    block, ``expert_s`` one expert, ``landing_s`` what one that is waited for costs besides; ``depth`` reads in flight;
    ``pace`` of compute beside reads and ``reading`` of reads beside compute, 1 if neither disturbs the other."""

    transfer_s: float
    fixed_s: float
    depth: int
    attention_s: float
    shared_s: float
    expert_s: float
    landing_s: float
    pace: float
    reading: float


class Ahead(NamedTuple):
    """Reading ahead. ``levels`` uint8 (rows, L, E) how likely each expert is, or (0, 0, 0); ``lead``, ``width`` int64 (1,);
    ``pass_s`` float64 (1,) seconds of one prediction.

    ``asked``, ``used`` int64 (256,): of each level, experts that were not resident when their MoE layer came, and those of
    them that it used. ``queue`` int64 (n,) keys and ``queued`` uint8 (n,) their levels, from place ``ends[0]`` to ``ends[1]``,
    int64 (2,). ``staged`` int64 (slots,) keys or -1, ``lands`` float64 (slots,) when each is there.
    """

    levels: np.ndarray
    lead: np.ndarray
    width: np.ndarray
    pass_s: np.ndarray
    asked: np.ndarray
    used: np.ndarray
    queue: np.ndarray
    queued: np.ndarray
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
def _want(levels: Any, num_experts: int, moe_layer: int, slot_of_key: Any, ahead: Any) -> None:
    """Queue the ``width`` likeliest experts of a MoE layer that are not resident, the likeliest first."""
    first = end = ahead.ends[1]
    for expert in range(num_experts):
        key = moe_layer * num_experts + expert
        level = levels[moe_layer, expert]
        if level == 0 or slot_of_key[key] >= 0:
            continue
        place = end
        while place > first and ahead.queued[place - 1] < level:
            place -= 1
        if place - first == ahead.width[0]:
            continue
        end = min(end + 1, first + ahead.width[0])
        for behind in range(end - 1, place, -1):
            ahead.queue[behind] = ahead.queue[behind - 1]
            ahead.queued[behind] = ahead.queued[behind - 1]
        ahead.queue[place] = key
        ahead.queued[place] = level
    ahead.ends[1] = end


@compiled_apart
def _learn(levels: Any, num_experts: int, moe_layer: int, experts: Any, slot_of_key: Any, ahead: Any) -> None:
    """Before a demand set is served: what each level of its MoE layer came to, of the experts that are not resident."""
    base = moe_layer * num_experts
    for expert in range(num_experts):
        if slot_of_key[base + expert] < 0:
            ahead.asked[levels[moe_layer, expert]] += 1
    for i in range(len(experts)):
        if slot_of_key[base + experts[i]] < 0:
            ahead.used[levels[moe_layer, experts[i]]] += 1


@compiled_apart
def _read_ahead(now: float, demand: float, link: float, moe_layer: int, num_experts: int, costs: Any, ahead: Any) -> float:
    """Use the idle link from ``now`` for what is foreseen from ``moe_layer`` on; ends what it begins. Returns when it is free.

    ``demand`` is when the next demand read may come. A read that begins before it saves the part until then if it is wanted,
    and costs the rest, by which it holds demand reads up, if it is not. It is begun if the first, times its chance, is more.
    """
    read = costs.fixed_s + costs.transfer_s / costs.reading
    while ahead.ends[0] < ahead.ends[1] and ahead.queue[ahead.ends[0]] < moe_layer * num_experts:
        ahead.ends[0] += 1  # gone past already
    start = max(link, now)
    while start < demand:
        free = best = -1
        for place in range(ahead.staged.size):
            if ahead.staged[place] < 0:
                free = place
                break
        for place in range(ahead.ends[0], ahead.ends[1]):
            if best < 0 or ahead.queued[place] > ahead.queued[best]:
                best = place
        if free < 0 or best < 0:
            break
        level = ahead.queued[best]
        chance = ahead.used[level] / (ahead.asked[level] + 1.0)
        early = min(read, demand - start)
        if chance * early <= (1.0 - chance) * (read - early):
            break
        link = start = start + read
        ahead.staged[free] = ahead.queue[best]
        ahead.lands[free] = link
        ahead.ends[1] -= 1
        for place in range(best, ahead.ends[1]):
            ahead.queue[place] = ahead.queue[place + 1]
            ahead.queued[place] = ahead.queued[place + 1]
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
    landings: Any,
    clock: Any,
    times: Any,
) -> None:
    """Run the calls ``first_call .. end_call - 1``; ``clock`` float64 (2,) holds the time and when the link is free.

    ``landings`` float64 (E,) is room for the landing times of one demand set.
    """
    b = buffers
    layers = ids.shape[1]
    now, link = clock[0], clock[1]
    for c in range(first_call, end_call):
        if begins[c]:
            on_document(state, residency)
        begun = now
        compute = 0.0
        foresee = ahead.levels.shape[0] > 0 and starts[c + 1] - starts[c] == 1
        row = rows[starts[c]]
        if foresee:
            ahead.ends[0] = 0
            ahead.ends[1] = 0
            compute += ahead.pass_s[0]
            now += ahead.pass_s[0]
            for target in range(min(layers, ahead.lead[0])):
                _want(ahead.levels[row], num_experts, target, residency.slot_of_key, ahead)
            link = _read_ahead(now, now + costs.attention_s, link, 0, num_experts, costs, ahead)
        for moe_layer in range(layers):
            now += costs.attention_s
            if scores.shape[0] > 0:
                for i in range(starts[c], starts[c + 1]):
                    on_scores(state, residency, moe_layer, scores[i - starts[first_call], moe_layer])
            n = gather(ids, moe_layer, rows, starts[c], starts[c + 1], num_experts, b)
            experts = b.experts[:n]
            if foresee:
                _learn(ahead.levels[row], num_experts, moe_layer, experts, residency.slot_of_key, ahead)
            serve(state, residency, moe_layer, num_experts, experts, np.int64(phase[c]), False, b.hit, b.slot, b.wave)
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
                    issued = now if misses < costs.depth else max(now, landings[misses - costs.depth])
                    link = max(link, issued + costs.fixed_s) + costs.transfer_s
                    there = link
                    times.reads[c] += 1
                    landings[misses] = there
                    misses += 1
                    continue
                # What was read ahead is computed with the residents, or when it lands.
                if there > now:
                    landings[misses] = there
                    misses += 1
                else:
                    hits += 1
            for place in range(ahead.staged.size):
                if ahead.staged[place] >= 0 and ahead.staged[place] // num_experts <= moe_layer:
                    ahead.staged[place] = -1
                    times.wasted[c] += 1
                    times.ahead[c] += 1
            target = moe_layer + ahead.lead[0]  # a prediction for it may use the routing of this MoE layer
            predicting = ahead.pass_s[0] if foresee and target < layers else 0.0
            busy = computed(now, predicting + costs.shared_s + hits * costs.expert_s, link, costs.pace, costs.reading)
            link = landed(link, now, busy, costs.reading)
            for i in range(misses):
                landings[i] = landed(landings[i], now, busy, costs.reading)
            for i in range(misses):
                soonest = i
                for j in range(i + 1, misses):
                    if landings[j] < landings[soonest]:
                        soonest = j
                there = landings[soonest]
                landings[soonest] = landings[i]
                landings[i] = there
                resumed = max(busy, there)
                busy = computed(resumed, costs.landing_s + costs.expert_s, link, costs.pace, costs.reading)
                link = landed(link, resumed, busy, costs.reading)
                for j in range(i + 1, misses):
                    landings[j] = landed(landings[j], resumed, busy, costs.reading)
            if foresee and moe_layer + 1 < layers:
                if target < layers:
                    _want(ahead.levels[row], num_experts, target, residency.slot_of_key, ahead)
                link = _read_ahead(now + predicting, busy + costs.attention_s, link, moe_layer + 1, num_experts, costs, ahead)
            compute += predicting
            compute += costs.attention_s + costs.shared_s + n * costs.expert_s
            now = busy
        times.compute_s[c] = compute
        times.stall_s[c] = now - begun - compute
        times.end_s[c] = now
    clock[0] = now
    clock[1] = link
