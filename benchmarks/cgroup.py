"""Run a command inside a fresh memory cgroup, page cache counted, no swap.

    python benchmarks/cgroup.py --limit 1.2GB -- python my_script.py --its-own --options

A memory cap that a benchmark only promises is worth nothing: a memory map hides gigabytes in the page cache, and the
resident set counts them or not as the kernel pleases. A memory cgroup counts every page that the command is the first to
touch, cached file pages included, and kills the command where it cannot give back enough. The new group is a child of the
group that this process is in (cgroup v1), so that no limit set from outside is ever escaped; under v2, whose inner groups
may hold no processes, it is a child of the nearest ancestor that hands the memory controller down.

What the figures leave out: pages that somebody outside the group touched first (shared libraries already in the page cache,
for one) are charged to them, not to us. Contestants of one benchmark share that advantage alike.

Where no memory cgroup can be made, the limit is not enforced: the anonymous memory of the command (RssAnon) is sampled
instead, and the result says so in ``method`` and ``why_no_cgroup``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from swapless.units import format_size, parse_size

PREFIX = "swapless-"
SAMPLE_S = 0.02


class CgroupUnavailableError(RuntimeError):
    """No memory cgroup can be made here; the message says what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CappedRun:
    """What one command did under its limit.

    ``max_usage_bytes`` counts page cache and is None without a cgroup; ``max_anon_bytes`` is sampled and may miss a spike
    shorter than the sampling interval; ``max_rss_bytes`` is the kernel's own high-water mark of the resident set, mapped
    files included.
    """

    returncode: int
    stdout: str
    stderr: str
    wall_s: float
    limit_bytes: int | None
    max_usage_bytes: int | None
    max_anon_bytes: int
    max_rss_bytes: int
    oom_killed: bool
    timed_out: bool
    method: str
    why_no_cgroup: str | None = None

    def figures(self) -> dict[str, object]:
        """Everything but the command's own output, for a result file."""
        return {key: value for key, value in asdict(self).items() if key not in ("stdout", "stderr")}


class MemoryCgroup:
    """One fresh group on disk. Owned by :func:`memory_cgroup`, which removes it."""

    def __init__(self, path: Path, version: int) -> None:
        self.path = path
        self.version = version

    def limit(self, limit_bytes: int) -> None:
        """Cap memory, and memory plus swap, at the same number of bytes."""
        if self.version == 2:
            self._write("memory.max", limit_bytes)
            self._write("memory.swap.max", 0, optional=True)
        else:
            self._write("memory.limit_in_bytes", limit_bytes)
            self._write("memory.swappiness", 0, optional=True)
            self._write("memory.memsw.limit_in_bytes", limit_bytes, optional=True)

    def max_usage_bytes(self) -> int | None:
        """Highest usage so far, page cache included (None on a v2 kernel older than 5.19)."""
        name = "memory.peak" if self.version == 2 else "memory.max_usage_in_bytes"
        file = self.path / name
        return int(file.read_text()) if file.exists() else None

    def oom_kills(self) -> int:
        """Processes of this group that the kernel has killed for memory."""
        name = "memory.events" if self.version == 2 else "memory.oom_control"
        return self._table(name).get("oom_kill", 0)

    def anon_bytes(self) -> int:
        """Anonymous memory of the group right now."""
        table = self._table("memory.stat")
        return table.get("anon", table.get("rss", 0))

    def pids(self) -> list[int]:
        """Processes in the group."""
        return [int(pid) for pid in (self.path / "cgroup.procs").read_text().split()]

    def remove(self) -> None:
        """Kill what is left in the group, give its page cache back, and remove the folder."""
        deadline = time.monotonic() + 10
        while self.path.exists():
            for pid in self.pids():
                with suppress(ProcessLookupError, FileNotFoundError):
                    os.kill(pid, signal.SIGKILL)
            if self.version == 1:
                self._write("memory.force_empty", 0, optional=True)
            try:
                self.path.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def _write(self, name: str, value: int, *, optional: bool = False) -> None:
        try:
            (self.path / name).write_text(str(value))
        except OSError:
            if not optional:
                raise

    def _table(self, name: str) -> dict[str, int]:
        rows = (line.split() for line in (self.path / name).read_text().splitlines())
        return {row[0]: int(row[1]) for row in rows if len(row) == 2}


