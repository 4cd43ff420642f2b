"""The slow twin of the timeline: LRU caches, one link and a staging area, in plain Python written from the definitions."""

from __future__ import annotations

from collections import defaultdict

from tests.cache.twin import Cache
from tests.cache.twins import Lru


class Link:
    """Carries one expert at a time, first come first served; the fixed time of a read overlaps the transfers before it."""

    def __init__(self, device, expert_bytes, reading):
        self.transfer, self.fixed, self.depth = expert_bytes / device.bytes_per_s, device.fixed_s, device.queue_depth
        self.reading, self.free_at = reading, 0.0

    def demand(self, issued):
        self.free_at = max(self.free_at, issued + self.fixed) + self.transfer
        return self.free_at

    def ahead(self, start):
        self.free_at = start + self.ahead_s
        return self.free_at

    @property
    def ahead_s(self):
        return self.fixed + self.transfer / self.reading


class Reader:
    """Reads ahead: keeps what is foreseen and not yet gone past, what it was worth so far, and what has been read."""

    def __init__(self, foresight, trace, link, room):
        self.levels, self.link, self.width = foresight.levels, link, foresight.width or trace.top_k
        self.room, self.experts = room, trace.num_experts
        self.outcomes, self.foreseen, self.staged = defaultdict(list), [], {}

    def foresee(self, token, layer, resident):
        keys = [layer * self.experts + expert for expert in range(self.experts)]
        known = [(-int(self.levels[token, layer, key % self.experts]), key) for key in keys if key not in resident]
        self.foreseen += [(layer, level, key) for level, key in sorted(known)[: self.width] if level]

    def chance(self, level):
        return sum(self.outcomes[level]) / (len(self.outcomes[level]) + 1)

    def use_idle(self, now, demand, layer):
        self.foreseen = [item for item in self.foreseen if item[0] >= layer]
        while self.foreseen and len(self.staged) < self.room:
            start = max(self.link.free_at, now)
            whole = self.link.ahead_s
            early = min(whole, demand - start)
            best = min(self.foreseen, key=lambda item: item[1])  # of the likeliest the one foreseen first
            p = self.chance(best[1])
            if start >= demand or p * early <= (1 - p) * (whole - early):
                return
            self.foreseen.remove(best)
            self.staged[best[2]] = self.link.ahead(start)

    def learn(self, token, layer, wanted, resident):
        for expert in range(self.experts):
            key = layer * self.experts + expert
            if key not in resident:
                self.outcomes[-int(self.levels[token, layer, expert])].append(key in wanted)


def run_beside(begun, work, ends, block):
    """When ``work`` is done, and when the reads are that end at ``ends`` without it: step by step, from event to event."""
    now, left = begun, {number: end - begun for number, end in enumerate(ends) if end > begun}
    ends = list(ends)
    while left:
        soonest = min(left.values())
        until = min(soonest / block.reading_beside_compute, work / block.pace_beside_reads)
        now, work = now + until, work - until * block.pace_beside_reads
        left = {number: rest - until * block.reading_beside_compute for number, rest in left.items()}
        for number in [number for number, rest in left.items() if rest <= 1e-12]:
            del left[number]
            ends[number] = now
        if work <= 1e-12:
            break
    for number, rest in left.items():
        ends[number] = now + rest
    return (now if work <= 1e-12 else now + work), ends


def slow_timeline(trace, pools, device, block, expert_bytes, foresight=None, room=0):
    """Of each token ``(compute, stall, reads, useful, late, wasted)``; LRU, state kept, a trace without steps."""
    layers, experts = trace.num_moe_layers, trace.num_experts
    cache = Cache(Lru(layers, experts), pools.pool_of_layer, pools.pool_slots, experts)
    link, now, rows = Link(device, expert_bytes, block.reading_beside_compute), 0.0, []
    reader = None if foresight is None else Reader(foresight, trace, link, room)
    lead = 0 if foresight is None else layers if foresight.lead == "token" else foresight.lead
    moments = 1 + max(0, layers - lead)
    for token, ids in enumerate(trace.expert_ids.tolist()):
        begun, compute, reads, useful, late, wasted = now, 0.0, 0, 0, 0, 0
        if reader:
            now += foresight.token_s / moments
            compute += foresight.token_s / moments
            reader.foreseen = []
            for target in range(min(lead, layers)):
                reader.foresee(token, target, cache.slots[pools.pool_of_layer[target]])
            reader.use_idle(now, now + block.attention_s, 0)
        for layer, chosen in enumerate(ids):
            now += block.attention_s
            resident = list(cache.slots[pools.pool_of_layer[layer]])
            wanted = [layer * experts + expert for expert in chosen]
            if reader:
                reader.learn(token, layer, wanted, resident)
            cache.serve(layer, chosen)
            landings, at_once = [], 0
            for key in wanted:
                if key in resident:
                    at_once += 1
                elif reader and key in reader.staged:
                    there = reader.staged.pop(key)
                    if there <= now:
                        useful, at_once = useful + 1, at_once + 1
                    else:
                        late += 1
                        landings.append(there)
                else:
                    waits_for = len(landings) - link.depth
                    landings.append(link.demand(now if waits_for < 0 else max(now, landings[waits_for])))
                    reads += 1
            if reader:
                gone = [key for key in reader.staged if key // experts <= layer]
                wasted += len(gone)
                for key in gone:
                    del reader.staged[key]
            predicting = foresight.token_s / moments if reader and layer + lead < layers else 0.0
            work = predicting + block.shared_s + at_once * block.expert_s
            done, (link.free_at, *landings) = run_beside(now, work, [link.free_at, *sorted(landings)], block)
            while landings:
                begun_at, work = max(done, landings[0]), block.landing_s + block.expert_s
                done, (link.free_at, *landings) = run_beside(begun_at, work, [link.free_at, *landings[1:]], block)
            if reader and layer + 1 < layers:
                if layer + lead < layers:
                    reader.foresee(token, layer + lead, cache.slots[pools.pool_of_layer[layer + lead]])
                reader.use_idle(now + predicting, done + block.attention_s, layer + 1)
            compute += block.attention_s + predicting + block.shared_s + len(chosen) * block.expert_s
            now = done
        rows.append((compute, now - begun - compute, reads, useful, late, wasted))
    return rows
