"""The engine: load a model under a byte budget and run it."""

from __future__ import annotations

from typing import Any

from swapless.registry import exported

_LAZY = {
    "CheckpointInfo": "swapless.runtime.open",
    "Stats": "swapless.runtime.stats",
    "describe": "swapless.runtime.open",
    "load": "swapless.runtime.model",
    "verify": "swapless.runtime.verification",
}
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    return exported(__name__, _LAZY, name)
