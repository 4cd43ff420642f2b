"""Names to implementations, imported only when asked for.

A registry maps a name to ``"module:attribute"``; adding an implementation is one new file and one line. Packages from
elsewhere add theirs through the entry-point group of the same name, without touching ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from swapless.errors import UnknownNameError


def exported(package: str, homes: Mapping[str, str], name: str) -> Any:
    """What a package exports as ``name`` from the module that ``homes`` says, imported now: for its ``__getattr__``.

    Raises
    ------
    AttributeError
        It exports no such name.
    """
    if name in homes:
        return getattr(import_module(homes[name]), name)
    raise AttributeError(f"module {package!r} has no attribute {name!r}")


class Registry:
    """Lazy table of one kind of implementation.

    Parameters
    ----------
    kind : str
        What the names stand for, as error messages say it: ``"policy"``.
    group : str
        Entry-point group in which other packages may add names.
    targets : dict of str to str
        Name to ``"module:attribute"``.
    """

    def __init__(self, kind: str, group: str, targets: dict[str, str]) -> None:
        self.kind = kind
        self._group = group
        self._targets = dict(targets)

    def names(self) -> list[str]:
        """All known names, ours and those of installed plug-ins, sorted."""
        return sorted({*self._targets, *(point.name for point in entry_points(group=self._group))})

    def get(self, name: str) -> Any:
        """The implementation of ``name``, imported now.

        Raises
        ------
        UnknownNameError
            No such name; the message lists the known ones and suggests the closest.
        """
        if name in self._targets:
            module, _, attribute = self._targets[name].partition(":")
            return getattr(import_module(module), attribute)
        for point in entry_points(group=self._group):
            if point.name == name:
                return point.load()
        raise UnknownNameError.of(self.kind, name, self.names())