def _mounts() -> dict[str, str]:
    """Mount points of the v1 memory controller (``"1"``) and of the v2 tree (``"2"``), where there are any."""
    found: dict[str, str] = {}
    try:
        lines = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        _, where, kind, options, *_ = line.split()
        if kind == "cgroup" and "memory" in options.split(","):
            found["1"] = where
        elif kind == "cgroup2":
            found["2"] = where
    return found


def _own_groups() -> dict[str, str]:
    """This process's group below each mount point."""
    groups: dict[str, str] = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            groups["1"] = path
        elif number == "0":
            groups["2"] = path
    return groups


def _parent() -> tuple[Path, int]:
    """Folder in which a new group goes, and the cgroup version."""
    mounts = _mounts()
    if not mounts:
        raise CgroupUnavailableError("no cgroup file system with a memory controller is mounted")
    groups = _own_groups()
    if "1" in mounts and "1" in groups:
        own = Path(mounts["1"] + groups["1"])
        return (own if own.is_dir() else Path(mounts["1"])), 1  # in a container the path of the host is not visible
    if "2" not in mounts or "2" not in groups:
        raise CgroupUnavailableError("the memory controller is mounted but this process is in none of its groups")
    root = Path(mounts["2"])
    folder = Path(mounts["2"] + groups["2"])
    while True:
        control = folder / "cgroup.subtree_control"
        if control.exists() and "memory" in control.read_text().split():
            return folder, 2
        if folder == root or root not in folder.parents:
            raise CgroupUnavailableError("no ancestor cgroup hands down the memory controller (cgroup v2)")
        folder = folder.parent


