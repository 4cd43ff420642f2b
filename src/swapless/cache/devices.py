"""Devices that hold experts: how fast one comes from there. Profiles are data (``devices.json``), each with its source."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from importlib.resources import files

from swapless.errors import DeviceProfileError, UnknownNameError, message


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """A read path.

    Parameters
    ----------
    name : str
        What it is called.
    bytes_per_s : float
        Bandwidth, shared by all reads in flight; above 0.
    fixed_s : float
        Time of a read beside its transfer; reads in flight overlap theirs.
    queue_depth : int
        Reads in flight at once, at least 1.
    source : str
        Where the figures come from.

    Raises
    ------
    DeviceProfileError
        A figure that cannot be.
    """

    name: str
    bytes_per_s: float
    fixed_s: float = 0.0
    queue_depth: int = 1
    source: str = ""

    def __post_init__(self) -> None:
        for figure, least in (("bytes_per_s", math.ulp(0.0)), ("fixed_s", 0.0), ("queue_depth", 1)):
            value = getattr(self, figure)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value < least or (figure == "queue_depth" and value != int(value)):
                allowed = {"bytes_per_s": "above 0", "fixed_s": "at least 0", "queue_depth": "an int of at least 1"}[figure]
                what = f"The device profile {self.name!r} cannot be."
                raise DeviceProfileError(message(what, where=figure, got=repr(value), allowed=allowed))


def device_profiles() -> dict[str, DeviceProfile]:
    """All profiles that come with the package, by name."""
    rows = json.loads(files("swapless.cache").joinpath("devices.json").read_text(encoding="utf-8"))
    return {row["name"]: DeviceProfile(**row) for row in rows}


def device_profile(name: str) -> DeviceProfile:
    """The profile of that name, whatever its case.

    Raises
    ------
    UnknownNameError
        No such device; the message lists the known ones and suggests the closest.
    """
    known = device_profiles()
    for profile in known.values():
        if profile.name.casefold() == name.casefold():
            return profile
    raise UnknownNameError.of("device", name, known)
