"""What to keep in memory: cache policies, the loop that serves a demand set, and the lab around them."""

from __future__ import annotations

from swapless.registry import Registry

DEFAULT_POLICY = "next_use"
"""What the engine runs unless told otherwise; the evidence is in ``docs/log.md``."""

POLICIES = Registry(
    "policy",
    "swapless.policies",
    {
        "activation_aware": "swapless.cache.activation_aware:ActivationAware",
        "arc": "swapless.cache.arc:Arc",
        "belady": "swapless.cache.belady:Belady",
        "belady_bypass": "swapless.cache.belady:BeladyBypass",
        "least_stale": "swapless.cache.least_stale:LeastStale",
        "lfru": "swapless.cache.lfru:Lfru",
        "lfu": "swapless.cache.lfu:Lfu",
        "lfu-perfect": "swapless.cache.lfu:PerfectLfu",
        "lru": "swapless.cache.lru:Lru",
        "next_use": "swapless.cache.next_use:NextUse",
        "s3fifo": "swapless.cache.s3fifo:S3Fifo",
        "score": "swapless.cache.score:Score",
        "slru": "swapless.cache.slru:Slru",
        "static": "swapless.cache.static:Static",
    },
)
