"""How much memory this process holds and may hold: the cgroup's own counters where we are in one, else the kernel's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60


class Cgroup(NamedTuple):
    """The memory cgroup of this process, if it has one with a limit: file of the present use, of the peak, and the limit."""

    usage: Path
    peak: Path
    limit_bytes: int


def own_cgroup() -> Cgroup | None:
    """The limited memory cgroup that holds this process, or None.

    A cgroup counts page cache and library pages as well, which is what the out-of-memory killer goes by.
    """
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None  # no Linux
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            folder = _V1 / path.lstrip("/")
            files = (folder / "memory.usage_in_bytes", folder / "memory.max_usage_in_bytes", folder / "memory.limit_in_bytes")
        elif controllers == "":
            folder = _V2 / path.lstrip("/")
            files = (folder / "memory.current", folder / "memory.peak", folder / "memory.max")
        else:
            continue
        if all(file.exists() for file in files):
            text = files[2].read_text().strip()
            limit = _UNLIMITED if text == "max" else int(text)
            if limit < _UNLIMITED and limit < machine_bytes():
                return Cgroup(files[0], files[1], limit)
    return None


def machine_bytes() -> int:
    """Physical memory of the machine."""
    return _meminfo("MemTotal") or os.sysconf("SC_PHYS_PAGES") * _PAGE


def available_bytes() -> int:
    """What this process may still take, by the machine and by its cgroup."""
    available = _meminfo("MemAvailable") or machine_bytes() // 2
    cgroup = own_cgroup()
    if cgroup is not None:
        available = min(available, max(0, cgroup.limit_bytes - int(cgroup.usage.read_text())))
    return available


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
