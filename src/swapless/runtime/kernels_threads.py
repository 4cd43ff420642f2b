"""Run compiled work on the threads that torch computes with.

Threads of our own beside torch's would fight with them for the cores: after each of its products torch's threads wait a while
by spinning. So the work is given to the very OpenMP library that torch has loaded. Where there is none that can be found, plain
threads do it.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

_NAMES = ("libgomp", "libomp", "libiomp")
_MAPS = Path("/proc/self/maps")


@cache
def _library() -> Any | None:
    """The OpenMP library in this process that torch computes with, or None."""
    if not _MAPS.exists():
        return None  # no Linux
    files = {line.split(maxsplit=5)[5].strip() for line in _MAPS.read_text().splitlines() if line.count("/")}
    for file in sorted(files, key=lambda file: "torch" not in file):  # torch's own copy first
        if Path(file).name.startswith(_NAMES):
            with suppress(OSError, AttributeError):  # another library of that name
                library = ctypes.CDLL(file)
                library.GOMP_parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
                library.GOMP_parallel.restype = None
                library.omp_set_num_threads.argtypes = (ctypes.c_int,)
                library.omp_set_num_threads.restype = None
                return library
    return None


@cache
def openmp() -> Any | None:
    """``GOMP_parallel(function, data, threads, flags)`` of the OpenMP library in this process, or None."""
    library = _library()
    return None if library is None else library.GOMP_parallel


@cache
def _mkl() -> Any | None:
    """``MKL_Set_Num_Threads_Local(count)`` of the MKL in torch, or None: it goes by a number of its own."""
    try:
        setter = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).MKL_Set_Num_Threads_Local
    except (OSError, AttributeError):
        return None
    setter.argtypes, setter.restype = (ctypes.c_int,), ctypes.c_int
    return setter


def threads_here() -> int:
    """Threads that torch computes with when it is called from this thread."""
    return torch.get_num_threads()


class Before(NamedTuple):
    """What :func:`limit_here` has changed: threads of OpenMP, and MKL's own number for this thread, 0 for none."""

    threads: int
    of_mkl: int


def limit_here(count: int) -> Before:
    """Let torch compute with so many threads when it is called from this thread, and no other; nothing where it cannot be set.

    ``torch.set_num_threads`` is a switch of the whole process, and drops what oneDNN has prepared.
    """
    threads, library, mkl = threads_here(), _library(), _mkl()
    if library is None:
        return Before(threads, 0)
    library.omp_set_num_threads(count)
    return Before(threads, 0 if mkl is None else mkl(count))


def restore_here(before: Before) -> None:
    """Undo :func:`limit_here`, in the same thread."""
    library, mkl = _library(), _mkl()
    if library is not None:
        library.omp_set_num_threads(before.threads)
        if mkl is not None:
            mkl(before.of_mkl)


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
