"""Run compiled work on the threads that torch computes with.

Threads of our own beside torch's would fight with them for the cores: after each of its products torch's threads wait a while
by spinning. So the work is given to the very OpenMP library that torch has loaded. Where there is none that can be found, plain
threads do it.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

_NAMES = ("libgomp", "libomp", "libiomp")
_MAPS = Path("/proc/self/maps")


@cache
def openmp() -> Any | None:
    """``GOMP_parallel(function, data, threads, flags)`` of the OpenMP library in this process, or None."""
    if not _MAPS.exists():
        return None  # no Linux
    files = {line.split(maxsplit=5)[5].strip() for line in _MAPS.read_text().splitlines() if line.count("/")}
    for file in sorted(files, key=lambda file: "torch" not in file):  # torch's own copy first
        if Path(file).name.startswith(_NAMES):
            try:
                parallel = ctypes.CDLL(file).GOMP_parallel
            except (OSError, AttributeError):
                continue  # another library of that name
            parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
            parallel.restype = None
            return parallel
    return None


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="swapless-compute")


@cache
def _function(address: int) -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


def run_on_all(function_address: int, data_address: int) -> None:
    """Call the C function ``void (*)(void *)`` once on each of torch's threads and wait for all of them.

    Parameters
    ----------
    function_address : int
        The function, which shares the work out itself.
    data_address : int
        Its argument.
    """
    threads = torch.get_num_threads()
    parallel = openmp() if threads > 1 else None
    if parallel is not None:
        parallel(function_address, data_address, threads, 0)
        return
    function = _function(function_address)
    if threads == 1:
        function(data_address)
    else:
        others = [_threads(threads - 1).submit(function, data_address) for _ in range(threads - 1)]
        function(data_address)
        for other in others:
            other.result()
