"""What can be refused, or said, before torch is imported: seconds earlier, and without a model half loaded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from swapless.errors import TraceMissingError, UnknownNameError, UsageError, message
from swapless.units import format_size

if TYPE_CHECKING:
    from swapless.cli.out import Out

__all__ = ["checkpoint", "finite", "memory", "policies", "prefetch", "share", "threads", "trace"]


def checkpoint(name: str) -> None:
    """Refuse a local checkpoint without a configuration that can be read; one of the hub is asked for later.

    Raises
    ------
    CheckpointError
        No such folder, none that may be read, or no ``config.json``.
    """
    from swapless.runtime.source import is_hub_id
    from swapless.store.headers import read_config

    if not is_hub_id(name):
        read_config(Path(name))


def prefetch(name: str) -> None:
    """Refuse what is neither a way of reading ahead nor a file.

    Raises
    ------
    UsageError
        As :func:`swapless.load`.
    """
    if name not in ("auto", "none") and name.partition(":")[0] != "gate" and not Path(name).is_file():
        what = "Unknown prefetch, and no file of that name."
        allowed = "auto, none, gate, gate:N, or the file of a saved predictor"
        raise UsageError(message(what, got=repr(name), allowed=allowed, step="Make one: swapless predict train."))


def finite(**given: float | None) -> None:
    """Refuse infinities and what is no number, which every range of the command line lets through.

    Raises
    ------
    UsageError
        One of them; the name of the option is that of the argument.
    """
    for name, value in given.items():
        if value is not None and not math.isfinite(value):
            raise UsageError(message(f"--{name.replace('_', '-')} must be a finite number.", got=value))


def trace(path: Path) -> None:
    """Refuse a trace that is not there.

    Raises
    ------
    TraceMissingError
        Nothing at ``path``.
    """
    if not path.exists():
        raise TraceMissingError(message("No such trace.", where=path))


def policies(names: list[str]) -> None:
    """Refuse names that no policy has.

    Raises
    ------
    UnknownNameError
        The message lists the known ones and suggests the closest.
    """
    from swapless.cache import POLICIES

    known = POLICIES.names()
    for name in names:
        if name not in known:
            raise UnknownNameError.of("policy", name, known)


def threads(wanted: int | None, out: Out) -> int | None:
    """So many threads as there are processors for, and a warning where more were wanted."""
    from swapless.processors import processors

    if wanted is None or wanted <= processors():
        return wanted
    out.warn(f"--threads {wanted} is more than the {processors()} processors here; computing with {processors()}.")
    return processors()


def memory(wanted: int | str | None, out: Out) -> None:
    """Warn of a budget that this machine, or the limit of its cgroups, can never give."""
    from swapless.runtime.cgroups import limit_bytes

    if isinstance(wanted, int) and wanted > limit_bytes():
        have = format_size(limit_bytes())
        out.warn(f"--memory {format_size(wanted)} is more than the {have} that this process may ever hold.")


def share(wanted: float | None, got: float, what: str, out: Out) -> None:
    """Say what a share became where only whole experts can be held."""
    if wanted is not None and abs(got - wanted) >= 0.005:
        out.note(f"Note: {100 * wanted:.3g}% became {100 * got:.3g}%, {what}: only whole experts are held.")
