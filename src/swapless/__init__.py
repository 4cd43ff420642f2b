"""Swapless: run Mixture-of-Experts language models in less memory than their weights.

Importing this package imports neither torch nor transformers; :func:`load` does, when it is called.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from swapless.onednn import keep_few

if TYPE_CHECKING:
    from swapless.runtime.model import load as load
    from swapless.trace import Trace as Trace
    from swapless.trace import TraceHeader as TraceHeader

keep_few()  # before the first product, which may not be ours

__version__ = "0.1.0"
__all__ = ["Trace", "TraceHeader", "__version__", "load"]

_LAZY = {"load": "swapless.runtime.model", "Trace": "swapless.trace", "TraceHeader": "swapless.trace"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
