"""How much memory this process holds and held at the most: the cgroup's own counters where we are in one, else the kernel's."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import weakref
from io import FileIO
from pathlib import Path
from types import TracebackType

from swapless.runtime.cgroups import Cgroup, available_bytes, limit_bytes, machine_bytes, own_cgroup

__all__ = [
    "CODE_BYTES",
    "Cgroup",
    "MemoryMeter",
    "Spike",
    "available_bytes",
    "drop_unused_cache",
    "limit_bytes",
    "machine_bytes",
    "own_cgroup",
]

_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096

CODE_BYTES = 32 << 20
"""How much page cache of code is worth dropping, and how much of it a run may read again."""

KERNEL_BYTES = 4 << 20
"""What a cgroup is charged beside the memory of a process of this kind: page tables, stacks, files that are open."""


def drop_unused_cache() -> int:
    """Give back what a limited cgroup is charged for files of libraries and code beyond the pages that are mapped.

    Importing torch and transformers reads hundreds of megabytes of which a process then maps a small part. Where it is the
    first to touch them, as in a fresh container, the page cache of the rest counts as its own and would cost as many experts.
    Where others were the first, nothing is done: what is read again would be charged to us. Returns the bytes given back.
    """
    cgroup = own_cgroup()
    if cgroup is None or not hasattr(os, "posix_fadvise") or cgroup.unused_cache_bytes() < CODE_BYTES:
        return 0
    before = cgroup.used_bytes()
    names = {line.split(maxsplit=5)[5].strip() for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    for module in list(sys.modules.values()):
        names |= {name for attribute in ("__file__", "__cached__") if isinstance(name := getattr(module, attribute, None), str)}
    for name in filter(os.path.isfile, names):
        try:
            file = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue  # not ours to read, or gone by now
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
    return max(0, before - cgroup.used_bytes())


class _Status:
    """``/proc/self/statm`` and the high-water mark of ``/proc/self/status``, kept open; all zeros where there is no Linux."""

    def __init__(self) -> None:
        self._statm: FileIO | None = None
        self._status: FileIO | None = None
        self.reopen()

    def reopen(self) -> None:
        """Look at the process that this is now: a forked child is another."""
        self.close()
        with contextlib.suppress(OSError):  # no Linux
            self._statm, self._status = FileIO("/proc/self/statm"), FileIO("/proc/self/status")

    @property
    def there(self) -> bool:
        return self._statm is not None

    def resident(self) -> tuple[int, int]:
        """The whole resident set, and of it what lies in files or is shared."""
        if self._statm is None:
            return 0, 0
        fields = os.pread(self._statm.fileno(), 128, 0).split()
        return int(fields[1]) * _PAGE, int(fields[2]) * _PAGE

    def high_water(self) -> int:
        """The most that was resident since the mark was last reset."""
        if self._status is None:
            return 0
        _, _, rest = os.pread(self._status.fileno(), 8192, 0).partition(b"VmHWM:")
        return int(rest.split(maxsplit=1)[0]) * 1024 if rest else 0

    def close(self) -> None:
        for file in (self._statm, self._status):
            if file is not None:
                file.close()
        self._statm = self._status = None


_meters: weakref.WeakSet[MemoryMeter] = weakref.WeakSet()
_resetting = threading.Lock()


def _reset_high_water() -> bool:
    """Let the kernel's mark begin anew at what is resident now; False where that is not allowed."""
    with _resetting:
        for meter in list(_meters):
            meter.sample()
        try:
            with open("/proc/self/clear_refs", "wb", buffering=0) as file:
                file.write(b"5")
        except OSError:
            return False
        for meter in list(_meters):
            meter.mark_was_reset()
        return True


