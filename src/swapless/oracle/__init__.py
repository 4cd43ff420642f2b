"""Oracle-MoE: a model whose routing follows the theme of the text, so that the same experts stay in use for long stretches."""

from __future__ import annotations

from swapless.oracle.config import OracleMoeConfig, of_size
from swapless.oracle.model import OracleMoeForCausalLM, OracleMoeModel, register
from swapless.oracle.state import OracleCache

__all__ = ["OracleCache", "OracleMoeConfig", "OracleMoeForCausalLM", "OracleMoeModel", "of_size", "register"]
