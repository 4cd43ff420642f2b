"""How many processors this process may use: those of its affinity mask, and no more than its cgroups let it have time for.

The number that the machine has (``os.cpu_count()``) says neither: in a container with two of a server's 128 it is 128.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from swapless.control_groups import group_folders


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
    quotas = (_quota(folder, second) for _, folder, second in group_folders("cpu", root))
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota(folder: Path, second: bool) -> float | None:
    """Of one cgroup; None where it sets no limit, or says nothing that can be read."""
    try:
        if second:
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        allowed, of = int(quota), int(period)  # "max" is no number
    except (OSError, ValueError):
        return None
    return allowed / of if allowed > 0 and of > 0 else None
