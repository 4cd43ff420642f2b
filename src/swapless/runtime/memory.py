"""How much memory this process holds and may hold: the cgroup's own counters where we are in one, else the kernel's."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
_UNLIMITED = 1 << 60


class Cgroup(NamedTuple):
    """The memory cgroup of this process, if it has one with a limit: file of the present use, of the peak, and the limit."""

    usage: Path
    peak: Path
    limit_bytes: int


def own_cgroup(root: Path = Path("/")) -> Cgroup | None:
    """The limited memory cgroup that holds this process, or None.

    A cgroup counts page cache and library pages as well, which is what the out-of-memory killer goes by. ``root`` is where
    ``proc`` and ``sys`` are found.
    """
    return next((group for depth, group in _cgroups(root) if depth == 0), None)


def _cgroups(root: Path) -> Iterator[tuple[int, Cgroup]]:
    """Limited memory cgroups of this process, v1 or v2, from its own (0) up to that of the whole machine."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return  # no Linux
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.usage_in_bytes", "memory.max_usage_in_bytes", "memory.limit_in_bytes")
        elif controllers == "":
            top = root / "sys/fs/cgroup"
            names = ("memory.current", "memory.peak", "memory.max")
        else:
            continue
        own = top / path.lstrip("/")
        own = own if own.is_dir() else top  # in a container the path of the host is not visible
        folders = [own, *own.parents]
        for depth, folder in enumerate(folders[: folders.index(top) + 1]):
            usage, peak, limit = (folder / name for name in names)
            if usage.exists() and peak.exists() and limit.exists():
                text = limit.read_text().strip()
                limit_bytes = _UNLIMITED if text == "max" else int(text)
                if limit_bytes < _UNLIMITED and limit_bytes < machine_bytes():
                    yield depth, Cgroup(usage, peak, limit_bytes)


def machine_bytes() -> int:
    """Physical memory of the machine."""
    return _meminfo("MemTotal") or os.sysconf("SC_PHYS_PAGES") * _PAGE


def available_bytes(root: Path = Path("/")) -> int:
    """What this process may still take, by the machine and by all cgroups that hold it; their unused page cache is free."""
    available = _meminfo("MemAvailable") or machine_bytes() // 2
    for _, cgroup in _cgroups(root):
        used = int(cgroup.usage.read_text()) - _unused_cache_bytes(cgroup)
        available = min(available, max(0, cgroup.limit_bytes - used))
    return available


def limit_bytes(root: Path = Path("/")) -> int:
    """The most this process may ever hold: the machine's memory, or the tightest limit of its cgroups."""
    return min((cgroup.limit_bytes for _, cgroup in _cgroups(root)), default=machine_bytes())


def _unused_cache_bytes(cgroup: Cgroup) -> int:
    """Page cache of the group that the kernel drops before it refuses anybody memory."""
    stat = cgroup.usage.with_name("memory.stat")
    rows = dict(line.split(maxsplit=1) for line in stat.read_text().splitlines()) if stat.exists() else {}
    return int(rows.get("total_inactive_file", rows.get("inactive_file", 0)))


CODE_BYTES = 32 << 20
"""How much page cache of code is worth dropping, and how much of it a run may read again."""


def drop_unused_cache() -> int:
    """Give back what a limited cgroup is charged for files of libraries and code beyond the pages that are mapped.

    Importing torch and transformers reads hundreds of megabytes of which a process then maps a small part. Where it is the
    first to touch them, as in a fresh container, the page cache of the rest counts as its own and would cost as many experts.
    Where others were the first, nothing is done: what is read again would be charged to us. Returns the bytes given back.
    """
    cgroup = own_cgroup()
    if cgroup is None or not hasattr(os, "posix_fadvise") or _unused_cache_bytes(cgroup) < CODE_BYTES:
        return 0
    before = int(cgroup.usage.read_text())
    names = {line.split(maxsplit=5)[5].strip() for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    for module in list(sys.modules.values()):
        names |= {name for attribute in ("__file__", "__cached__") if isinstance(name := getattr(module, attribute, None), str)}
    for name in filter(os.path.isfile, names):
        try:
            file = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue  # not ours to read, or gone by now
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
    return max(0, before - int(cgroup.usage.read_text()))


def _meminfo(name: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None  # no Linux
    for line in lines:
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


class MemoryMeter:
    """Samples what the process holds and keeps the peak.

    ``source`` says what the peak is: ``cgroup`` (its own counter, page cache included, nothing missed) or ``rss_anon``
    (anonymous memory sampled at every block), or ``unknown`` where neither exists.
    """

    def __init__(self) -> None:
        self._cgroup = own_cgroup()
        self._statm: int | None = None
        try:
            self._statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._statm = None  # no Linux: the source says so
        self.source = "cgroup" if self._cgroup else "rss_anon" if self._statm is not None else "unknown"
        self._peak = 0
        self.sample()

    def now_bytes(self) -> int:
        """What counts against the budget now."""
        anonymous = self._anonymous()
        return max(anonymous, int(self._cgroup.usage.read_text())) if self._cgroup else anonymous

    def sample(self) -> None:
        """Look now; cheap enough for every block."""
        if self._cgroup is None:
            self._peak = max(self._peak, self._anonymous())

    def peak_bytes(self) -> int:
        """The most that was held so far."""
        self.sample()
        return int(self._cgroup.peak.read_text()) if self._cgroup else self._peak

    def _anonymous(self) -> int:
        if self._statm is None:
            return 0
        fields = os.pread(self._statm, 128, 0).split()
        return (int(fields[1]) - int(fields[2])) * _PAGE

    def close(self) -> None:
        """Close the sampled file; the peak stays."""
        if self._statm is not None:
            self._peak = max(self._peak, self._anonymous())
            os.close(self._statm)
            self._statm = None
