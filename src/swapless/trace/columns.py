"""Columns in the forms people have them, brought into the one form that a trace keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from swapless.errors import TraceValueError, message
from swapless.notation import Phase

if TYPE_CHECKING:
    import pyarrow as pa

_PHASES = {phase.label: int(phase) for phase in Phase} | {int(phase): int(phase) for phase in Phase}


def phase_codes(phase: Any, num_tokens: int) -> np.ndarray:
    """int8 codes of one phase for all tokens, or of a sequence of phases.

    Raises
    ------
    TraceValueError
        A phase other than prefill and decode, or a sequence of another length.
    """
    if isinstance(phase, (str, int)):
        return np.full(num_tokens, _phase_code(phase, None), np.int8)
    values = np.asarray(phase)
    if values.ndim != 1:
        raise TraceValueError(message("phase must be one value or one a token.", got=values.shape))
    names, inverse = np.unique(values, return_inverse=True)
    codes = np.array([_phase_code(name, int(np.argmax(inverse == i))) for i, name in enumerate(names.tolist())], np.int8)
    return codes[inverse] if len(codes) else np.zeros(0, np.int8)


def _phase_code(value: str | int, row: int | None) -> int:
    if value not in _PHASES:
        where = None if row is None else f"row {row}"
        raise TraceValueError(message("Unknown phase.", where=where, got=repr(value), allowed="prefill, decode"))
    return _PHASES[value]


def domain_codes(domain: str | Sequence[str | None] | None, num_tokens: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """int32 codes (-1 = no label) and the names in order of first appearance."""
    if domain is None:
        return np.full(num_tokens, -1, np.int32), ()
    if isinstance(domain, str):
        return np.zeros(num_tokens, np.int32), (domain,)
    names: dict[str, int] = {}
    codes = np.empty(len(domain), np.int32)
    for row, name in enumerate(domain):
        if name is not None and not isinstance(name, str):
            raise TraceValueError(message("A domain must be a text or None.", where=f"row {row}", got=repr(name)))
        codes[row] = -1 if name is None else names.setdefault(str(name), len(names))
    return codes, tuple(names)


def positions(document: np.ndarray) -> np.ndarray:
    """Positions counted from 0 within each document, in row order."""
    order = np.argsort(document, kind="stable")
    ordered = document[order]
    first = np.searchsorted(ordered, ordered, side="left")
    counted = np.empty(len(document), np.int32)
    counted[order] = np.arange(len(document)) - first
    return counted


def token_array(token: Sequence[str | None] | pa.Array) -> pa.Array:
    """Token texts as one Arrow array."""
    import pyarrow as pa

    if isinstance(token, pa.ChunkedArray):
        return token.combine_chunks()
    return token if isinstance(token, pa.Array) else pa.array(token, pa.string())
