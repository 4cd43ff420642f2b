"""Sliding windows over one MoE layer: how often each expert occurs in every window of a document.

Counting "in how many windows does expert e occur at least a times" needs no histogram update a window: a change of a count at
window s is written once, weighted with the windows still to come. That is 2 K additions a token, whatever E and the window.
"""

from __future__ import annotations

from typing import Any, no_type_check

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
@no_type_check
def windows_at_least(ids: Any, offsets: Any, num_experts: int, window: int, by_expert: Any, by_document: Any) -> None:
    """Add to ``by_expert`` (E, S + 1) and ``by_document`` (D, S + 1) the windows with at least a uses, for a = 1..S.

    ``ids`` is int (T, K), -1 = none. Place 0 is left to the caller: every window has at least none.
    """
    count = np.zeros(num_experts, np.int64)
    for document in range(len(offsets) - 1):
        begin = offsets[document]
        windows = offsets[document + 1] - begin - window + 1
        if windows <= 0:
            continue
        count[:] = 0
        for entering in range(begin, begin + window + windows - 1):
            left = windows - max(0, entering - begin - window + 1)
            if entering >= begin + window:
                for j in range(ids.shape[1]):
                    x = ids[entering - window, j]
                    if x >= 0:
                        by_expert[x, count[x]] -= left
                        by_document[document, count[x]] -= left
                        count[x] -= 1
            for j in range(ids.shape[1]):
                x = ids[entering, j]
                if x >= 0:
                    count[x] += 1
                    by_expert[x, count[x]] += left
                    by_document[document, count[x]] += left


@njit(cache=True, nogil=True)
@no_type_check
def ranked_uses(ids: Any, offsets: Any, width: int, window: int, uses: Any) -> None:
    """Add to ``uses`` (D, width) the uses of the r-th most used expert of each window, summed over windows.

    ``above[v]`` is how many experts are used more than v times: a count that rises from v to v + 1 raises just the place
    ``above[v]`` of the descending order.
    """
    count = np.zeros(width, np.int64)
    above = np.zeros(window + 1, np.int64)
    for document in range(len(offsets) - 1):
        begin = offsets[document]
        windows = offsets[document + 1] - begin - window + 1
        if windows <= 0:
            continue
        count[:] = 0
        above[:] = 0
        for entering in range(begin, begin + window + windows - 1):
            left = windows - max(0, entering - begin - window + 1)
            if entering >= begin + window:
                for j in range(ids.shape[1]):
                    x = ids[entering - window, j]
                    if x >= 0:
                        count[x] -= 1
                        above[count[x]] -= 1
                        uses[document, above[count[x]]] -= left
            for j in range(ids.shape[1]):
                x = ids[entering, j]
                if x >= 0:
                    uses[document, above[count[x]]] += left
                    above[count[x]] += 1
                    count[x] += 1


def check_segments(segments: Any) -> list[int]:
    """Segment lengths in tokens, as a list of ints.

    Raises
    ------
    UsageError
        None, or one that is no int of at least 1.
    """
    from swapless.errors import UsageError, message

    lengths = [segments] if isinstance(segments, (int, np.integer)) else list(segments)
    if not lengths or any(isinstance(m, bool) or not isinstance(m, (int, np.integer)) or m < 1 for m in lengths):
        raise UsageError(message("Segment lengths must be ints of at least 1.", got=repr(segments), allowed="4,16,64,256"))
    return [int(m) for m in lengths]
