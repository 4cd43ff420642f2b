"""Many policies at many capacities over one trace, in parallel processes: the rows of ``swapless simulate``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from swapless.cache.capacity import PoolKind, pools_for
from swapless.cache.devices import DeviceProfile
from swapless.cache.foresight import Foresight
from swapless.cache.replay import RequestModel, replay
from swapless.cache.timeline import BlockTime, staging_room, timeline
from swapless.errors import TraceValueError, UsageError, message
from swapless.processors import processors
from swapless.trace import Trace
from swapless.trace.select import require_decode

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
    foresight: Foresight | None = None,
    jobs: int | None = None,
    advance: Callable[[float], None] | None = None,
) -> list[dict[str, Any]]:
    """One row for each policy and capacity, in that order; with a foresight each is followed by the one that reads ahead.

    Both hold the same memory: the room for what is read ahead is taken out of the cache.

    Parameters
    ----------
    trace, policies, capacities, conditions
        What to replay.
    foresight : Foresight, optional
        Of this trace; needs a device.
    jobs : int, optional
        Processes; by default one a core, and this one alone for little work.
    advance : callable, optional
        Called with the share done.

    Returns
    -------
    list of dict
        Rows of :meth:`~swapless.cache.replay.Replay.row`; with a device also those of the timeline and the floor: the
        larger of compute and the optimum's bytes over the bandwidth; and of a row that reads ahead its speed and bytes over
        those of the row before it.

    Raises
    ------
    CapacityError, UnknownNameError, UsageError, TraceFormatError
        As the replay.
    TraceValueError
        There is no decode step to judge, or none after the warm-up.
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
    require_decode(trace)
    if foresight is not None and conditions.device is None:
        raise UsageError("Reading ahead takes time on a device: name one, as 'NVMe Gen4' (--device).")
    ways = (None,) if foresight is None else (None, foresight.check(trace))
    asked = [(policy, capacity, way) for policy in policies for capacity in capacities for way in ways]
    extra = [] if conditions.device is None or OPTIMUM in policies else [(OPTIMUM, capacity, None) for capacity in capacities]
    work = asked + extra
    small = replace(trace, token=None, token_id=None, gate_weights=None)  # what processes need, and no more
    enough = trace.expert_ids.size * len(work) >= _WORTH_A_PROCESS
    processes = min(len(work), jobs or (processors() if enough else 1))
    tasks = (delayed(_numbered)(i, small, *item, conditions) for i, item in enumerate(work))
    rows: dict[int, dict[str, Any]] = {}
    for number, row in Parallel(n_jobs=processes, return_as="generator_unordered")(tasks):
        rows[number] = row
        if advance is not None:
            advance(len(rows) / len(work))
    if any(row["requests"] == 0 for row in rows.values()):
        warmup = conditions.warmup_tokens
        what = "The warm-up leaves no decode step to judge." if warmup else "The decode steps of the trace ask for no expert."
        got = f"{warmup} of {len(trace)} tokens" if warmup else None
        raise TraceValueError(message(what, got=got, step="Lower --warmup." if warmup else None))
    if conditions.device is not None:
        best = {work[i][1]: row for i, row in rows.items() if work[i][0] == OPTIMUM and work[i][2] is None}
        for number, (_, capacity, way) in enumerate(asked):
            row, without = rows[number], rows[number - 1] if way else None
            link = best[capacity]["bytes_read_per_token"] / conditions.device.bytes_per_s
            row["floor_s_per_token"] = max(row["compute_s_per_token"], link)
            for name in ("tokens_per_s", "bytes_moved_per_token"):
                row[f"{name}_ratio"] = row[name] / without[name] if without and row[name] and without[name] else None
    return [rows[number] for number in range(len(asked))]


def _numbered(
    number: int, trace: Trace, policy: str, capacity: float | int, foresight: Foresight | None, conditions: Conditions
) -> tuple[int, dict[str, Any]]:
    """One row, as a process of its own computes it."""
    options: dict[str, Any] = {
        name: getattr(conditions, name) for name in ("pool", "state", "interleave", "warmup_tokens", "expert_bytes")
    }
    top_k, staging = trace.top_k, 0
    pools = pools_for(capacity, trace.num_moe_layers, trace.num_experts, top_k, conditions.pool)
    if foresight is not None and conditions.device is not None:
        sizes: dict[str, Any] = {"block": conditions.block, "expert_bytes": conditions.expert_bytes}
        pools, staging = pools.less(staging_room(foresight, trace, conditions.device, **sizes), top_k)
        foresight = replace(foresight, staging_experts=staging)
    found = replay(trace, policy, pools, request_model=conditions.request_model, **options)
    row: dict[str, Any] = {**found.row(), "state": conditions.state, "tokens_per_s": None}
    if conditions.device is not None:
        timed = timeline(trace, policy, pools, conditions.device, block=conditions.block, foresight=foresight, **options)
        row |= {**timed.row(), "staging_experts": staging}
    return number, row
