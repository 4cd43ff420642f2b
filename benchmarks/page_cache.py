"""Make files cold or warm, and look whether it worked: a benchmark of reads without this measures the page cache.

python benchmarks/page_cache.py out/bench-3gb          # evict every file below the folder and print what is left
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable
from pathlib import Path


def shards(folder: Path) -> list[Path]:
    """The weight files of a checkpoint folder, in order."""
    return sorted(folder.rglob("*.safetensors"))


def evict(files: Iterable[Path]) -> None:
    """Write back what is dirty and ask the kernel to forget the pages of ``files``; pages that are mapped somewhere stay."""
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def warm(files: Iterable[Path]) -> None:
    """Read every file once, so that its pages are cached where memory allows."""
    block = bytearray(8 << 20)
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(block):
                pass


def cached_bytes(files: Iterable[Path]) -> int:
    """Bytes of ``files`` that are in the page cache right now."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    total = 0
    for path in files:
        size = path.stat().st_size
        if not size:
            continue
        pages = -(-size // mmap.PAGESIZE)
        seen = (ctypes.c_ubyte * pages)()
        with (
            open(path, "rb") as file,
            mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as map_,
        ):
            anchor = ctypes.c_char.from_buffer(map_)  # a writable private map, only so that its address can be taken
            if libc.mincore(ctypes.addressof(anchor), size, seen):
                raise OSError(ctypes.get_errno(), f"mincore failed for {path.name}")
            del anchor
        total += sum(byte & 1 for byte in bytes(seen)) * mmap.PAGESIZE
    return total


def main() -> None:
    """Evict the files below each folder of the command line."""
    for folder in map(Path, sys.argv[1:]):
        files = [path for path in folder.rglob("*") if path.is_file()]
        before = cached_bytes(files)
        evict(files)
        print(f"{folder}: {before / 1e6:.1f} MB cached before, {cached_bytes(files) / 1e6:.1f} MB after")


if __name__ == "__main__":
    main()
