"""Memory limits of cgroups, of both versions, as a process finds them at home and inside a container."""

from __future__ import annotations

from pathlib import Path

import pytest

from swapless.runtime.memory import MemoryMeter, available_bytes, limit_bytes, machine_bytes, own_cgroup

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


def test_a_group_without_a_peak_of_its_own_counts_all_the_same(tmp_path):
    """Linux before 5.19 has no memory.peak."""
    folder = tmp_path / "sys/fs/cgroup"
    group(folder, V2, 20 * MIB, 100 * MIB)
    (folder / "memory.peak").unlink()
    root = process(tmp_path, "0::/")
    found = own_cgroup(root)
    assert found is not None and found.peak is None and found.limit_bytes == 100 * MIB
    assert limit_bytes(root) == 100 * MIB and available_bytes(root) == 80 * MIB
    meter = MemoryMeter(root)
    (folder / "memory.current").write_text(f"{90 * MIB}\n")
    meter.sample()
    (folder / "memory.current").write_text(f"{30 * MIB}\n")
    assert meter.source == "cgroup" and meter.peak_bytes() >= 90 * MIB


def test_memory_high_is_a_limit_too(tmp_path):
    group(tmp_path / "sys/fs/cgroup/a", V2, 0, 100 * MIB)
    (tmp_path / "sys/fs/cgroup/a/memory.high").write_text(f"{70 * MIB}\n")
    assert limit_bytes(process(tmp_path, "0::/a")) == 70 * MIB


@pytest.mark.parametrize("version", [1, 2])
def test_slices_above_slices(tmp_path, version):
    top, names, line = (
        (tmp_path / "sys/fs/cgroup/memory", V1, "9:memory:") if version == 1 else (tmp_path / "sys/fs/cgroup", V2, "0::")
    )
    path = "/user.slice/user-1000.slice/user@1000.service/app.slice/run.scope"
    limits = dict.fromkeys(["user.slice", "user@1000.service", "app.slice"], (1 << 63) - 4096 if version == 1 else "max")
    limits |= {"user-1000.slice": 300 * MIB, "run.scope": 400 * MIB}
    folder = top
    for name in path.strip("/").split("/"):
        folder /= name
        group(folder, names, 100 * MIB, limits[name])
    root = process(tmp_path, line + path)
    found = own_cgroup(root)
    assert found is not None and found.limit_bytes == 400 * MIB
    assert limit_bytes(root) == 300 * MIB and available_bytes(root) == 200 * MIB


def test_limits_above_a_container_are_known_by_its_own_statistics(tmp_path):
    top = tmp_path / "sys/fs/cgroup/memory"
    group(top, V1, 10 * MIB, (1 << 63) - 4096)
    with (top / "memory.stat").open("a") as file:
        file.write(f"hierarchical_memory_limit {50 * MIB}\n")
    root = process(tmp_path, "4:memory:/docker/0123")
    assert limit_bytes(root) == 50 * MIB and available_bytes(root) == 40 * MIB


def mounted(root: Path, shown: str, point: str, kind: str, options: str = "rw") -> None:
    with (root / "proc/self/mountinfo").open("a") as file:
        file.write(f"30 23 0:26 {shown} {point} rw,nosuid shared:4 - {kind} {kind} {options}\n")


@pytest.mark.parametrize(
    "shown, path, inner",
    [
        ("/", "/system.slice/docker-01.scope", "system.slice/docker-01.scope"),  # the host's tree, as it is
        ("/system.slice/docker-01.scope", "/system.slice/docker-01.scope", ""),  # only our own group is shown
        ("/system.slice/docker-01.scope", "/system.slice/docker-01.scope/inner", "inner"),
        ("/", "/system.slice/docker-01.scope", ""),  # a path of the host that is not to be seen here
        ("/", "/../docker-02.scope", ""),  # a group outside of what our namespace shows
    ],
)
def test_the_mount_says_where_the_tree_is_and_what_of_it_is_shown(tmp_path, shown, path, inner):
    root = process(tmp_path, "0::" + path)
    mounted(root, shown, "/odd\\040place", "cgroup2")
    group(tmp_path / "odd place" / inner, V2, 20 * MIB, 100 * MIB)
    found = own_cgroup(root)
    assert found is not None and found.limit_bytes == 100 * MIB == limit_bytes(root)


def test_both_versions_mounted_and_the_controller_is_with_the_old(tmp_path):
    root = process(tmp_path, "5:memory:/a", "0::/a")
    mounted(root, "/", "/sys/fs/cgroup/memory", "cgroup", "rw,memory")
    mounted(root, "/", "/sys/fs/cgroup/cpu", "cgroup", "rw,cpu,cpuacct")
    mounted(root, "/", "/sys/fs/cgroup/unified", "cgroup2")
    (tmp_path / "sys/fs/cgroup/unified/a").mkdir(parents=True)
    group(tmp_path / "sys/fs/cgroup/memory/a", V1, 20 * MIB, 100 * MIB)
    assert limit_bytes(root) == 100 * MIB


def test_the_machine_itself_as_the_tree_has_it(tmp_path):
    root = process(tmp_path, "0::/")
    (root / "proc/meminfo").write_text("MemTotal: 2048 kB\nMemAvailable: 1024 kB\n")
    assert limit_bytes(root) == machine_bytes(root) == 2 * MIB and available_bytes(root) == MIB
