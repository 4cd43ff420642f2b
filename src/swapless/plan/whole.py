"""A plan from a checkpoint's name and a budget alone: what the command line and ``swapless.plan`` ask for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from swapless.cache import DEFAULT_POLICY
from swapless.plan.hits import CurveHits, TraceHits
from swapless.plan.hub import local_or_headers
from swapless.plan.machine import machine
from swapless.plan.planner import plan as plan_opened
from swapless.plan.set_ups import Plan
from swapless.plan.speed import GATE_RECALL
from swapless.runtime.open import open_checkpoint
from swapless.trace import read_trace
from swapless.units import parse_size

Progress = Callable[[str, float], None]


def plan(
    checkpoint: str | Path,
    memory: str | int,
    *,
    trace: str | Path | None = None,
    context: int | None = None,
    policy: str = DEFAULT_POLICY,
    recall: float = GATE_RECALL,
    fresh: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """What a checkpoint would do on this machine within a budget, in each precision that it could be packed in.

    Of a model on the hub only configuration and headers are fetched.

    Parameters
    ----------
    checkpoint : str or Path
        Local folder (a checkpoint or a packed store), or hub id.
    memory : str or int
        What the whole process may hold: ``"8GiB"``, or bytes.
    trace : str or Path, optional
        A trace of this model, for its hit rates; by default those of the nearest model that is known.
    context, policy, recall
        As :func:`swapless.plan.planner.plan`.
    fresh : bool
        Measure this machine anew.
    progress : callable of (str, float), optional
        Told what is going on and the share done.

    Raises
    ------
    CheckpointError, UnsupportedFamilyError
        Whatever is wrong with the checkpoint.
    TraceError
        Whatever is wrong with the trace.
    BudgetError
        No set-up works; the message names the smallest budget that does.
    """
    memory_bytes = parse_size(memory)
    with TemporaryDirectory(prefix="swapless-") as folder:
        place, whole = local_or_headers(checkpoint, Path(folder), progress=progress)
        opened = open_checkpoint(place)
        hits: Any = CurveHits(opened, policy)
        if trace is not None:
            hits = TraceHits(read_trace(trace), opened, policy, name=Path(trace).name)
        measured = machine(fresh=fresh, progress=progress)
        options: Any = {"whole": whole, "context": context, "policy": policy, "recall": recall, "progress": progress}
        return plan_opened(opened, str(checkpoint), memory_bytes, measured, hits, **options)
