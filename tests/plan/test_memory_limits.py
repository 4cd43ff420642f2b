"""Memory limits of cgroups, of both versions, as a process finds them at home and inside a container."""

from __future__ import annotations

from pathlib import Path

import pytest

from swapless.runtime.memory import available_bytes, limit_bytes, machine_bytes, own_cgroup

V1 = ("memory.usage_in_bytes", "memory.max_usage_in_bytes", "memory.limit_in_bytes")
V2 = ("memory.current", "memory.peak", "memory.max")
MIB = 1 << 20


def group(folder: Path, names: tuple[str, ...], used: int, limit: int | str, cache: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (used, used, limit)):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon {used - cache}\ninactive_file {cache}\ntotal_inactive_file {cache}\n")


def process(root: Path, *lines: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("\n".join(lines) + "\n")
    return root


@pytest.mark.parametrize("lines, folder, names", [(["4:memory:/user/a"], "memory/user/a", V1), (["0::/user/a"], "user/a", V2)])
def test_own_limit(tmp_path, lines, folder, names):
    group(tmp_path / "sys/fs/cgroup" / folder, names, 20 * MIB, 100 * MIB)
    root = process(tmp_path, *lines)
    found = own_cgroup(root)
    assert found is not None and found.limit_bytes == 100 * MIB
    assert limit_bytes(root) == 100 * MIB
    assert available_bytes(root) == 80 * MIB


def test_hybrid_hierarchy_names_the_memory_controller_among_others(tmp_path):
    group(tmp_path / "sys/fs/cgroup/memory/a", V1, 0, 50 * MIB)
    assert limit_bytes(process(tmp_path, "0::/elsewhere", "7:cpuset,memory:/a")) == 50 * MIB


def test_a_container_sees_its_group_at_the_top(tmp_path):
    group(tmp_path / "sys/fs/cgroup/memory", V1, 10 * MIB, 60 * MIB)
    root = process(tmp_path, "4:memory:/docker/0123")
    found = own_cgroup(root)
    assert found is not None and found.limit_bytes == 60 * MIB


def test_the_tightest_group_above_counts_but_is_not_our_own(tmp_path):
    top = tmp_path / "sys/fs/cgroup"
    group(top / "slice/a", V2, 20 * MIB, "max")
    group(top / "slice", V2, 90 * MIB, 100 * MIB, cache=30 * MIB)
    root = process(tmp_path, "0::/slice/a")
    assert own_cgroup(root) is None
    assert limit_bytes(root) == 100 * MIB
    assert available_bytes(root) == 40 * MIB, "unused page cache can be had"


def test_no_limit_is_the_machine(tmp_path):
    group(tmp_path / "sys/fs/cgroup/memory/a", V1, 0, (1 << 63) - 4096)
    root = process(tmp_path, "4:memory:/a")
    assert own_cgroup(root) is None and limit_bytes(root) == machine_bytes()
    assert limit_bytes(tmp_path / "no linux") == machine_bytes()
