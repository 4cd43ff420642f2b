"""``swapless doctor``: what this machine can do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from swapless.cli import _options as options
from swapless.cli import early
from swapless.cli.out import Out
from swapless.units import format_size

if TYPE_CHECKING:
    from swapless.plan.machine import Free, Machine

__all__ = ["doctor"]


def doctor(
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure anew, whatever was kept.")] = False,
    threads: options.Threads = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure this machine: memory, disk, and the speed of the engine's products.

    The figures are kept in the user's cache folder until the machine, a limit of its container or a library changes. Those of a
    busy machine are shown and not kept.
    """
    out = Out(as_json=as_json, quiet=quiet)
    threads = early.threads(threads, out)
    with out.progress() as progress:
        progress("Starting", 0.0)
        from swapless.folders import cache_folder
        from swapless.plan.machine import Free, machine

        options.set_threads(threads)
        found = machine(fresh=fresh, progress=progress)
        free = Free.of(cache_folder())
    now = {"available_bytes": free.memory_bytes, "limit_bytes": free.limit_bytes, "free_disk_bytes": free.disk_bytes}
    kept = {"now": now, "kept_in": None if found.busy else str(cache_folder())}
    out.document(found.to_dict() | kept | {"busy": found.busy.to_dict() if found.busy else None})
    if found.busy is not None:
        out.text(f"{found.busy} The figures below are too low, and were not kept.\n")
    out.facts(_facts(found, free))
    out.text("")
    depths = sorted(found.reads[0].bytes_per_s)
    columns = ["reads of", *(f"{depth} in flight" for depth in depths), "best", "a page takes"]
    rows = [
        [
            format_size(probe.block_bytes),
            *(f"{probe.bytes_per_s[depth] / 1e9:.2f} GB/s" for depth in depths),
            f"{probe.depth} in flight",
            f"{1e3 * probe.fixed_s:.2f} ms",
        ]
        for probe in found.reads
    ]
    out.table(columns, rows)
    out.text("")
    out.table(
        ["one token times", "weights a second"], [[name, f"{rate / 1e9:.2f} G"] for name, rate in found.weights_per_s.items()]
    )


def _facts(found: Machine, free: Free) -> list[tuple[str, str]]:
    about = found.identity
    quota = about["processor_quota"]
    cores = f"{about['cores']} cores" + (f", of which a cgroup gives the time of {quota:g}" if quota else "")
    limit = "" if free.limit_bytes >= about["memory_bytes"] else f", limited to {format_size(free.limit_bytes)} by a cgroup"
    direct = "past the page cache" if found.reads[0].direct else "through the page cache: direct I/O is refused there"
    return [
        ("processor", f"{about['cpu']}, {cores}, computing with {about['threads']} threads"),
        ("memory", f"{format_size(about['memory_bytes'])}{limit}, {format_size(free.memory_bytes)} free now"),
        ("memory speed", f"{found.memory_bytes_per_s / 1e9:.1f} GB/s read, {found.copy_bytes_per_s / 1e9:.1f} GB/s copied"),
        ("process", f"{format_size(found.base_bytes + found.loading_bytes)} before any model"),
        ("disk", f"{format_size(free.disk_bytes)} free where the cache folder is, read {direct}"),
    ]
