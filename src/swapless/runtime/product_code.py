"""What oneDNN will keep of the products of a model, found out with a few of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from swapless import onednn
from swapless.runtime.memory import MemoryMeter

_TRIED = 6
_COUNTS_FROM = 32 << 10
"""Less code than this a shape is none: what differs is the allocator's."""
_GRAIN = 128 << 10
"""Rounded up to whole ones of these: two processes that measure the same should come to the same."""

_of_shape: dict[tuple[torch.dtype, int, int], int] = {}


def product_code_bytes(dtype: torch.dtype, outputs: int, inputs: int) -> int:
    """The most that the code of products by matrices like (outputs, inputs) may come to take in this process.

    As much for every shape that is kept as a few take on average; 0 where products of this type leave nothing behind.
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
        before = meter.anonymous_bytes()
        for count in range(2, 2 + _TRIED):
            F.linear(rows[: 4 * count], weight)
        grown = (meter.anonymous_bytes() - before) // _TRIED
    meter.close()
    return -(-grown // _GRAIN) * _GRAIN if grown >= _COUNTS_FROM else 0
