"""Processors by the affinity mask and the cgroups, not by what the machine has."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

from swapless.processors import affinity, processor_quota, processors

SOURCE = Path(__file__).resolve().parents[2] / "src" / "swapless"


def made(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


@pytest.mark.parametrize(
    "cgroup,files,quota",
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"cpu.max": "max 100000", "a/cpu.max": "50000 100000", "a/b/cpu.max": "300000 100000"}, 0.5),
        ("0::/not/to/be/seen\n", {"cpu.max": "200000 100000"}, 2.0),
        ("0::/../elsewhere\n", {"cpu.max": "200000 100000"}, 2.0),
        ("4:cpu,cpuacct:/x\n", {"cpu,cpuacct/x/cpu.cfs_quota_us": "25000", "cpu,cpuacct/x/cpu.cfs_period_us": "50000"}, 0.5),
        ("1:cpu:/\n0::/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("3:memory:/x\n", {"cpu/cpu.cfs_quota_us": "1", "cpu/cpu.cfs_period_us": "2"}, None),
        ("0::/\n", {"cpu.max": "nonsense"}, None),
        ("nonsense\n", {}, None),
        ("", {"cpu.max": "100 100"}, None),
    ],
)
def test_the_tightest_quota_counts(cgroup: str, files: dict[str, str], quota: float | None, tmp_path: Path) -> None:
    assert processor_quota(made(tmp_path, cgroup, files)) == quota


def test_never_more_than_the_mask_nor_than_the_quota(tmp_path: Path) -> None:
    allowed = len(affinity())
    assert 1 <= processors() <= allowed
    assert processors(tmp_path) == allowed, "no cgroup to be seen"
    assert processors(made(tmp_path, "0::/\n", {"cpu.max": "10000 100000"})) == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="there is no affinity mask here")
def test_the_mask_counts() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert affinity() == [min(before)] and processors() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_nobody_else_counts_processors() -> None:
    asking = {
        str(file.relative_to(SOURCE))
        for file in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("cpu_count", "process_cpu_count", "sched_getaffinity")
    }
    assert asking == {"processors.py"}
