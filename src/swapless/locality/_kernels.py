"""Sliding windows over one MoE layer: how often each expert occurs in every window of a document.

Counting "in how many windows does expert e occur at least a times" needs no histogram update a window: a change of a count at
window s is written once, weighted with the windows still to come. That is 2 K additions a token, whatever E and the window.
"""

from __future__ import annotations

from typing import Any, no_type_check

import numpy as np

from swapless.compiled import kernel
from swapless.portable import log


@kernel()
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


@kernel()
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


@kernel()
@no_type_check
def distances(ids: Any, offsets: Any, num_experts: int, counts: Any, gaps: Any) -> None:
    """Add up shared, could-share and all uses in ``counts`` (3), and uses by the tokens since the last one in ``gaps``."""
    last = np.empty(num_experts, np.int64)
    for document in range(len(offsets) - 1):
        last[:] = -1
        for t in range(offsets[document], offsets[document + 1]):
            for j in range(ids.shape[1]):
                x = ids[t, j]
                if x < 0:
                    continue
                counts[2] += 1
                counts[1] += t > offsets[document]
                if last[x] >= 0:
                    gaps[t - last[x] - 1] += 1
                    counts[0] += t - last[x] == 1
                last[x] = t


@kernel()
@no_type_check
def window_balance(ids: Any, offsets: Any, num_experts: int, window: int, logs: Any, sums: Any, covered: Any) -> None:
    """Add variation, entropy and number of windows to ``sums`` (3), and active (window, token) pairs to ``covered`` (E)."""
    count = np.zeros(num_experts, np.int64)
    scale = log(num_experts) if num_experts > 1 else 1.0
    for document in range(len(offsets) - 1):
        begin, end = offsets[document], offsets[document + 1]
        windows = end - begin - window + 1
        if windows <= 0:
            continue
        count[:] = 0
        total = squares = 0
        plogs = 0.0
        for entering in range(begin, end):
            leaving = entering - window
            left = windows - max(0, leaving - begin + 1)
            if leaving >= begin:
                for j in range(ids.shape[1]):
                    x = ids[leaving, j]
                    if x >= 0:
                        covered[x] -= left
                        squares -= 2 * count[x] - 1
                        plogs += logs[count[x] - 1] - logs[count[x]]
                        count[x] -= 1
                        total -= 1
            for j in range(ids.shape[1]):
                x = ids[entering, j]
                if x >= 0:
                    covered[x] += left
                    squares += 2 * count[x] + 1
                    plogs += logs[count[x] + 1] - logs[count[x]]
                    count[x] += 1
                    total += 1
            if leaving >= begin - 1 and total > 0:
                sums[0] += np.sqrt(max(0.0, num_experts * squares / (total * total) - 1.0))
                sums[1] += (log(total) - plogs / total) / scale
                sums[2] += 1


@kernel()
@no_type_check
def logs_of(values: Any, out: Any) -> None:
    """Natural logarithms of ``values`` (N,), all above 0, into ``out``: the same on every machine."""
    for place in range(len(values)):
        out[place] = log(values[place])
