"""torch's own products of a single row by a bfloat16 matrix, which are faster without oneDNN.

On processors without tiles for matrices, oneDNN takes two to three times as long over a lone row as torch's other way, which
reads the matrix at the speed of memory. The sums are the same but for the order of additions, so the last bit may differ:
this is for models whose weights are rounded, and no others.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


@cache
def onednn_slower() -> bool:
    """Whether this is a processor where that was found: x86 without AMX."""
    return platform.machine().lower() in ("x86_64", "amd64") and not torch.cpu._is_amx_tile_supported()


@contextmanager
def single_rows() -> Iterator[None]:
    """Sets oneDNN aside, a switch of the whole process, where it is slower; it comes back whatever happens."""
    if not (onednn_slower() and torch.backends.mkldnn.enabled):
        yield
        return
    try:
        _switch(False)
        yield
    finally:
        _switch(True)


def _switch(on: bool) -> None:
    torch.backends.mkldnn.set_flags(_enabled=on, _fp32_precision=None)
