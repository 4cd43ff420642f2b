"""torch's own products of a single row by a bfloat16 matrix, which are faster without oneDNN.

On processors without tiles for matrices, oneDNN takes two to three times as long over a lone row as torch's other way, which
reads the matrix at the speed of memory. The sums are the same but for the order of additions, so the last bit may differ:
this is for models whose weights are rounded, and no others.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from swapless.runtime.turns import Turn


@cache
def onednn_slower() -> bool:
    """Whether this is a processor where that was found: x86 without AMX."""
    return platform.machine().lower() in ("x86_64", "amd64") and not torch.cpu._is_amx_tile_supported()


class _Aside:
    """oneDNN set aside for as long as a step of some model wants it, in whichever thread: the last one gives it back."""

    def __init__(self) -> None:
        self._turn = Turn(self._begin_child)
        self._threads: list[int] = []
        self._was_on = False

    def begin(self) -> None:
        with self._turn.lock:
            if not self._threads:
                self._was_on = torch._C._get_mkldnn_enabled()
            self._threads.append(threading.get_ident())
            torch._C._set_mkldnn_enabled(False)

    def end(self) -> None:
        with self._turn.lock:
            self._threads.remove(threading.get_ident())
            self._give_back()

    def _give_back(self) -> None:
        if not self._threads and self._was_on:
            torch._C._set_mkldnn_enabled(True)

    def _begin_child(self, alone: bool) -> None:
        # The steps of other threads have not come into this process.
        self._threads = [thread for thread in self._threads if thread == threading.get_ident()]
        self._give_back()


_aside = _Aside()


@contextmanager
def single_rows() -> Iterator[None]:
    """Sets oneDNN aside, a switch of the whole process, where it is slower; it comes back whatever happens."""
    if not onednn_slower():
        yield
        return
    _aside.begin()
    try:
        yield
    finally:
        _aside.end()
