"""What oneDNN will keep of the products of a model, found out with a few of them."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

from swapless import onednn
from swapless.runtime.memory import MemoryMeter

_TRIED = 8
_COUNTS_FROM = 32 << 10
"""Less code than this a shape is none: what differs is the allocator's."""
_GRAIN = 64 << 10
"""Rounded to whole ones of these: two processes that measure the same should come to the same."""

_of_shape: dict[tuple[torch.dtype, int, int], int] = {}


def product_code_bytes(dtype: torch.dtype, outputs: int, inputs: int) -> int:
    """The most that the code of products by matrices like (outputs, inputs) may come to take in this process.

    As much for every shape that is kept as the larger ones of a few take; 0 where products of this type leave nothing behind.
    """
    key = dtype, outputs, inputs
    if key not in _of_shape:
        _of_shape[key] = _measured(dtype, outputs, inputs)
    return _of_shape[key] * onednn.kept()


def _measured(dtype: torch.dtype, outputs: int, inputs: int) -> int:
    if dtype == torch.float32:
        return 0
    meter = MemoryMeter()
    weight, rows = torch.zeros(outputs, inputs, dtype=dtype), torch.zeros(5 * _TRIED, inputs, dtype=dtype)
    with torch.no_grad():
        F.linear(rows[:1], weight)
        held = [meter.anonymous_bytes()]
        for count in range(2, 2 + _TRIED):
            F.linear(rows[: 4 * count], weight)
            held.append(meter.anonymous_bytes())
        taken = sorted(after - before for before, after in itertools.pairwise(held))
    grown = taken[-2]  # now and then the allocator takes much more at once
    meter.close()
    return round(grown / _GRAIN) * _GRAIN if grown >= _COUNTS_FROM else 0
