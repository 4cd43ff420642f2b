"""Foreign traces: one file a format, recognised by content, or named on request.

An importer is a module with ``matches(path) -> bool``, which looks at the content, and ``load(path, model_id) -> Trace``.
"""

from __future__ import annotations

import os
from pathlib import Path

from swapless.errors import TraceFormatError, TraceMissingError, message
from swapless.registry import Registry
from swapless.trace.parquet import read_trace
from swapless.trace.trace import Trace

IMPORTERS = Registry(
    "importer",
    "swapless.importers",
    {
        "moe-beyond": "swapless.trace.importers.moe_beyond:IMPORTER",
        "npz": "swapless.trace.importers.npz:IMPORTER",
        "routed-experts": "swapless.trace.importers.routed_experts:IMPORTER",
    },
)


def load_trace(
    path: str | os.PathLike[str],
    *,
    importer: str | None = None,
    model_id: str | None = None,
    columns: tuple[str, ...] | None = None,
) -> Trace:
    """Read a trace in our own form or in a foreign one.

    Parameters
    ----------
    path : path
        A trace, or what an importer reads.
    importer : str, optional
        Name of the importer; found by content when left out.
    model_id : str, optional
        Model of a foreign trace that names none.
    columns : tuple of str, optional
        As :func:`swapless.trace.read_trace`; importers read all that there is.

    Raises
    ------
    TraceFormatError
        No known form.
    UnknownNameError
        No such importer.
    TraceMissingError
        Nothing at ``path``.
    """
    place = Path(path)
    if importer is not None:
        return IMPORTERS.get(importer).load(place, model_id)
    if not place.exists():
        raise TraceMissingError(message("No such trace.", where=path))
    if place.is_file() and place.suffix == ".parquet":
        return read_trace(place, columns=columns)
    for name in IMPORTERS.names():
        found = IMPORTERS.get(name)
        if found.matches(place):
            return found.load(place, model_id)
    if place.is_file():
        return read_trace(place, columns=columns)
    known = "a Parquet trace, or what these read: " + ", ".join(IMPORTERS.names())
    raise TraceFormatError(message("This is no trace.", where=path, allowed=known))
