"""Where the control groups of this process are found: version 1 or 2, nested, and in containers that see a part of the tree."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path


def group_folders(controller: str, root: Path = Path("/")) -> Iterator[tuple[int, Path, bool]]:
    """Folders of the groups that hold this process, its own (depth 0) first, up to that of the whole machine.

    Parameters
    ----------
    controller : str
        ``memory`` or ``cpu``: of version 1, where each has a tree of its own. The one tree of version 2 comes as well.
    root : Path
        Where ``proc`` and ``sys`` are found.

    Yields
    ------
    depth, folder, second : int, Path, bool
        How far up, where, and whether the group is one of version 2.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return  # no Linux
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller in controllers.split(","):
            second, usual = False, dict.fromkeys((controller, controllers))
            tops = _mounts(root, controller) or [(root / "sys/fs/cgroup" / name, "/") for name in usual]
        elif number == "0" and not controllers:
            second = True
            tops = _mounts(root, None) or [(root / "sys/fs/cgroup", "/"), (root / "sys/fs/cgroup/unified", "/")]
        else:
            continue
        for top, shown in tops:
            for depth, folder in enumerate(_folders(top, shown, path)):
                yield depth, folder, second


def _folders(top: Path, shown: str, path: str) -> list[Path]:
    """Folders of the groups on ``path``, our own first. ``shown`` is the group that is mounted at ``top``."""
    prefix = shown.rstrip("/") + "/"
    inner = path[len(prefix) :] if path.startswith(prefix) else "" if path == shown else path.lstrip("/")
    parts = [part for part in inner.split("/") if part]
    if ".." in parts:
        parts = []  # a group outside of what this namespace shows
    visible = [folder for folder in (top.joinpath(*parts[:length]) for length in range(len(parts), -1, -1)) if folder.is_dir()]
    # In a container the path is the host's: what is mounted at the top is our own group then.
    return visible if visible[:1] == [top.joinpath(*parts)] else [top, *(folder for folder in visible if folder != top)]


def _mounts(root: Path, controller: str | None) -> list[tuple[Path, str]]:
    """Where the tree of a v1 controller (None: of v2) is mounted, and which of its groups is seen there."""
    try:
        lines = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        ours = kind[0] == "cgroup2" if controller is None else kind[0] == "cgroup" and controller in kind[2].split(",")
        if ours:
            found.append((root / _plain(fields[4]).lstrip("/"), _plain(fields[3])))
    return found


def _plain(escaped: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), escaped)
