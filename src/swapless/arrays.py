"""What compiled code is given: arrays whose type, shape and range were looked at, at the last Python before it.

Compiled loops do not ask whether an index lies within an array; one that does not reads or writes what belongs to others. Files
are checked where they are read, but an array can be changed after that, and who calls from a program may never have read one.
So each door to a loop asks again, in one pass over the ids that costs a small part of what the loop does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from swapless.compiled import kernel
from swapless.errors import UsageError, message

Axis = int | None


def want(array: Any, name: str, dtype: Any, shape: Sequence[Axis]) -> np.ndarray:
    """``array`` if it is an ndarray of this type and shape.

    Parameters
    ----------
    array : ndarray
        What a loop is to be given.
    name : str
        What the message calls it.
    dtype : dtype, or tuple of them
        The types that the loop takes.
    shape : sequence of int or None
        Length of each axis; None for any.

    Raises
    ------
    UsageError
        It is of another type or shape.

    Examples
    --------
    >>> want(np.zeros((2, 3), np.int16), "expert_ids", np.int16, (2, None)).shape
    (2, 3)
    """
    kinds = tuple(np.dtype(kind) for kind in (dtype if isinstance(dtype, tuple) else (dtype,)))
    if not isinstance(array, np.ndarray) or array.dtype not in kinds:
        got = str(array.dtype) if isinstance(array, np.ndarray) else type(array).__name__
        allowed = "an array of " + " or ".join(map(str, kinds))
        raise UsageError(message(f"{name} has the wrong type.", got=got, allowed=allowed))
    if array.ndim != len(shape) or any(axis not in (None, length) for axis, length in zip(shape, array.shape)):
        allowed = "(" + ", ".join("any" if axis is None else str(axis) for axis in shape) + ")"
        raise UsageError(message(f"{name} has the wrong shape.", got=array.shape, allowed=allowed))
    return array


def want_ids(ids: np.ndarray, num_experts: int, name: str = "expert_ids", *, distinct: bool = True) -> np.ndarray:
    """``ids`` if each is -1 (none) or in [0, E), and no expert stands twice along the last axis.

    Parameters
    ----------
    ids : int16, int32 or int64 ndarray of one axis or more
        Ids of experts, or of experts of all MoE layers together.
    num_experts : int
        E, or L * E.
    name : str
        What the message calls them.
    distinct : bool
        Whether a row may name an expert but once.

    Raises
    ------
    UsageError
        An id that cannot be, with its place.
    """
    want(ids, name, (np.int16, np.int32, np.int64), (None,) * max(1, ids.ndim))
    if not ids.size:
        return ids
    rows = ids.reshape(-1, ids.shape[-1])
    place = _first_wrong(rows, num_experts, np.full(max(num_experts, 0) + 1, -1, np.int64), distinct)
    if place >= 0:
        at = np.unravel_index(place, ids.shape)
        value = int(ids[at])
        twice = -1 <= value < num_experts
        what = f"An id stands twice in a row of {name}." if twice else f"An id of {name} is out of range."
        allowed = "each id once, or -1 for no expert" if twice else f"0 to {num_experts - 1}, or -1 for no expert"
        raise UsageError(message(what, where=f"index {[int(axis) for axis in at]}", got=value, allowed=allowed))
    return ids


@kernel()
def _first_wrong(rows: Any, num_experts: int, last: Any, distinct: bool) -> int:
    for row in range(rows.shape[0]):
        for place in range(rows.shape[1]):
            expert = rows[row, place]
            if expert < -1 or expert >= num_experts:
                return row * rows.shape[1] + place
            if distinct and expert >= 0:
                if last[expert] == row:
                    return row * rows.shape[1] + place
                last[expert] = row
    return -1


def want_offsets(offsets: np.ndarray, rows: int, name: str = "offsets") -> np.ndarray:
    """``offsets`` if they cut ``rows`` rows into parts, one behind the other.

    Parameters
    ----------
    offsets : int64 ndarray of shape (D + 1,)
        First row of each part, and the end of the last.
    rows : int
        How many there are.
    name : str
        What the message calls them.

    Raises
    ------
    UsageError
        They fall, or lie outside of [0, ``rows``].
    """
    want(offsets, name, np.int64, (None,))
    if not len(offsets) or offsets[0] < 0 or offsets[-1] > rows or (np.diff(offsets) < 0).any():
        allowed = f"int64 that do not fall, from 0 to {rows}"
        raise UsageError(message(f"{name} do not cut the rows into parts.", got=offsets[:8].tolist(), allowed=allowed))
    return offsets