class MemoryMeter:
    """Knows what the process holds, and keeps the peak.

    ``source`` says what the peak is: ``cgroup`` (what the group was charged, page cache included) or ``rss_anon`` (anonymous
    memory), or ``unknown`` where neither exists. Nothing between two looks is missed: the group keeps a peak of its own, and
    so does the kernel of the process, from which the mapped files are taken off. Only where a group keeps none (Linux before
    5.19) is it put together of both.

    Parameters
    ----------
    root : Path
        Where ``proc`` and ``sys`` are found, for the cgroup.

    Attributes
    ----------
    source : str
        As above.
    files_count : bool
        Whether what the group is charged for files counts in what is held; the peak holds it always.
    blind : bool
        Whether the kernel's mark says nothing of what came after it: then a peak is only seen by looking.
    """

    blind = False

    def __init__(self, root: Path = Path("/")) -> None:
        self._cgroup = own_cgroup(root)
        self._status = _Status()
        self.source = "cgroup" if self._cgroup else "rss_anon" if self._status.there else "unknown"
        self._peak = self._most_anonymous = 0
        self._mark = self._status.high_water()
        self._beside = 0  # what the group is charged beside our anonymous memory
        self.files_count = True
        if self._cgroup:
            self._beside = max(0, self._cgroup.used_bytes() - self.anonymous_bytes())
        _meters.add(self)
        self.sample()

    def now_bytes(self) -> int:
        """What counts against the budget now."""
        anonymous = self.anonymous_bytes()
        return max(anonymous, self._cgroup.used_bytes()) if self._cgroup and self.files_count else anonymous

    def base_bytes(self) -> int:
        """The same, with what the kernel holds for any process even where no cgroup counts it: alike in both cases."""
        anonymous = self.anonymous_bytes()
        return max(self.now_bytes(), anonymous + KERNEL_BYTES) if anonymous else 0

    def quick_bytes(self) -> int:
        """The same for every step: page cache that came since :meth:`settle`, and may go again, is left out."""
        return self.anonymous_bytes() + max(self._beside, KERNEL_BYTES)

    def anonymous_peak_bytes(self) -> int:
        """The most anonymous memory that was held since :meth:`begin`, and what the group was charged beside it."""
        self.sample()
        return self._most_anonymous + max(self._beside, KERNEL_BYTES)

    def leave_files(self) -> None:
        """From now on, files that the group is charged for are the kernel's to drop: near the smallest budget it will have to.

        What a process maps of its libraries is charged to whoever read it first, and grows with what the group may hold. It is
        no part of the smallest budget, which would be another one everywhere.
        """
        self.files_count, self._beside = False, 0

    def settle(self) -> None:
        """What is charged beside anonymous memory now is there to stay."""
        if self._cgroup and self.files_count:
            self._beside = max(0, self._cgroup.used_bytes() - self.anonymous_bytes())

    def begin(self) -> None:
        """Forget what the process held before now, as far as the kernel allows it."""
        if _reset_high_water():
            self._peak = self._most_anonymous = 0
            self.sample()
        else:
            self.blind = True

    def reopen(self) -> None:
        """Look at the process that this is now: a forked child is another."""
        self._status.reopen()
        self._mark = self._status.high_water()

    def sample(self) -> None:
        """Look now; cheap enough for every block."""
        resident, files = self._status.resident()
        mark = self._status.high_water()
        anonymous = resident - files
        # A mark that has not moved may be older than the meter.
        held = max(anonymous, mark - files) if mark > self._mark else anonymous
        self._most_anonymous = max(self._most_anonymous, held)
        if self._cgroup is not None:
            held = max(held + self._beside, self._cgroup.used_bytes())
        self._peak = max(self._peak, held)

    def mark_was_reset(self) -> None:
        """The kernel's mark begins anew, at what is resident."""
        self._mark = 0

    def peak_bytes(self) -> int:
        """The most that was held so far."""
        self.sample()
        if self._cgroup is not None and self._cgroup.peak is not None:
            with contextlib.suppress(OSError, ValueError):  # the group is gone: what was seen of it stays
                return int(self._cgroup.peak.read_text())
        return self._peak

    def anonymous_bytes(self) -> int:
        """Memory of the process that lies in no file."""
        resident, files = self._status.resident()
        return resident - files

    def close(self) -> None:
        """Close the files; the peak stays."""
        if self._status.there:
            self.sample()
            self._status.close()
        _meters.discard(self)


class Spike:
    """What a piece of work holds at the most beyond what was held before it: a context manager that tells ``nbytes``.

    By the kernel's own mark, so that nothing is missed; where that cannot be reset, a thread looks every few milliseconds.
    ``mapped_bytes`` is by how much the pages of mapped files grew: they are part of ``nbytes``, though nobody allocated them,
    and another time the same work finds them there. A forked child has to map all its code anew.
    """

    nbytes = mapped_bytes = 0

    def __enter__(self) -> Spike:
        self._status = _Status()
        self._by_mark = _reset_high_water()
        self._before, self._mapped = self._status.resident()
        self._most = 0
        self._done = threading.Event()
        self._thread = None
        if not self._by_mark and self._status.there:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self._most = max(self._most, self._status.resident()[0])

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._thread is not None:
            self._done.set()
            self._thread.join()
        most = self._status.high_water() if self._by_mark else self._most
        self.nbytes = max(0, most - self._before)
        self.mapped_bytes = max(0, self._status.resident()[1] - self._mapped)
        self._status.close()
