"""torch's own products of a single row by a bfloat16 matrix, which are faster without oneDNN.

On processors without tiles for matrices, oneDNN takes two to three times as long over a lone row as torch's other way, which
reads the matrix at the speed of memory. The sums are the same but for the order of additions, so the last bit may differ:
this is for models whose weights are rounded, and no others.
"""

from __future__ import annotations

import platform
from functools import cache

import torch


@cache
def onednn_slower() -> bool:
    """Whether this is a processor where that was found: x86 without AMX."""
    return platform.machine().lower() in ("x86_64", "amd64") and not torch.cpu._is_amx_tile_supported()


class SingleRows:
    """Sets oneDNN aside, a switch of the whole process, from :meth:`begin` to :meth:`end`. Either may be called twice."""

    def __init__(self) -> None:
        self._aside = False

    def begin(self) -> None:
        """A step of a single row begins."""
        if not self._aside and onednn_slower() and torch.backends.mkldnn.enabled:
            _switch(False)
            self._aside = True

    def end(self) -> None:
        """It is over, or was cut off."""
        if self._aside:
            _switch(True)
            self._aside = False


def _switch(on: bool) -> None:
    torch.backends.mkldnn.set_flags(_enabled=on, _fp32_precision=None)
