"""What makes a trace valid; every refusal names row, MoE layer and value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from swapless.errors import TraceValueError, message
from swapless.notation import NO_EXPERT, Phase

if TYPE_CHECKING:
    from swapless.trace.trace import Trace

_CHUNK_TOKENS = 8192


def integers(values: Any, name: str, dtype: type[np.integer[Any]]) -> np.ndarray:
    """``values`` as an array of ``dtype``, refusing anything that is no integer or would wrap around.

    Raises
    ------
    TraceValueError
        Not integers, ragged, or outside the type's range.
    """
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise TraceValueError(message(f"{name} is ragged.", got=str(error))) from error
    if array.size == 0 and array.dtype.kind == "f":
        array = array.astype(dtype)
    if array.dtype.kind not in "iu":
        raise TraceValueError(message(f"{name} must be integers.", got=str(array.dtype)))
    if array.dtype != dtype:
        limits = np.iinfo(dtype)
        if array.size and (array.min() < limits.min or array.max() > limits.max):
            bad = np.argwhere((array < limits.min) | (array > limits.max))[0]
            what = f"{name} does not fit {np.dtype(dtype).name}."
            raise TraceValueError(message(what, where=f"index {bad.tolist()}", got=array[tuple(bad)]))
        array = array.astype(dtype)
    return array


def check_trace(trace: Trace, first_row: int = 0, before: tuple[int, int] | None = None) -> None:
    """Check shapes and values of a whole trace, or of consecutive rows of a longer one.

    Parameters
    ----------
    trace : Trace
        What to check.
    first_row : int
        Number of its first row in the whole, so that errors name the row that a reader finds.
    before : (int, int), optional
        Document and position of the row before it.

    Raises
    ------
    TraceValueError
        The first thing wrong, with its place.
    """
    _check_shapes(trace)
    if len(trace) == 0:
        raise TraceValueError(message("A trace needs at least one token.", got="0 rows"))
    _check_rows(trace, first_row)
    _check_positions(trace, first_row, before)
    for start in range(0, len(trace), _CHUNK_TOKENS):
        _check_ids(trace.expert_ids[start : start + _CHUNK_TOKENS], trace.num_experts, first_row + start)
        for name in ("gate_weights", "router_scores"):
            values = getattr(trace, name)
            if values is not None:
                _check_no_nan(values[start : start + _CHUNK_TOKENS], name, first_row + start)


def _check_shapes(trace: Trace) -> None:
    num_tokens, num_layers, top_k = len(trace), trace.num_moe_layers, trace.top_k
    wanted: dict[str, tuple[int, ...]] = {
        "expert_ids": (num_tokens, num_layers, top_k),
        "gate_weights": (num_tokens, num_layers, top_k),
        "router_scores": (num_tokens, num_layers, trace.num_experts),
    }
    for name in ("document", "position", "phase", "domain", "token_id", "step", *wanted):
        value, shape = getattr(trace, name), wanted.get(name, (num_tokens,))
        if value is not None and value.shape != shape:
            raise TraceValueError(message(f"{name} has the wrong shape.", got=value.shape, allowed=str(shape)))
    if trace.token is not None and len(trace.token) != num_tokens:
        raise TraceValueError(message("token has the wrong length.", got=len(trace.token), allowed=num_tokens))


def _check_rows(trace: Trace, first_row: int) -> None:
    lowest = {"document": 0, "position": 0, "phase": 0, "domain": -1, "token_id": -1, "step": 0}
    highest = {"phase": len(Phase) - 1, "domain": len(trace.domains) - 1}
    for name, low in lowest.items():
        values = getattr(trace, name)
        if values is None:
            continue
        high = highest.get(name, np.iinfo(np.int32).max)
        if values.min() < low or values.max() > high:
            row = int(np.argmax((values < low) | (values > high)))
            where, allowed = f"row {first_row + row}", f"{low} to {high}"
            raise TraceValueError(message(f"{name} is out of range.", where=where, got=values[row], allowed=allowed))


def _check_positions(trace: Trace, first_row: int, before: tuple[int, int] | None) -> None:
    document, position = trace.document, trace.position.astype(np.int64)
    if before is not None and before[0] == document[0] and position[0] <= before[1]:
        raise _fallen(first_row, *before, int(position[0]))
    order = np.argsort(document, kind="stable")
    bad = (np.diff(document[order]) == 0) & (np.diff(position[order]) <= 0)
    if bad.any():
        above, row = order[int(np.argmax(bad))], order[int(np.argmax(bad)) + 1]
        raise _fallen(first_row + int(row), int(document[row]), int(position[above]), int(position[row]))


def _fallen(row: int, document: int, before: int, got: int) -> TraceValueError:
    where = f"row {row}, document {document}"
    return TraceValueError(message("Positions must rise strictly within a document.", where=where, got=f"{got} after {before}"))


def _check_ids(ids: np.ndarray, num_experts: int, first_row: int) -> None:
    if ids.min() < NO_EXPERT or ids.max() >= num_experts:
        row, layer, place = np.argwhere((ids < NO_EXPERT) | (ids >= num_experts))[0]
        where = f"row {first_row + row}, moe_layer {layer}"
        allowed = f"0 to {num_experts - 1}, or -1 for no expert"
        raise TraceValueError(message("Expert id out of range.", where=where, got=ids[row, layer, place], allowed=allowed))
    for first in range(ids.shape[2]):
        for second in range(first + 1, ids.shape[2]):
            twice = (ids[:, :, first] == ids[:, :, second]) & (ids[:, :, first] != NO_EXPERT)
            if twice.any():
                row, layer = np.argwhere(twice)[0]
                where = f"row {first_row + row}, moe_layer {layer}"
                what = "An expert stands twice among the K of one token."
                step = "Mark unused places with -1."
                raise TraceValueError(message(what, where=where, got=ids[row, layer, first], step=step))


def _check_no_nan(values: np.ndarray, name: str, first_row: int) -> None:
    if np.isnan(values).any():
        row, layer, place = np.argwhere(np.isnan(values))[0]
        where = f"row {first_row + row}, moe_layer {layer}, place {place}"
        raise TraceValueError(message(f"{name} must be numbers.", where=where, got="NaN"))
