"""Slow twins: the cache and every policy once more in plain Python lists, written from their definitions."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np

from tests.cache.twin import Cache, Twin


class Lru(Twin):
    def __init__(self, *shape, **kw):
        super().__init__(*shape, **kw)
        self.order = []

    def access(self, pool, key, hit):
        if key in self.order:
            self.order.remove(key)
        self.order.append(key)

    def worth(self, key, layer):
        return self.order.index(key)


class LeastStale(Lru):
    def __init__(self, *shape, **kw):
        super().__init__(*shape, **kw)
        self.last, self.clock, self.seen = {}, 0, None

    def access(self, pool, key, hit):
        self.last[key] = self.now

    def worth(self, key, layer):
        return (key // self.num_experts > layer, self.last[key])


class Lfu(Twin):
    decay = 0.95

    def __init__(self, *shape, **kw):
        super().__init__(*shape, **kw)
        self.uses, self.at = defaultdict(float), defaultdict(int)

    def access(self, pool, key, hit):
        token = self.tokens[key // self.num_experts]
        self.uses[key] = self.uses[key] * self.decay ** (token - self.at[key]) + 1
        self.at[key] = token

    def worth(self, key, layer):
        # Rounded: the fast one scales by growing gains, and equal counts must stay equal in both.
        return round(self.uses[key] * self.decay ** (max(self.tokens.values()) - self.at[key]), 9)


class PerfectLfu(Lfu):
    decay = 1.0


class Lfru(Twin):
    def __init__(self, *shape, **kw):
        super().__init__(*shape, **kw)
        self.uses, self.last = defaultdict(int), {}

    def access(self, pool, key, hit):
        self.uses[key] += 1
        self.last[key] = self.tokens[key // self.num_experts]

    def worth(self, key, layer):
        return self.uses[key] / (self.tokens[key // self.num_experts] - self.last[key] + 1)


class Static(Twin):
    def __init__(self, *shape, **kw):
        super().__init__(*shape, **kw)
        self.uses = defaultdict(int)

    def access(self, pool, key, hit):
        self.uses[key] += self.tokens[key // self.num_experts] <= 1000

    def worth(self, key, layer):
        return self.uses[key]


class Slru(Twin):
    def __init__(self, *shape, **kw):
        super().__init__(*shape, **kw)
        self.probation, self.protected = defaultdict(list), defaultdict(list)

    def access(self, pool, key, hit):
        if hit:
            for part in (self.probation[pool], self.protected[pool]):
                if key in part:
                    part.remove(key)
            self.protected[pool].append(key)
            if len(self.protected[pool]) > 0.8 * self.cache.pool_slots[pool]:
                self.probation[pool].append(self.protected[pool].pop(0))

    def insert(self, pool, key):
        self.probation[pool].append(key)

    def evict(self, pool, key):
        (self.probation if key in self.probation[pool] else self.protected)[pool].remove(key)

    def victim(self, pool, may, layer):
        slot_of = {key: slot for slot, key in may}
        return next(slot_of[key] for key in self.probation[pool] + self.protected[pool] if key in slot_of)


class S3Fifo(Twin):
    def __init__(self, *shape, **kw):
        super().__init__(*shape, **kw)
        self.small, self.main, self.ghost, self.uses = (defaultdict(list) for _ in range(4))
        self.uses = defaultdict(int)

    def access(self, pool, key, hit):
        if hit:
            self.uses[key] = min(3, self.uses[key] + 1)

    def insert(self, pool, key):
        self.uses[key] = 0
        if key in self.ghost[pool]:
            self.ghost[pool].remove(key)
            self.main[pool].append(key)
        else:
            self.small[pool].append(key)

    def evict(self, pool, key):
        if key in self.small[pool]:
            self.small[pool].remove(key)
            self.ghost[pool] = (self.ghost[pool] + [key])[-self.cache.pool_slots[pool] :]
        else:
            self.main[pool].remove(key)

    def victim(self, pool, may, layer):
        slot_of = {key: slot for slot, key in may}
        small, main = self.small[pool], self.main[pool]
        if len(small) >= max(1, self.cache.pool_slots[pool] // 10):
            for key in list(small):
                if key in slot_of:
                    if self.uses[key] <= 1:
                        return slot_of[key]
                    small.remove(key)
                    main.append(key)
                    self.uses[key] = 0
        place = 0
        while place < len(main):
            key = main[place]
            if key not in slot_of:
                place += 1
            elif self.uses[key] == 0:
                return slot_of[key]
            else:
                self.uses[key] -= 1
                main.append(main.pop(place))
        return next(slot_of[key] for key in small if key in slot_of)


class Arc(Twin):
    def __init__(self, *shape, **kw):
        super().__init__(*shape, **kw)
        self.t1, self.t2, self.b1, self.b2 = (defaultdict(list) for _ in range(4))
        self.target, self.returned = defaultdict(float), defaultdict(bool)

    def access(self, pool, key, hit):
        t1, t2, b1, b2 = self.t1[pool], self.t2[pool], self.b1[pool], self.b2[pool]
        if hit:
            (t1 if key in t1 else t2).remove(key)
            t2.append(key)
            return
        self.returned[pool] = key in b2
        if key in b1:
            self.target[pool] = min(self.cache.pool_slots[pool], self.target[pool] + max(1, len(b2) / len(b1)))
        elif key in b2:
            self.target[pool] = max(0, self.target[pool] - max(1, len(b1) / len(b2)))

    def insert(self, pool, key):
        t1, t2, b1, b2 = self.t1[pool], self.t2[pool], self.b1[pool], self.b2[pool]
        ghost = next((ghosts for ghosts in (b1, b2) if key in ghosts), None)
        if ghost is not None:
            ghost.remove(key)
        (t1 if ghost is None else t2).append(key)
        slots = self.cache.pool_slots[pool]
        while b1 and len(t1) + len(b1) > slots:
            b1.pop(0)
        while b2 and len(t1) + len(t2) + len(b1) + len(b2) > 2 * slots:
            b2.pop(0)

    def evict(self, pool, key):
        if key in self.t1[pool]:
            self.t1[pool].remove(key)
            self.b1[pool].append(key)
        else:
            self.t2[pool].remove(key)
            self.b2[pool].append(key)

    def victim(self, pool, may, layer):
        slot_of = {key: slot for slot, key in may}
        t1, t2 = self.t1[pool], self.t2[pool]
        first = len(t1) > self.target[pool] or (self.returned[pool] and len(t1) == self.target[pool])
        return next(slot_of[key] for key in (t1 + t2 if first else t2 + t1) if key in slot_of)


class Score(Twin):
    def __init__(self, *shape, **kw):
        super().__init__(*shape, **kw)
        self.mean = defaultdict(float)

    def scores(self, layer, scores):
        for expert, score in enumerate(scores):
            key = layer * self.num_experts + expert
            self.mean[key] = 0.9 * self.mean[key] + (1 - 0.9) * float(score)

    def worth(self, key, layer):
        return self.mean[key]


class ActivationAware(Twin):
    def __init__(self, *shape, **kw):
        super().__init__(*shape, **kw)
        self.past, self.running, self.token, self.layer_now = [], defaultdict(int), defaultdict(int), -1

    def document(self):
        if self.running:
            if len(self.past) == 120:
                norm = [math.sqrt(sum(v * v for v in past.values())) for past in self.past]
                like = [sum(self.running[k] * past[k] for k in self.running) / n for past, n in zip(self.past, norm)]
                self.past[like.index(max(like))] = self.running
            else:
                self.past.append(self.running)
        self.running, self.token, self.layer_now = defaultdict(int), defaultdict(int), -1

    def access(self, pool, key, hit):
        if key // self.num_experts < self.layer_now:
            self.token = defaultdict(int)
        self.layer_now = key // self.num_experts
        self.running[key] += 1
        self.token[key] += 1

    def worth(self, key, layer):
        mine = key // self.num_experts
        share = float(self.running[key])
        if self.past:
            norm = [math.sqrt(sum(v * v for v in past.values())) for past in self.past]
            like = [sum(self.token[k] * past[k] for k in self.token) / n for past, n in zip(self.past, norm)]
            near = self.past[like.index(max(like))]
            total = sum(v for k, v in near.items() if k // self.num_experts == mine)
            share = (near[key] + 1e-3) / (total + 1e-3)
        return share * (1.0 - mine / self.num_moe_layers)


class Belady(Twin):
    """``future``: for each key, the rising times of its uses; ``now`` is set by the loop."""

    def next_use(self, key):
        return next((time for time in self.future[key] if time > self.now), math.inf)

    def worth(self, key, layer):
        return -self.next_use(key)


class BeladyBypass(Belady):
    def later_uses(self, key):
        return [*(time for time in self.future[key] if time > self.now), math.inf]

    def worth(self, key, layer):
        return [-time for time in self.later_uses(key)]

    def arrange(self, keys):
        return sorted(keys, key=self.later_uses)

    def admit(self, pool, key, may):
        return self.later_uses(key) < max(self.later_uses(other) for _, other in may)


class NextUse(Twin):
    """The regression with numpy's float32 vectors, in the order of sums that the policy promises, and its account with LRU."""

    def __init__(self, *shape, **kw):
        super().__init__(*shape, **kw)
        layers, experts = self.num_moe_layers, self.num_experts
        self.fades, self.priors = np.float32([0, 0.8, 0.95]), np.float32([0, 0.05, 0.15])
        width = 3 * experts + 1

        def zeros(*shape):
            return [np.zeros(shape, np.float32) for _ in range(layers)]

        self.fed, self.moment, self.cross = zeros(width), zeros(width, width), zeros(experts, width)
        self.trail, self.since, self.weight = zeros(width), zeros(experts, width), zeros(width, experts)
        self.used_at = np.zeros((layers, experts), int)
        self.row, self.learned, self.seen, self.parts, self.last_parts = ([0] * layers for _ in range(5))
        for weight in self.weight:
            for block in range(3):
                weight[block * experts : (block + 1) * experts] = np.eye(experts, dtype=np.float32) * self.priors[block]
        self.frozen = [None] * layers
        self.order, self.followed, self.ahead, self.gained, self.needed = [], False, 0, 0, 48
        self.recent, self.valued = defaultdict(list), defaultdict(list)

    def demand(self, layer, experts):
        count, horizon = self.num_experts, np.float32(0.8)
        fed, trail = self.fed[layer], self.trail[layer]
        fresh = self.seen[layer] != self.tokens[layer]
        if fresh:
            if self.seen[layer]:
                self.learn(layer)
            self.frozen[layer] = None
            if self.parts[layer] > 1:
                self.frozen[layer] = [self.predicted(layer, expert) for expert in range(count)]
            self.last_parts[layer], self.parts[layer] = self.parts[layer], 0
            self.seen[layer] = self.tokens[layer]
        for expert in experts:
            faded = np.float32(1)
            for _ in range(self.learned[layer] - self.used_at[layer][expert]):
                faded *= horizon
            if self.learned[layer] - self.used_at[layer][expert] >= 100:
                faded = np.float32(0)
            self.cross[layer][expert] += trail - faded * self.since[layer][expert]
            self.since[layer][expert] = horizon * trail
            self.used_at[layer][expert] = self.learned[layer] + 1
        for block, fade in enumerate(self.fades):
            part = fed[block * count : (block + 1) * count]
            if fresh:
                part *= np.where(part > np.float32(1e-9), fade, np.float32(0))
            for expert in experts:
                part[expert] += np.sqrt(np.float32(1) - fade)
        fed[-1] = 1
        self.parts[layer] += 1
        if self.parts[layer] < self.last_parts[layer]:
            for expert in experts:
                self.frozen[layer][expert] = self.predicted(layer, expert)
        else:
            self.frozen[layer] = None
        self.compare(layer, [layer * count + expert for expert in experts])

    def learn(self, layer):
        """The token before is whole."""
        count, horizon, ridge = self.num_experts, np.float32(0.8), np.float32(1000)
        fed, trail, moment, cross = self.fed[layer], self.trail[layer], self.moment[layer], self.cross[layer]
        trail[:] = np.where(trail > np.float32(1e-9), horizon * trail, np.float32(0)) + fed
        self.learned[layer] += 1
        for expert in range(count):
            if fed[expert]:
                moment[expert, expert:] += fed[expert:]
        for i in range(count + self.learned[layer] % 4, len(fed), 4):
            moment[i, i:] += np.float32(4) * fed[i] * fed[i:]
        for _ in range(self.parts[layer]):
            row = self.row[layer]
            self.row[layer] = (row + 1) % len(fed)
            solved = cross[:, row].copy()
            if row < len(fed) - 1:
                solved[row % count] += ridge * self.priors[row // count]
            for j in range(len(fed)):
                if j != row:
                    solved -= moment[min(j, row), max(j, row)] * self.weight[layer][j]
            self.weight[layer][row] = solved * (np.float32(1) / (moment[row, row] + ridge))

    def predicted(self, layer, expert):
        value = np.float32(0)
        for j, factor in enumerate(self.fed[layer]):
            if factor:
                value += factor * self.weight[layer][j, expert]
        return value

    def worth(self, key, layer):
        mine = key // self.num_experts
        frozen = self.frozen[mine]
        return frozen[key % self.num_experts] if frozen else self.predicted(mine, key % self.num_experts)

    def compare(self, layer, keys):
        """What LRU and the values would each have hit, before the cache serves these keys."""
        pool = self.cache.pool_of_layer[layer]
        room, recent, valued = self.cache.pool_slots[pool], self.recent[pool], self.valued[pool]
        ours = self.cache.slots[pool] if self.followed else valued
        change = sum((key in ours) - (key in recent) for key in keys)
        if self.followed:
            self.ahead, self.gained = min(0, self.ahead + change), self.gained + change
            if self.ahead <= -16 - 6 * self.num_moe_layers or self.gained <= -32 - self.num_moe_layers:
                self.followed, self.ahead, self.needed = False, 0, 2 * self.needed
                for other, slots in enumerate(self.cache.slots):
                    self.valued[other] = [key for key in slots if key is not None]
            elif self.gained >= self.needed:
                self.needed = max(48, self.needed // 2)
        else:
            self.ahead = max(0, self.ahead + change)
            if self.ahead >= self.needed:
                self.followed, self.ahead, self.gained = True, 0, 0
        self.recent[pool] = ([key for key in recent if key not in keys] + keys)[-room:]
        valued = self.valued[pool]
        if self.followed:
            return
        for key in keys:
            if key not in valued:
                if len(valued) >= room:
                    may = [other for other in valued if other not in keys]
                    if not may:
                        continue
                    valued.remove(min(may, key=lambda other: (self.worth(other, layer), other)))
                valued.append(key)

    def access(self, pool, key, hit):
        self.order = [other for other in self.order if other != key] + [key]

    def victim(self, pool, may, layer):
        if self.followed:
            return super().victim(pool, may, layer)
        return min(may, key=lambda item: self.order.index(item[1]))[0]


TWINS = {
    "activation_aware": ActivationAware,
    "arc": Arc,
    "belady": Belady,
    "belady_bypass": BeladyBypass,
    "least_stale": LeastStale,
    "lfru": Lfru,
    "lfu": Lfu,
    "lfu-perfect": PerfectLfu,
    "lru": Lru,
    "next_use": NextUse,
    "s3fifo": S3Fifo,
    "score": Score,
    "slru": Slru,
    "static": Static,
}


def slow_hits(name, trace, pools, *, single=False):
    """Hits of each (token, MoE layer) of a trace without steps, one list a token."""
    num_moe_layers, num_experts = trace.num_moe_layers, trace.num_experts
    ids = trace.expert_ids.tolist()
    future, time = defaultdict(list), 0
    for row in ids:
        for layer, experts in enumerate(row):
            time += not single
            for expert in experts:
                time += single
                future[layer * num_experts + expert].append(time)
    twin = TWINS[name](num_moe_layers, num_experts, future=future)
    cache = Cache(twin, pools.pool_of_layer, pools.pool_slots, num_experts, pools.floor)
    twin.now, seen, result = 0, set(), []
    for number, row in enumerate(ids):
        document = int(trace.document[number])
        if document not in seen:
            seen.add(document)
            twin.document()
        hits = []
        for layer, experts in enumerate(row):
            if trace.router_scores is not None:
                twin.scores(layer, trace.router_scores[number, layer].astype("float32"))
            twin.tokens[layer] += 1
            hits.append(0)
            for wanted in [[expert] for expert in experts] if single else [experts]:
                twin.now += 1
                hits[-1] += cache.serve(layer, wanted)
        result.append(hits)
    return result
