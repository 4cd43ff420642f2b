"""What the slow twins share: a cache in plain Python lists, and the twin of a policy."""

from __future__ import annotations

from collections import defaultdict


class Cache:
    """One demand set after the other, token at once or one at a time; slots are handed out lowest first."""

    def __init__(self, policy, pool_of_layer, pool_slots, num_experts, floor=0):
        self.policy, self.pool_of_layer, self.num_experts, self.floor = policy, pool_of_layer, num_experts, floor
        self.pool_slots = pool_slots
        self.slots = [[None] * slots for slots in pool_slots]
        policy.cache = self

    def layer(self, key):
        return key // self.num_experts

    def held(self, layer):
        return sum(key is not None and self.layer(key) == layer for slots in self.slots for key in slots)

    def serve(self, layer, experts):
        """Hits of one demand set that fits into its pool."""
        pool = self.pool_of_layer[layer]
        slots, base = self.slots[pool], layer * self.num_experts
        self.policy.demand(layer, experts)
        keys = self.policy.arrange([base + expert for expert in experts])
        hits = [key in slots for key in keys]
        pinned = {key for key, hit in zip(keys, hits) if hit}
        for key, hit in zip(keys, hits):
            self.policy.access(pool, key, hit)
            if hit:
                continue
            place = slots.index(None) if None in slots else None
            if place is None:
                may = [
                    (slot, other)
                    for slot, other in enumerate(slots)
                    if other not in pinned
                    and (self.layer(other) == layer or not self.floor or self.held(self.layer(other)) > self.floor)
                ]
                if not may or not self.policy.admit(pool, key, may):
                    continue
                place = self.policy.victim(pool, may, layer)
                self.policy.evict(pool, slots[place])
            slots[place] = key
            pinned.add(key)
            self.policy.insert(pool, key)
        return sum(hits)


class Twin:
    def __init__(self, num_moe_layers, num_experts, future=None):
        self.num_moe_layers, self.num_experts = num_moe_layers, num_experts
        self.tokens = defaultdict(int)  # demand sets a layer
        self.future = future

    def arrange(self, keys):
        return keys

    def demand(self, layer, experts): ...
    def access(self, pool, key, hit): ...
    def insert(self, pool, key): ...
    def evict(self, pool, key): ...
    def document(self): ...
    def scores(self, layer, scores): ...
    def admit(self, pool, key, may):
        return True

    def victim(self, pool, may, layer):
        return min(may, key=lambda item: (self.worth(item[1], layer), item[0]))[0]
