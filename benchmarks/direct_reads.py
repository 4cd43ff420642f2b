"""What decides how fast a disk fills memory: the buffer, its pages, and what the processors do meanwhile.

    python benchmarks/direct_reads.py                     # the checkpoint of benchmarks/offload.py
    python benchmarks/direct_reads.py --checkpoint DIR --size 1MiB

One thread reads blocks at random places of a checkpoint's files past the page cache: into one buffer over and over, which a
processor's cache may still hold, or into several in turn, as into slots; in huge pages as the engine has them, or in pages of
4 KiB; alone, beside threads that compute in registers (SHA-256 of a few kilobytes), or beside threads
that walk memory as products with weights do. Variants take turns, round after round; what counts are medians. A plan's floor
knows nothing of the last kind of rows: it takes the disk as it is alone.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from page_cache import evict, shards
from results import deliver, document

from swapless.plan.traffic import Fetch, busy
from swapless.processors import processors
from swapless.store.read import BLOCK_BYTES, FileReader, aligned_buffer
from swapless.units import format_size, parse_size

WALK_BYTES = 256 << 20
PLACES = (1, 4, 16, 256)


def small_pages(nbytes: int) -> np.ndarray:
    """A buffer as numpy gives it, in pages of 4 KiB."""
    raw = np.zeros(nbytes + BLOCK_BYTES, np.uint8)
    return raw[-raw.ctypes.data % BLOCK_BYTES :][:nbytes]


def in_registers() -> Fetch:
    """Work that leaves memory alone; each call returns the bytes it walked: none."""
    data = np.zeros(16 << 10, np.uint8)

    def work(rng: np.random.Generator) -> int:
        for _ in range(16):
            hashlib.sha256(data.data).digest()
        return 0

    return work


def through_memory() -> Fetch:
    """Work that walks memory that no cache holds."""
    data = np.ones(WALK_BYTES // 4, np.float32)
    return lambda rng: data.nbytes if data.sum() else 0


def main() -> int:
    """Measure, print a table on stderr and one JSON document on stdout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("out/bench-3gb/original"))
    parser.add_argument("--size", type=parse_size, default=parse_size("2600KiB"), help="of a block")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="of a turn")
    parser.add_argument("--no-store", action="store_true", help="do not write a result file")
    options = parser.parse_args()
    cores = processors()
    variants = {
        **{f"huge pages, {count} buffers in turn": (aligned_buffer, count, in_registers, 0) for count in PLACES},
        "pages of 4 KiB, one buffer": (small_pages, 1, in_registers, 0),
        f"huge pages, one buffer, beside {cores} threads in registers": (aligned_buffer, 1, in_registers, cores),
        "huge pages, one buffer, beside 1 thread through memory": (aligned_buffer, 1, through_memory, 1),
        f"huge pages, one buffer, beside {cores} threads through memory": (aligned_buffer, 1, through_memory, cores),
    }
    files = [file for file in shards(options.checkpoint) if file.stat().st_size > options.size]
    evict(files)
    rng = np.random.default_rng(0)
    read: dict[str, list[float]] = {name: [] for name in variants}
    walked: dict[str, list[float]] = {name: [] for name in variants}
    reader = FileReader(files)
    for _ in range(options.rounds):
        for name, (buffer_of, count, work, threads) in variants.items():
            room = (-(-options.size // BLOCK_BYTES) + 2) * BLOCK_BYTES
            memory = buffer_of(count * room)[: count * room]
            memory[:] = 0
            buffers = itertools.cycle(memory.reshape(count, room))
            with busy([work() for _ in range(threads)], rng) as bytes_walked:
                nbytes, began = 0, time.perf_counter()
                while time.perf_counter() - began < options.seconds:
                    file = files[int(rng.integers(len(files)))]
                    place = int(rng.integers((file.stat().st_size - options.size) // BLOCK_BYTES)) * BLOCK_BYTES
                    nbytes += len(reader.read(file, place, options.size, next(buffers)))
                seconds = time.perf_counter() - began
                walked[name].append(sum(bytes_walked) / seconds)
            read[name].append(nbytes / seconds)
    reader.close()
    rows = []
    for name in variants:
        middle, walking = statistics.median(read[name]), statistics.median(walked[name])
        rows.append({"variant": name, "bytes_per_s": middle, "all": read[name], "walked_bytes_per_s": walking})
        also = f", {walking / 1e9:.0f} GB/s walked" if walking else ""
        print(
            f"{name:<56} {middle / 1e9:.2f} GB/s ({min(read[name]) / 1e9:.2f} to {max(read[name]) / 1e9:.2f}){also}",
            file=sys.stderr,
        )
    config = {"block": format_size(options.size), "rounds": options.rounds, "seconds": options.seconds}
    result = document("direct-reads", config=config, measured={"rows": rows}, data=options.checkpoint)
    deliver(result, stored=not options.no_store)
    return 0


if __name__ == "__main__":
    sys.exit(main())
