"""What this machine can do: memory, read path, and the speed of the engine's own products; measured once and kept.

The figures lie as JSON in the user's cache folder, with the machine's identity: another processor, number of threads, amount
of memory, limit of a container or version of a library, and they are measured anew. What is free just now (memory, disk) is
never kept, nor what was measured while others were at work.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from swapless.atomic import write_json
from swapless.errors import SwaplessError, UsageError, WriteError, message
from swapless.folders import CACHE_VARIABLE, cache_folder
from swapless.plan.crowd import Busy, Crowd
from swapless.processors import affinity, processor_quota
from swapless.runtime.memory import available_bytes, limit_bytes, machine_bytes
from swapless.store.checkpoint import Extent
from swapless.store.probe import Probe, probe
from swapless.store.read import BLOCK_BYTES, FileReader
from swapless.untrusted import Table, read_json

FORMAT_VERSION = 4
_VERSIONS = ("swapless", "torch", "transformers", "numba", "numpy")
_BLOCKS = (256 << 10, 1 << 20, 4 << 20)
"""Sizes at which the read path is probed: what packed experts, and parts of plain ones, come to."""
_SCRATCH_BYTES = 256 << 20
_PROBE_S = 0.6
_AGAIN_S = 0.2
_EXAMPLE_WEIGHTS = 4 << 20
_FILE = "machine.json"
_MOST_BYTES = 1 << 20
_LEAST = 1e-6
"""Rates are divided by."""

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Measured figures of one machine.

    Parameters
    ----------
    identity : mapping of str to str or int
        What must be the same for the figures to hold.
    reads : tuple of Probe
        The read path at several block sizes, on the disk of the cache folder.
    copy_bytes_per_s : float
        Memory to memory, one thread.
    memory_bytes_per_s : float
        Out of memory, all threads together.
    weights_per_s : mapping of str to float
        Weights a second that one token meets in a linear layer (``bf16``, ``int8``, ``int4``) and in experts (``expert bf16``,
        ``expert int8``, ``expert int4``), from memory.
    base_bytes : int
        A process with all libraries and no model.
    loading_bytes : int
        What loading a small model left behind beside its weights.
    busy : Busy, optional
        Others were at work while this was measured: it is not kept.
    """

    identity: Mapping[str, Any]
    reads: tuple[Probe, ...]
    copy_bytes_per_s: float
    memory_bytes_per_s: float
    weights_per_s: Mapping[str, float]
    base_bytes: int
    loading_bytes: int
    busy: Busy | None = None

    def read_at(self, block_bytes: int) -> Probe:
        """The probe of the block size nearest to this one."""
        return min(self.reads, key=lambda found: abs(np.log(found.block_bytes / block_bytes)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        figures = {name: value for name, value in asdict(self).items() if name != "busy"}
        return {"format_version": FORMAT_VERSION} | figures | {"identity": dict(self.identity)}


def identity() -> dict[str, Any]:
    """What tells machines apart as far as the figures go: never a name or a number of the one machine."""
    import torch

    found: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": len(affinity()),
        "threads": torch.get_num_threads(),
        "processor_quota": processor_quota(),
        "memory_bytes": machine_bytes(),
        "memory_limit_bytes": limit_bytes(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    return found | {name: version(name) for name in _VERSIONS}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []  # no Linux
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def machine(
    *,
    fresh: bool = False,
    folder: Path | None = None,
    crowd: Crowd | None = None,
    progress: Progress | None = None,
) -> Machine:
    """The figures of this machine: those kept, if they are of it, else measured now, and kept unless it is busy.

    Parameters
    ----------
    fresh : bool
        Measure in any case.
    folder : Path, optional
        Where they are kept, and whose disk is probed; the user's cache folder by default.
    crowd : Crowd, optional
        Looks for others at work.
    progress : callable of (str, float), optional
        Told what is going on and the share done.

    Raises
    ------
    WriteError
        The folder cannot be written.
    """
    folder = cache_folder() if folder is None else folder
    now = identity()
    kept = None if fresh else _read(folder / _FILE)
    if kept is not None and kept.identity == now:
        return kept
    try:
        folder.mkdir(parents=True, exist_ok=True)
        measured = _measure(now, folder, crowd or Crowd(), progress or (lambda stage, done: None))
        if measured.busy is None:
            write_json(folder / _FILE, measured.to_dict())
    except OSError as error:
        raise WriteError(
            message(
                "The figures of this machine cannot be measured and kept.",
                where=folder,
                got=error.strerror or str(error),
                allowed=f"a folder that can be written, with {_SCRATCH_BYTES >> 20} MiB free",
                step=f"Set {CACHE_VARIABLE} to one.",
            )
        ) from error
    return measured


def _read(path: Path) -> Machine | None:
    """The figures of a file, or None where it is not there or not of this form: they are then measured."""
    try:
        table = read_json(path, error=UsageError, what="file of figures", max_bytes=_MOST_BYTES)
        if table.integer("format_version") != FORMAT_VERSION:
            return None
        table.only("format_version", *(name.name for name in fields(Machine) if name.name != "busy"))
        rates = table.table("weights_per_s")
        return Machine(
            identity=table.table("identity").value,
            reads=tuple(_probe(row) for row in table.tables("reads", minimum=1, maximum=64)),
            copy_bytes_per_s=table.number("copy_bytes_per_s", minimum=_LEAST),
            memory_bytes_per_s=table.number("memory_bytes_per_s", minimum=_LEAST),
            weights_per_s={name: rates.number(name, minimum=_LEAST) for name in rates},
            base_bytes=table.integer("base_bytes"),
            loading_bytes=table.integer("loading_bytes"),
        )
    except (OSError, SwaplessError):
        return None


def _probe(row: Table) -> Probe:
    row.only(*(name.name for name in fields(Probe)))
    rates = row.table("bytes_per_s")
    depth = row.integer("depth", minimum=1)
    if f"{depth}" not in rates:
        row.refuse("depth", "a depth of bytes_per_s")
    return Probe(
        block_bytes=row.integer("block_bytes", minimum=1),
        bytes_per_s={_depth(rates, name): rates.number(name, minimum=_LEAST) for name in rates},
        fixed_s=row.number("fixed_s", minimum=0.0),
        depth=depth,
        direct=row.flag("direct"),
    )


def _depth(rates: Table, name: str) -> int:
    if not (name.isascii() and name.isdecimal() and 0 < len(name) < 4):
        rates.refuse(name, "requests in flight as key")
    return int(name)


def _measure(now: Mapping[str, Any], folder: Path, crowd: Crowd, report: Progress) -> Machine:
    from swapless.plan import products, trial

    crowd.look()
    report("reading from disk", 0.0)
    with _scratch(folder) as path:
        reads = tuple(probe_files([path], block) for block in _BLOCKS)
        crowd.look()
        with crowd.watching():
            report("memory", 0.3)
            copy, memory = products.copy_bytes_per_s(), products.read_bytes_per_s()
            report("products", 0.4)
            weights = dict(products.matrices(_EXAMPLE_WEIGHTS))
            weights |= {f"expert {name}": value for name, value in trial.expert_weights_per_s()}
            report("a small model", 0.8)
            base, loading = trial.process_bytes()
            crowd.twice("memory copied {:.3g} and {:.3g} bytes a second", copy, products.copy_bytes_per_s())
        crowd.look()
        again = probe_files([path], reads[-1].block_bytes, budget_s=_AGAIN_S)
        crowd.twice("the disk gave {:.3g} and {:.3g} bytes a second", reads[-1].best_bytes_per_s, again.best_bytes_per_s)
    report("ready", 1.0)
    return Machine(
        identity=now,
        reads=reads,
        copy_bytes_per_s=copy,
        memory_bytes_per_s=memory,
        weights_per_s=weights,
        base_bytes=base,
        loading_bytes=loading,
        busy=crowd.found(),
    )


def probe_disk(folder: Path) -> tuple[Probe, ...]:
    """The read path of the disk of ``folder`` at several block sizes, by a scratch file that is removed again."""
    with _scratch(folder) as path:
        return tuple(probe_files([path], block) for block in _BLOCKS)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    path = folder / f".probe-{os.getpid()}"
    chunk = np.random.default_rng(0).integers(0, 256, 4 << 20, dtype=np.uint8).data
    try:
        with open(path, "wb") as file:
            for _ in range(_SCRATCH_BYTES // len(chunk)):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        yield path
    finally:
        path.unlink(missing_ok=True)


def probe_files(files: list[Path], block_bytes: int, *, budget_s: float = _PROBE_S) -> Probe:
    """The read path of ``files`` at blocks of this size, at scattered places of them."""
    rng = np.random.default_rng(0)
    sizes = np.array([file.stat().st_size for file in files])
    room = np.maximum(sizes - block_bytes, 0) // BLOCK_BYTES
    extents = []
    for index in rng.choice(len(files), 256, p=sizes / sizes.sum()):
        offset = int(rng.integers(0, room[index] + 1)) * BLOCK_BYTES
        extents.append(Extent(files[index], offset, int(min(block_bytes, sizes[index]))))
    reader = FileReader(files)
    try:
        return probe(reader, extents, budget_s=budget_s)
    finally:
        reader.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Free:
    """What there is just now: memory that may be taken and the most that may be held, in bytes, and room on a disk."""

    memory_bytes: int
    limit_bytes: int
    disk_bytes: int

    @classmethod
    def of(cls, folder: Path) -> Free:
        """As things stand, on the disk of the nearest existing folder above ``folder``."""
        while not folder.exists():
            folder = folder.parent
        return cls(memory_bytes=available_bytes(), limit_bytes=limit_bytes(), disk_bytes=shutil.disk_usage(folder).free)
