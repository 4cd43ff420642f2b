"""What to keep in memory: cache policies, the loop that serves a demand set, and the lab around them.

A policy of one's own needs ``Policy``, ``rules`` and ``may_go`` from here; see ``docs/add-a-policy.md``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from swapless.registry import Registry, exported

if TYPE_CHECKING:
    from swapless.cache.policy import Policy as Policy
    from swapless.cache.policy import rules as rules
    from swapless.cache.residency import Residency as Residency
    from swapless.cache.residency import may_go as may_go

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

_LAZY = {  # they bring the compiler along
    "Policy": "swapless.cache.policy",
    "Residency": "swapless.cache.residency",
    "may_go": "swapless.cache.residency",
    "rules": "swapless.cache.policy",
}
__all__ = ["DEFAULT_POLICY", "POLICIES", *sorted(_LAZY)]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    return exported(__name__, _LAZY, name)
