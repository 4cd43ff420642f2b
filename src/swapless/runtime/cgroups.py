"""The memory cgroups that hold this process: where they are, what they allow, and what they have in use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from swapless.control_groups import group_folders

_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
_UNLIMITED = 1 << 60


class Cgroup(NamedTuple):
    """A memory cgroup with a limit: file of the present use, of the peak (None before Linux 5.19), and the limit."""

    usage: Path
    peak: Path | None
    limit_bytes: int

    def used_bytes(self) -> int:
        """What it holds now, page cache and the kernel's own memory included."""
        return _number(self.usage) or 0

    def unused_cache_bytes(self) -> int:
        """Page cache of the group that the kernel drops before it refuses anybody memory."""
        rows = _table(self.usage.with_name("memory.stat"))
        return rows.get("total_inactive_file", rows.get("inactive_file", 0))


class _Version(NamedTuple):
    usage: str
    peak: str
    limits: tuple[str, ...]
    in_stat: str | None
    """A line of ``memory.stat`` that knows the limits of ancestors which a container cannot see."""


_V1 = _Version("memory.usage_in_bytes", "memory.max_usage_in_bytes", ("memory.limit_in_bytes",), "hierarchical_memory_limit")
# Above memory.high the kernel slows a process down until it has given enough back: no place to run in either.
_V2 = _Version("memory.current", "memory.peak", ("memory.max", "memory.high"), None)


def own_cgroup(root: Path = Path("/")) -> Cgroup | None:
    """The memory cgroup that holds this process, where it has a limit of its own, or None.

    A cgroup counts page cache and library pages as well, which is what the out-of-memory killer goes by. ``root`` is where
    ``proc`` and ``sys`` are found.
    """
    own = [group for depth, group in _cgroups(root) if depth == 0]
    return min(own, key=lambda group: group.limit_bytes, default=None)


def machine_bytes(root: Path = Path("/")) -> int:
    """Physical memory of the machine."""
    return _meminfo("MemTotal", root) or os.sysconf("SC_PHYS_PAGES") * _PAGE


def available_bytes(root: Path = Path("/")) -> int:
    """What this process may still take, by the machine and by all cgroups that hold it; their unused page cache is free."""
    available = _meminfo("MemAvailable", root) or machine_bytes(root) // 2
    for _, cgroup in _cgroups(root):
        used = cgroup.used_bytes() - cgroup.unused_cache_bytes()
        available = min(available, max(0, cgroup.limit_bytes - used))
    return available


def limit_bytes(root: Path = Path("/")) -> int:
    """The most this process may ever hold: the machine's memory, or the tightest limit of its cgroups."""
    return min((cgroup.limit_bytes for _, cgroup in _cgroups(root)), default=machine_bytes(root))


def _cgroups(root: Path) -> Iterator[tuple[int, Cgroup]]:
    """Limited memory cgroups of this process, v1 or v2, from its own (0) up to that of the whole machine."""
    machine = machine_bytes(root)
    for depth, folder, second in group_folders("memory", root):
        cgroup = _limited(folder, _V2 if second else _V1, machine)
        if cgroup is not None:
            yield depth, cgroup


def _limited(folder: Path, version: _Version, machine: int) -> Cgroup | None:
    usage, peak = folder / version.usage, folder / version.peak
    limits = [_number(folder / name) for name in version.limits]
    if version.in_stat:
        limits.append(_table(folder / "memory.stat").get(version.in_stat))
    limit = min((value for value in limits if value is not None), default=_UNLIMITED)
    if limit >= min(machine, _UNLIMITED) or _number(usage) is None:
        return None
    return Cgroup(usage, peak if peak.exists() else None, limit)


def _number(file: Path) -> int | None:
    """The number in a file; None where there is no such file, or it says ``max``."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _table(file: Path) -> dict[str, int]:
    try:
        rows = (line.split() for line in file.read_text().splitlines())
        return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdecimal()}
    except OSError:
        return {}


def _meminfo(name: str, root: Path) -> int | None:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return None if root == Path("/") else _meminfo(name, Path("/"))
    for line in lines:
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None
