"""Many policies at many capacities over one trace, in parallel processes: the rows of ``swapless simulate``."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from swapless.cache.capacity import PoolKind
from swapless.cache.devices import DeviceProfile
from swapless.cache.replay import RequestModel, replay
from swapless.cache.timeline import BlockTime, timeline
from swapless.trace import Trace

OPTIMUM = "belady_bypass"
_WORTH_A_PROCESS = 20_000_000
"""Requests of a whole sweep below which starting processes takes longer than the replay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What all rows of a sweep share; see :func:`~swapless.cache.replay.replay`."""

    pool: PoolKind = "layer"
    request_model: RequestModel = "token"
    state: Literal["keep", "reset"] = "keep"
    interleave: int = 1
    warmup_tokens: int = 0
    expert_bytes: int | None = None
    device: DeviceProfile | None = None
    block: BlockTime | None = None


def sweep(
    trace: Trace,
    policies: Sequence[str],
    capacities: Sequence[float | int],
    conditions: Conditions,
    *,
    jobs: int | None = None,
    advance: Callable[[float], None] | None = None,
) -> list[dict[str, Any]]:
    """One row for each policy and capacity, in that order.

    Parameters
    ----------
    trace, policies, capacities, conditions
        What to replay.
    jobs : int, optional
        Processes; by default one a core, and this one alone for little work.
    advance : callable, optional
        Called with the share done.

    Returns
    -------
    list of dict
        Rows of :meth:`~swapless.cache.replay.Replay.row`; with a device also those of the timeline and the floor: the
        larger of compute and the optimum's bytes over the bandwidth.

    Raises
    ------
    CapacityError, UnknownNameError, UsageError, TraceFormatError
        As the replay.
    """
    from joblib import Parallel, delayed

    from swapless.cache.replay import prepare

    for policy in policies:  # a wrong argument is refused before any process starts
        for capacity in capacities:
            prepare(
                trace.rows(slice(0, 1)),
                policy,
                capacity,
                pool=conditions.pool,
                request_model=conditions.request_model,
                state=conditions.state,
                interleave=1 if trace.step is None else conditions.interleave,
            )
    asked = [(policy, capacity) for policy in policies for capacity in capacities]
    extra = [] if conditions.device is None or OPTIMUM in policies else [(OPTIMUM, capacity) for capacity in capacities]
    work = asked + extra
    small = replace(trace, token=None, token_id=None, gate_weights=None)  # what processes need, and no more
    enough = trace.expert_ids.size * len(work) >= _WORTH_A_PROCESS
    processes = min(len(work), jobs or (os.cpu_count() or 1 if enough else 1))
    tasks = (delayed(_numbered)(i, small, *item, conditions) for i, item in enumerate(work))
    rows: dict[int, dict[str, Any]] = {}
    for number, row in Parallel(n_jobs=processes, return_as="generator_unordered")(tasks):
        rows[number] = row
        if advance is not None:
            advance(len(rows) / len(work))
    if conditions.device is not None:
        best = {work[i][1]: row for i, row in rows.items() if work[i][0] == OPTIMUM}
        for number, (_, capacity) in enumerate(asked):
            row = rows[number]
            link = best[capacity]["bytes_read_per_token"] / conditions.device.bytes_per_s
            row["floor_s_per_token"] = max(row["compute_s_per_token"], link)
    return [rows[number] for number in range(len(asked))]


def _numbered(
    number: int, trace: Trace, policy: str, capacity: float | int, conditions: Conditions
) -> tuple[int, dict[str, Any]]:
    """One row, as a process of its own computes it."""
    options: dict[str, Any] = {
        name: getattr(conditions, name) for name in ("pool", "state", "interleave", "warmup_tokens", "expert_bytes")
    }
    found = replay(trace, policy, capacity, request_model=conditions.request_model, **options)
    row: dict[str, Any] = {**found.row(), "tokens_per_s": None}
    if conditions.device is not None:
        row |= timeline(trace, policy, capacity, conditions.device, block=conditions.block, **options).row()
    return number, row
