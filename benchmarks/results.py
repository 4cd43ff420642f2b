"""Write the result of a benchmark so that its numbers can be trusted later.

    from results import document, store
    store(document("offload", config={...}, measured={...}))

A number without its machine, versions, commit and command is hearsay, so one helper adds them for every benchmark and names
the file ``<theme>_<machine>_<date>_<commit>.json``. The machine is described by what it has, never by what it is called or
where its files lie.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from swapless.atomic import write_json
from swapless.processors import affinity

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("swapless", "torch", "transformers", "safetensors", "numpy", "numba")


def machine(data: Path | None = None) -> dict[str, Any]:
    """CPU model, cores, memory, kernel; with ``data``, also the read-ahead and block size of the disk that holds it."""
    described: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(affinity()),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
    }
    if data is not None:
        described["disk"] = _disk(data)
    return described


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _disk(data: Path) -> dict[str, int]:
    """Queue settings that decide how a memory map and a direct read behave; empty where the kernel does not show them."""
    device = data.stat().st_dev
    folder = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    for queue in (folder / "queue", folder / ".." / "queue"):
        if queue.is_dir():
            names = ("read_ahead_kb", "logical_block_size", "rotational")
            return {name: int((queue / name).read_text()) for name in names if (queue / name).exists()}
    return {}


def versions() -> dict[str, str]:
    """Python and the packages whose version can change a number."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str:
    """Short commit of the checkout, with ``-dirty`` where tracked files of the package or the benchmarks differ from it."""
    try:
        short = _git("rev-parse", "--short=8", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", "src", "benchmarks/*.py")
    except (OSError, subprocess.CalledProcessError):
        return "nocommit"
    return f"{short}-dirty" if changed else short


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def machine_name(described: dict[str, Any]) -> str:
    """Short name of a machine for a file name.

    Examples
    --------
    >>> machine_name({"cpu": "Intel(R) Xeon(R) Processor @ 2.80GHz", "cores": 2, "memory_bytes": 25_000_000_000})
    'intel-xeon-2.80ghz-2c-23gib'
    """
    text = re.sub(r"\((r|tm|c)\)|processor|cpu|@", " ", described["cpu"].lower())
    words = re.findall(r"[a-z0-9.]+", text)
    return "-".join([*words, f"{described['cores']}c", f"{round(described['memory_bytes'] / 2**30)}gib"])


def command_line() -> str:
    """The command that is running, as it is typed in the root of the checkout; paths of this machine are cut down to names."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return shlex.join(["python", f"benchmarks/{words[0]}", *(Path(w).name if w.startswith("/") else w for w in words[1:])])


def document(theme: str, *, config: dict[str, Any], measured: dict[str, Any], data: Path | None = None) -> dict[str, Any]:
    """One result with all that is needed to judge it: what ran, where, with what, and the figures."""
    return {
        "theme": theme,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "command": command_line(),
        "machine": machine(data),
        "versions": versions(),
        "config": config,
        **measured,
    }


def store(result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write ``result`` whole under its name and return the path."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{result['theme']}_{machine_name(result['machine'])}_{result['date']}_{result['commit']}.json"
    write_json(folder / name, result)
    return folder / name


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Median and range of repeated runs, and their number."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": len(values)}


def emit(result: dict[str, Any]) -> None:
    """Print ``result`` as the one JSON document on stdout."""
    json.dump(result, sys.stdout, indent=2)
    print()


def deliver(result: dict[str, Any], *, stored: bool) -> None:
    """Print ``result``, and keep it in a file where ``stored``."""
    emit(result)
    if stored:
        store(result)
