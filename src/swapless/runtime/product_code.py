"""What oneDNN will keep of the products of a model, found out with a few of them."""

from __future__ import annotations

import itertools
import statistics

import torch
import torch.nn.functional as F

from swapless import onednn
from swapless.runtime.allocator import give_back, pages_of_their_own
from swapless.runtime.memory import MemoryMeter

_TRIED = 7
_COUNTS_FROM = 32 << 10
"""Less code than this a shape is none: what differs is the allocator's."""
_GRAIN = 64 << 10
"""Rounded up to whole ones of these: two processes that measure the same should come to the same."""
_MOST_ROWS = 1024
"""More rows leave no more behind."""
_MOST_WIDE = 2048
"""More columns do, but to try them takes seconds. Where matrices are that wide a budget is large, and slots lend the rest."""

_of_shape: dict[tuple[torch.dtype, int, int, int], int] = {}


def product_code_bytes(dtype: torch.dtype, outputs: int, inputs: int, rows: int) -> int:
    """The most that the code of products of up to ``rows`` rows by matrices like (outputs, inputs) may take in this process.

    As much for every shape that is kept as a usual one of the tallest takes: code for a thousand rows takes twice as
    much as code for a hundred. 0 where products of this type leave nothing behind.
    """
    key = dtype, min(outputs, _MOST_WIDE), min(inputs, _MOST_WIDE), max(_TRIED + 1, min(rows, _MOST_ROWS))
    if key not in _of_shape:
        _of_shape[key] = _measured(*key)
    return _of_shape[key] * onednn.kept()


def _measured(dtype: torch.dtype, outputs: int, inputs: int, rows: int) -> int:
    if dtype == torch.float32:
        return 0
    meter = MemoryMeter()
    weight, values = torch.zeros(outputs, inputs, dtype=dtype), torch.zeros(rows, inputs, dtype=dtype)
    pages_of_their_own(True)  # else what is measured is also what the allocator had left over
    try:
        with torch.no_grad():
            F.linear(values, weight)
            give_back()
            held = [meter.anonymous_bytes()]
            for fewer in range(1, 1 + _TRIED):
                F.linear(values[:-fewer], weight)
                held.append(meter.anonymous_bytes())
    finally:
        pages_of_their_own(False)
        meter.close()
    grown = statistics.median_low(after - before for before, after in itertools.pairwise(held))
    return -(-grown // _GRAIN) * _GRAIN if grown >= _COUNTS_FROM else 0
