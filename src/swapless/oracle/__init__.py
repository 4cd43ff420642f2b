"""Oracle-MoE: a model whose routing follows the theme of the text, so that the same experts stay in use for long stretches.

Importing this package imports no torch; its names do, when they are asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swapless.oracle.config import OracleMoeConfig as OracleMoeConfig
    from swapless.oracle.config import of_size as of_size
    from swapless.oracle.model import OracleMoeForCausalLM as OracleMoeForCausalLM
    from swapless.oracle.model import OracleMoeModel as OracleMoeModel
    from swapless.oracle.model import register as register
    from swapless.oracle.state import OracleCache as OracleCache

__all__ = ["OracleCache", "OracleMoeConfig", "OracleMoeForCausalLM", "OracleMoeModel", "of_size", "register"]

_HOME = {"OracleMoeConfig": "config", "of_size": "config", "OracleCache": "state"}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"swapless.oracle.{_HOME.get(name, 'model')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
