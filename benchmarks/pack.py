"""Pack and verify a checkpoint of gigabytes under a memory cap, beside the bandwidth of the disk.

    python benchmarks/pack.py                     # the checkpoint of benchmarks/offload.py, in 8 and in 4 bits
    python benchmarks/pack.py --checkpoint DIR --bits 4

``swapless pack`` and then ``swapless verify`` run in a memory cgroup of their own (page cache counted) of ``--cap``, from
cold files, kernels compiled before. A row gives what each took, its peak, and bytes read and written over its time, with
the interpreter's start and without it (the start is what the imports of the verb take, torch and transformers for
``pack``). The bandwidth of reading is probed before every run, on the checkpoint's own experts, and that of writing on a
scratch file beside the store; what counts is the share of both, as if nothing were done but to read and then to write so
many bytes. The packed store is removed afterwards unless ``--keep`` is given.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from cgroup import CappedRun, run_capped
from page_cache import evict, shards
from results import deliver, document

from swapless import embedded
from swapless.runtime.open import open_checkpoint
from swapless.runtime.parts import open_store, sample_extents
from swapless.store.packed import read_manifest
from swapless.store.probe import probe
from swapless.store.write import FileWriter
from swapless.units import format_size, parse_size

SWAPLESS = [sys.executable, "-c", "from swapless.cli.main import main; main()"]
STARTS = {"pack": "import torch, swapless.runtime.packing, swapless.runtime.door", "verify": "import swapless.store.verify"}
"""What a verb imports before it touches the checkpoint, beside the command line."""

PIECE_BYTES, PIECES = 2 << 20, 192
"""What the probe of writing writes."""


def bandwidth(checkpoint: Path) -> float:
    """Bytes a second of reading experts, at the best depth."""
    opened = open_checkpoint(checkpoint)
    reads = open_store(opened, check=False)
    try:
        return probe(reads.reader, sample_extents(reads, opened.layout.moe_layers), held_bytes=0, budget_s=3.0).best_bytes_per_s
    finally:
        reads.close()


def writing(folder: Path) -> float:
    """Bytes a second of writing as ``pack`` does, until all is on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    piece = np.random.default_rng(0).integers(0, 256, PIECE_BYTES, np.uint8)
    file = folder / "probe"
    began = time.perf_counter()
    with FileWriter(file, PIECES * PIECE_BYTES) as writer:
        for _ in range(PIECES):
            writer.write(piece)
        writer.commit()
    seconds = time.perf_counter() - began
    file.unlink()
    return PIECES * PIECE_BYTES / seconds


def start(verb: str) -> float:
    """Seconds that the interpreter and the imports of a verb take, from its start to its end, as the command line leaves it."""
    code = f"import sys; from swapless.cli.main import main; {STARTS[verb]}; sys.argv[1:] = ['--version']; main()"
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def compile_kernels(bits: int) -> None:
    """Pack the embedded model once, so that what is timed compiles nothing."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*SWAPLESS, "pack", str(embedded.path()), "--bits", str(bits), "--out", f"{folder}/store", "--quiet"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def run(command: list[str], cap: int) -> CappedRun:
    """One command of the command line under the cap, on a disk that has nothing left to do from before."""
    os.sync()
    done = run_capped([*SWAPLESS, *command], cap, timeout_s=600)
    if done.returncode:
        why = "out of memory" if done.oom_killed else done.stderr[-2000:]
        raise SystemExit(f"swapless {command[0]} failed: {why}")
    return done


def row(
    verb: str, bits: int, done: CappedRun, moved: dict[str, int], probes: dict[str, float], start_s: float
) -> dict[str, Any]:
    """What a run that read and wrote so many bytes comes to, beside the probed bandwidths; also printed."""
    nbytes = sum(moved.values())
    rate = nbytes / max(1e-9, done.wall_s - start_s)
    probed = nbytes / sum(size / probes[way] for way, size in moved.items())
    peak, anonymous = format_size(done.max_usage_bytes or 0), format_size(done.max_anon_bytes)
    whole = nbytes / done.wall_s
    print(
        f"{verb:<7} int{bits:<3} {format_size(nbytes)} in {done.wall_s:.1f} s: {whole / 1e9:.2f} GB/s, {whole / probed:.2f} of "
        f"the probed {probed / 1e9:.2f}; without the start {rate / probed:.2f}; peak {peak}, anonymous {anonymous}",
        file=sys.stderr,
    )
    return {
        "verb": verb,
        "bits": bits,
        "bytes": nbytes,
        "wall_s": done.wall_s,
        "start_s": start_s,
        "peak_bytes": done.max_usage_bytes,
        "peak_anonymous_bytes": done.max_anon_bytes,
        "bytes_per_s": whole,
        "bytes_per_s_without_start": rate,
        "moved_bytes": moved,
        "probes_bytes_per_s": probes,
        "probed_bytes_per_s": probed,
        "share_of_probed": whole / probed,
        "share_of_probed_without_start": rate / probed,
    }


def main() -> int:
    """Pack, verify, print a table on stderr and one JSON document on stdout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("out/bench-3gb/original"))
    parser.add_argument("--out", type=Path, default=Path("out/packed"), help="folder for the packed stores")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--cap", type=parse_size, default=450_000_000, help="of the memory cgroup, page cache counted")
    parser.add_argument("--keep", action="store_true", help="keep the packed stores")
    parser.add_argument("--no-store", action="store_true", help="do not write a result file")
    options = parser.parse_args()
    read_bytes = sum(file.stat().st_size for file in shards(options.checkpoint))
    rows = []
    for bits in options.bits:
        folder = options.out / f"int{bits}"
        shutil.rmtree(folder, ignore_errors=True)
        compile_kernels(bits)
        start_s = {verb: start(verb) for verb in STARTS}
        evict(shards(options.checkpoint))
        probes = {"read": bandwidth(options.checkpoint), "written": writing(options.out)}
        evict(shards(options.checkpoint))
        packed = run(["pack", str(options.checkpoint), "--bits", str(bits), "--out", str(folder), "--quiet"], options.cap)
        manifest = read_manifest(folder)
        written = sum(layer.num_experts * layer.block_bytes for layer in manifest.moe_layers)
        written += sum(int(entry["bytes"]) for entry in manifest.files.values())
        rows.append(row("pack", bits, packed, {"read": read_bytes, "written": written}, probes, start_s["pack"]))
        evict(shards(folder))
        verified = run(["verify", str(folder), "--json"], options.cap)
        rows.append(row("verify", bits, verified, {"read": written}, probes, start_s["verify"]))
        if not options.keep:
            shutil.rmtree(folder)
    config = {"bits": options.bits, "cap_bytes": options.cap, "checkpoint_bytes": read_bytes}
    result = document("pack", config=config, measured={"rows": rows}, data=options.checkpoint)
    deliver(result, stored=not options.no_store)
    return 0


if __name__ == "__main__":
    sys.exit(main())
