"""What to keep in memory: cache policies, the loop that serves a demand set, and the lab around them."""

from __future__ import annotations

from swapless.registry import Registry

POLICIES = Registry(
    "policy",
    "swapless.policies",
    {
        "lru": "swapless.cache.lru:Lru",
        "lfu": "swapless.cache.lfu:Lfu",
    },
)
