"""Which budget, slots and precision suit a machine, and the speed to expect: told from headers, nothing loaded."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_LAZY = {
    "CurveHits": "swapless.plan.hits",
    "Machine": "swapless.plan.machine",
    "Plan": "swapless.plan.set_ups",
    "SetUp": "swapless.plan.set_ups",
    "TraceHits": "swapless.plan.hits",
    "machine": "swapless.plan.machine",
    "plan": "swapless.plan.planner",
}
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
