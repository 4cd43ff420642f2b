"""The engine: load a model under a byte budget and run it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_LAZY = {
    "CheckpointInfo": "swapless.runtime.open",
    "Stats": "swapless.runtime.stats",
    "describe": "swapless.runtime.open",
    "load": "swapless.runtime.model",
    "verify": "swapless.runtime.verification",
}
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
