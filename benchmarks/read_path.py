"""Share of the disk that the read path reaches: the loader beside a bare direct-I/O loop, same file, blocks and run.

    python benchmarks/read_path.py --checkpoint out/bench-3gb/original

The floor is the shortest loop that could be written: ``preadv`` with O_DIRECT of expert-sized, block-aligned ranges in
random order into a page-aligned buffer, with 1, 2 and 4 threads; the best of the three counts. Swapless reads the same kind
of ranges through its loader threads, bounce buffer and copy into the slot, as the engine does: ``streamed`` keeps one
block's worst demand (top-k reads) in flight all the time, ``bursts`` waits for the last of them before it asks for the
next. Every variant of a round reads its own experts, drawn anew each round, in an order that rotates, so that no cache
below the file system answers for the disk more often to one than to another. A shared disk's bandwidth may double or halve
within seconds, so a round is cut into turns of a tenth of a second or so and the variants take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import document, emit

from swapless.runtime.loader import Loader
from swapless.runtime.open import open_checkpoint
from swapless.runtime.pool import slot_bytes
from swapless.store.checkpoint import CheckpointStore, Extent
from swapless.store.probe import probe
from swapless.store.read import FileReader, aligned_buffer

ALIGN_BYTES = 4096
BARE_THREADS = (1, 2, 4)
EXPERTS_A_TURN = 16


def bare_loop(extents: Sequence[Extent], threads: int) -> float:
    """Seconds that direct reads of ``extents`` take, dealt out to ``threads`` threads."""
    descriptors = {path: os.open(path, os.O_RDONLY | os.O_DIRECT) for path in {extent.file for extent in extents}}
    largest = max(extent.nbytes for extent in extents) + 2 * ALIGN_BYTES
    buffers = [aligned_buffer(largest) for _ in range(threads)]
    for buffer in buffers:
        buffer[:] = 0  # touched before the clock starts

    def work(share: Sequence[Extent], buffer: np.ndarray) -> None:
        view = memoryview(buffer)
        for extent in share:
            first = extent.offset // ALIGN_BYTES * ALIGN_BYTES
            end = -(-(extent.offset + extent.nbytes) // ALIGN_BYTES) * ALIGN_BYTES
            done = 0
            while first + done < extent.offset + extent.nbytes:
                got = os.preadv(descriptors[extent.file], [view[done : end - first]], first + done)
                if got <= 0:
                    raise OSError("the file ended early")
                done += got
        view.release()

    workers = [threading.Thread(target=work, args=(extents[i::threads], buffers[i])) for i in range(threads)]
    started = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - started
    for descriptor in descriptors.values():
        os.close(descriptor)
    return seconds


class OurReadPath:
    """The store and loader of one checkpoint as the engine puts them together, with nothing else around them."""

    def __init__(self, folder: Path) -> None:
        opened = open_checkpoint(folder, "auto")
        layers = opened.layout.moe_layers
        self.experts = [(m, e) for m, layer in enumerate(layers) for e in range(layer.num_experts)]
        self.window = opened.experts_a_token // len(layers)
        files = {extent.file for m, e in self.experts for source in layers[m].sources(e) for extent in source.extents}
        self.store = CheckpointStore(lambda m, e: layers[m].sources(e), FileReader(sorted(files)), self.experts)
        self.probe = probe(self.store.reader, [extent for expert in self.experts for extent in self.store.extents(*expert)])
        self.slots = [aligned_buffer(slot_bytes(layers)) for _ in range(self.window)]
        for slot in self.slots:
            slot[:] = 0
        self.loader = Loader(
            self.store.read_part, self.store.parts, self.slots.__getitem__, self.store.bounce_buffer, self.probe.depth
        )

    def run(self, experts: Sequence[tuple[int, int]], *, bursts: bool) -> float:
        """Seconds that the experts take through loader threads into slots."""
        waiting = list(reversed(experts))
        started = time.perf_counter()
        while waiting:
            for slot in range(min(self.window, len(waiting))):
                self.loader.submit(*waiting.pop(), slot)
            while self.loader.outstanding:
                read = self.loader.next()
                if read.error is not None:
                    raise read.error
                if waiting and not bursts:
                    self.loader.submit(*waiting.pop(), read.slot)
        return time.perf_counter() - started

    def close(self) -> None:
        """End the threads and close the files."""
        self.loader.close()
        self.store.close()


def memory_bytes_per_s(threads: int, size_bytes: int = 1 << 30, repeats: int = 5) -> float:
    """Bandwidth of reading memory once: the ceiling of a resident model, whose every token walks its weights."""
    torch.set_num_threads(threads)
    block = torch.ones(size_bytes // 4, dtype=torch.float32)
    block.sum()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        block.sum()
        seconds.append(time.perf_counter() - started)
    return size_bytes / statistics.median(seconds)


def measure(folder: Path, *, rounds: int = 5, seed: int = 0) -> dict[str, Any]:
    """Medians and spread of all variants, and the share of the bare loop that ours reaches."""
    ours = OurReadPath(folder)
    rng = np.random.default_rng(seed)
    names = [f"bare_{threads}" for threads in BARE_THREADS] + ["streamed", "bursts"]
    seen: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(rounds):
        drawn = [ours.experts[i] for i in rng.permutation(len(ours.experts))]
        nbytes, seconds = dict.fromkeys(names, 0), dict.fromkeys(names, 0.0)
        for turn in range(max(1, len(drawn) // (len(names) * EXPERTS_A_TURN))):
            first = (round_ + turn) % len(names)
            for name in names[first:] + names[:first]:
                experts, drawn = drawn[:EXPERTS_A_TURN], drawn[EXPERTS_A_TURN:]
                extents = [extent for expert in experts for extent in ours.store.extents(*expert)]
                nbytes[name] += sum(extent.nbytes for extent in extents)
                if name.startswith("bare_"):
                    seconds[name] += bare_loop(extents, int(name.removeprefix("bare_")))
                else:
                    seconds[name] += ours.run(experts, bursts=name == "bursts")
        for name in names:
            seen[name].append(nbytes[name] / seconds[name])
    sizes = sorted({extent.nbytes for expert in ours.experts for extent in ours.store.extents(*expert)})
    result = {
        "rounds": rounds,
        "block_bytes": sizes,
        "reader_threads": ours.probe.depth,
        "direct": ours.probe.direct,
        "bytes_per_s": {
            name: {"median": statistics.median(values), "min": min(values), "max": max(values)} for name, values in seen.items()
        },
    }
    ours.close()
    best = max(statistics.median(seen[f"bare_{threads}"]) for threads in BARE_THREADS)
    result |= {
        "bare_best_bytes_per_s": best,
        "streamed_share_of_bare": statistics.median(seen["streamed"]) / best,
        "bursts_share_of_bare": statistics.median(seen["bursts"]) / best,
    }
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Share of the disk's bandwidth that the read path reaches.")
    parser.add_argument("--checkpoint", type=Path, default=Path("out/bench-3gb/original"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="threads of the memory bandwidth ceiling")
    parser.add_argument("--figures-only", action="store_true", help="only the figures, as the offloading benchmark reads them")
    arguments = parser.parse_args()
    measured = measure(arguments.checkpoint, rounds=arguments.rounds)
    measured["memory_bytes_per_s"] = memory_bytes_per_s(arguments.threads)
    if arguments.figures_only:
        json.dump(measured, sys.stdout)
    else:
        config = {"rounds": arguments.rounds, "layout": arguments.checkpoint.name}
        emit(document("read-path", config=config, measured=measured, data=arguments.checkpoint))


if __name__ == "__main__":
    main()
