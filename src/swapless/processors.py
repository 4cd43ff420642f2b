"""How many processors this process may use: those of its affinity mask, and no more than its cgroups let it have time for.

The number that the machine has (``os.cpu_count()``) says neither: in a container with two of a server's 128 it is 128.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path


def processors(root: Path = Path("/")) -> int:
    """Processors to work on at once, at least one: the affinity mask, or the quota of the cgroups rounded up, if that is less.

    ``root`` is where ``proc`` and ``sys`` are found.
    """
    quota = processor_quota(root)
    allowed = len(affinity())
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def affinity() -> list[int]:
    """Numbers of the processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))  # no Linux: there is no mask


def processor_quota(root: Path = Path("/")) -> float | None:
    """Processors' worth of time that the cgroups of this process give it, the tightest of them; None without a limit.

    Version 1 and 2, nested groups, and containers that do not see the path that their group has on the host.
    """
    return min(_quotas(root), default=None)


def _quotas(root: Path) -> Iterator[float]:
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return  # no Linux
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        names = (controllers, "cpu", "cpu,cpuacct", "cpuacct,cpu") if controllers else ("", "unified")
        for top in {root / "sys/fs/cgroup" / name for name in names}:
            own = top / path.lstrip("/")
            own = own if own.is_dir() and ".." not in Path(path).parts else top
            for folder in (own, *own.parents):
                quota = _quota(folder, bool(controllers))
                if quota is not None:
                    yield quota
                if folder == top:
                    break


def _quota(folder: Path, version_1: bool) -> float | None:
    """Of one cgroup; None where it sets no limit, or says nothing that can be read."""
    try:
        if version_1:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        else:
            quota, period = (folder / "cpu.max").read_text().split()
        allowed, of = int(quota), int(period)  # "max" is no number
    except (OSError, ValueError):
        return None
    return allowed / of if allowed > 0 and of > 0 else None