def _sweep(parent: Path, version: int) -> None:
    """Remove groups of earlier runs of ours, and what still runs in them, whose owner was killed before it could."""
    for folder in parent.glob(f"{PREFIX}*"):
        owner = folder.name.removeprefix(PREFIX).split("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            with suppress(FileNotFoundError):
                MemoryCgroup(folder, version).remove()


@contextmanager
def memory_cgroup(limit_bytes: int | None) -> Iterator[MemoryCgroup]:
    """A fresh memory cgroup with a limit (None: only measured), removed on the way out, whatever happened inside.

    Raises
    ------
    CgroupUnavailableError
        None can be made; the message names what is missing.
    """
    parent, version = _parent()
    path = parent / f"{PREFIX}{os.getpid()}-{time.monotonic_ns()}"
    try:
        _sweep(parent, version)
        path.mkdir()
    except OSError as error:
        raise CgroupUnavailableError(f"the cgroup folder cannot be written: {error.strerror}") from error
    group = MemoryCgroup(path, version)
    try:
        if limit_bytes is not None:
            try:
                group.limit(limit_bytes)
            except OSError as error:
                raise CgroupUnavailableError(f"the memory limit cannot be set: {error.strerror}") from error
        yield group
    finally:
        group.remove()


def _status_bytes(pid: int) -> dict[str, int]:
    """Memory fields of ``/proc/PID/status``, in bytes; empty once the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    fields = (line.split() for line in lines if line.startswith(("RssAnon", "VmHWM")))
    return {field[0].rstrip(":"): int(field[1]) * 1024 for field in fields if len(field) >= 2}


class _Sampler(threading.Thread):
    """Highest RssAnon and VmHWM that a process shows while it runs."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.max_anon_bytes = 0
        self.max_rss_bytes = 0
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(SAMPLE_S):
            fields = _status_bytes(self.pid)
            self.max_anon_bytes = max(self.max_anon_bytes, fields.get("RssAnon", 0))
            self.max_rss_bytes = max(self.max_rss_bytes, fields.get("VmHWM", 0))

    def stop(self) -> None:
        self._done.set()
        self.join()


def run_capped(
    command: Sequence[str],
    limit_bytes: int | None = None,
    *,
    timeout_s: float | None = None,
    env: dict[str, str] | None = None,
    pass_output: bool = False,
) -> CappedRun:
    """Run ``command`` under a memory limit and report its peak; never raises for what the command itself does.

    Parameters
    ----------
    command : sequence of str
        Program and arguments.
    limit_bytes : int, optional
        The cap, page cache counted. None measures without a cap.
    timeout_s : float, optional
        Kill the command and its children after this long; ``timed_out`` says so.
    env : dict, optional
        Environment of the command; None passes ours on.
    pass_output : bool
        Let the command write to our own stdout and stderr instead of capturing.
    """
    try:
        with memory_cgroup(limit_bytes) as group:
            return _run(command, limit_bytes, timeout_s, env, pass_output, group, None)
    except CgroupUnavailableError as error:
        return _run(command, limit_bytes, timeout_s, env, pass_output, None, str(error))


def _run(
    command: Sequence[str],
    limit_bytes: int | None,
    timeout_s: float | None,
    env: dict[str, str] | None,
    pass_output: bool,
    group: MemoryCgroup | None,
    why: str | None,
) -> CappedRun:
    full = list(command)
    if group is not None:  # the shell joins the group and becomes the command, so that nothing runs outside it first
        full = ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group.path / "cgroup.procs"), *full]
    with (
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):  # files, not pipes: a full pipe would stop the command
        started = time.perf_counter()
        process = subprocess.Popen(
            full, env=env, start_new_session=True, stdout=None if pass_output else out, stderr=None if pass_output else err
        )
        sampler = _Sampler(process.pid)
        sampler.start()
        timed_out = False
        try:
            process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            if process.poll() is None:
                with suppress(ProcessLookupError, FileNotFoundError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            sampler.stop()
        wall_s = time.perf_counter() - started
        out.seek(0)
        err.seek(0)
        return CappedRun(
            returncode=process.returncode,
            stdout=out.read().decode(errors="replace"),
            stderr=err.read().decode(errors="replace"),
            wall_s=wall_s,
            limit_bytes=limit_bytes,
            max_usage_bytes=group.max_usage_bytes() if group else None,
            max_anon_bytes=sampler.max_anon_bytes,
            max_rss_bytes=sampler.max_rss_bytes,
            oom_killed=bool(group and group.oom_kills()),
            timed_out=timed_out,
            method=f"memory cgroup v{group.version}" if group else "RssAnon sampled, limit not enforced",
            why_no_cgroup=why,
        )


def die_tidily() -> None:
    """Let a plain ``kill`` unwind the stack as Ctrl-C does, so that groups and children do not outlive the benchmark."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def main() -> int:
    """Run the command of the command line; figures go to stderr, or to a file with ``--json``."""
    parser = argparse.ArgumentParser(description="Run a command inside a fresh memory cgroup.")
    parser.add_argument("--limit", required=True, help="memory cap with a unit, page cache counted: 1.2GB, 900MiB")
    parser.add_argument("--timeout", type=float, default=None, help="seconds after which the command is killed")
    parser.add_argument("--json", type=Path, default=None, help="write the figures to this file")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command")
    arguments = parser.parse_args()
    die_tidily()
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        parser.error("no command given after --")
    run = run_capped(command, parse_size(arguments.limit), timeout_s=arguments.timeout, pass_output=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(run.figures(), indent=2) + "\n", encoding="utf-8")
    usage = "not counted" if run.max_usage_bytes is None else format_size(run.max_usage_bytes)
    print(
        f"{run.method}: peak {usage} of {format_size(run.limit_bytes or 0)}, anonymous peak {format_size(run.max_anon_bytes)}, "
        f"{run.wall_s:.1f} s, killed for memory: {'yes' if run.oom_killed else 'no'}"
        + (f" ({run.why_no_cgroup})" if run.why_no_cgroup else ""),
        file=sys.stderr,
    )
    return run.returncode if run.returncode >= 0 else 128 - run.returncode


if __name__ == "__main__":
    sys.exit(main())
