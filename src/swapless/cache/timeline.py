"""Time on a device: what the misses of a policy cost when every byte is charged and compute runs beside the reads.

Per block: attention and the router run, the distinct experts are known, all misses are issued at once, the shared expert and
the residents are computed while they stream, and each miss is computed as it lands. Compute and reads may slow each other
(``cache/pace``).

Reads for what a predictor foresees land in a staging area beside the cache, so that they never evict anything, and begin only
while the link is idle. They cannot be interrupted, so one may hold up the demand reads that come next. It is begun if it is
expected to save more than it wastes: p times the part of it that fits before the next demand read can come, against 1 - p times
the rest. p is not the predictor's own word but what such a word came to so far: of all experts that were foreseen as this
likely and were not resident, the share that was used. That is known whether or not they were read, and so costs no trials; it
makes any score a probability, for this cache and policy. A read ahead is *useful* if it is there when asked for, *late* if it
is still under way, else *wasted*.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from swapless.cache._timeline import Ahead, Costs, Times, timeline_calls
from swapless.cache.capacity import PoolKind, Pools
from swapless.cache.devices import DeviceProfile
from swapless.cache.foresight import LEVELS, Foresight
from swapless.cache.policy import Policy
from swapless.cache.replay import default_expert_bytes, prepare
from swapless.errors import UsageError, message
from swapless.notation import Phase
from swapless.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTime:
    """Seconds of one block's parts on the machine that computes.

    The default splits the 1.9 ms a block of DeepSeek-V2-Lite (MoE-Infinity's 50 ms a token on an RTX A5000).

    Parameters
    ----------
    attention_s, shared_s, expert_s : float
        Attention and router, what runs beside the routed experts, and one routed expert.
    landing_s : float
        What an expert that has to be waited for costs the computing side besides: its copy into the slot, which takes
        processor and memory from compute. Counted as stall.
    pace_beside_reads : float
        Speed of compute while the experts of its block are being read, over its speed alone: readers, drivers and host want
        processor and memory too. What is lost by it counts as stall.
    reading_beside_compute : float
        Speed of reads while experts are computed, over their speed alone.

    Raises
    ------
    UsageError
        A negative time, or a share outside of (0, 1].
    """

    attention_s: float = 1.0e-3
    shared_s: float = 0.3e-3
    expert_s: float = 0.1e-3
    landing_s: float = 0.0
    pace_beside_reads: float = 1.0
    reading_beside_compute: float = 1.0

    def __post_init__(self) -> None:
        if min(self.attention_s, self.shared_s, self.expert_s, self.landing_s) < 0:
            raise UsageError(message("A compute time must be at least 0 seconds.", got=str(self)))
        if not (0 < self.pace_beside_reads <= 1 and 0 < self.reading_beside_compute <= 1):
            what = "pace_beside_reads and reading_beside_compute must be above 0 and at most 1."
            raise UsageError(message(what, got=str(self)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Timeline:
    """When everything happened.

    Parameters
    ----------
    policy, device : str
        Their names.
    pools : Pools
        The cache.
    measured : bool ndarray of shape (N,)
        Decode calls after the warm-up.
    tokens_of_call : int64 ndarray of shape (N,)
        Rows of each call.
    times : Times
        Of each call.
    expert_bytes : int
        Size of one expert.
    foresight : Foresight or None
        What reads were made ahead by.
    """

    policy: str
    device: str
    pools: Pools
    measured: np.ndarray
    tokens_of_call: np.ndarray
    times: Times
    expert_bytes: int
    foresight: Foresight | None = None

    def _sum(self, name: str) -> Any:
        return getattr(self.times, name)[self.measured].sum()

    @property
    def tokens(self) -> int:
        """Tokens measured."""
        return int(self.tokens_of_call[self.measured].sum())

    @property
    def seconds(self) -> float:
        """Their time: compute and stall."""
        return float(self._sum("compute_s") + self._sum("stall_s"))

    @property
    def tokens_per_s(self) -> float:
        """Tokens over seconds; NaN without tokens."""
        return self.tokens / self.seconds if self.seconds else float("nan")

    def row(self) -> dict[str, Any]:
        """The figures as one flat row."""
        tokens = max(1, self.tokens)
        reads, ahead = int(self._sum("reads")), int(self._sum("ahead"))
        return {
            "device": self.device,
            "tokens_per_s": self.tokens_per_s if self.tokens else None,
            "compute_s_per_token": float(self._sum("compute_s")) / tokens,
            "stall_s_per_token": float(self._sum("stall_s")) / tokens,
            "bytes_moved_per_token": (reads + ahead) * self.expert_bytes / tokens,
            "demand_reads": reads,
            "prefetch": None if self.foresight is None else self.foresight.predictor,
            "lead": None if self.foresight is None else self.foresight.lead,
            "predictor_s_per_token": None if self.foresight is None else self.foresight.token_s,
            "prefetch_reads": ahead,
            "prefetch_useful": int(self._sum("useful")),
            "prefetch_late": int(self._sum("late")),
            "prefetch_wasted": int(self._sum("wasted")),
        }


def timeline(
    trace: Trace,
    policy: str | Policy,
    capacity: float | int | Pools,
    device: DeviceProfile,
    *,
    block: BlockTime | None = None,
    pool: PoolKind = "layer",
    state: Literal["keep", "reset"] = "keep",
    interleave: int = 1,
    warmup_tokens: int = 0,
    expert_bytes: int | None = None,
    foresight: Foresight | None = None,
    advance: Callable[[float], None] | None = None,
) -> Timeline:
    """Time every forward call of ``trace`` on ``device``.

    Parameters
    ----------
    trace, policy, capacity, pool, state, interleave, warmup_tokens, expert_bytes, advance
        As in :func:`~swapless.cache.replay.replay`; requests are judged token at once.
    device : DeviceProfile
        Where the experts come from.
    block : BlockTime, optional
        What computing takes.
    foresight : Foresight, optional
        Read ahead by this. Its staging area is memory beside the cache. Only forward calls of one row read ahead.

    Returns
    -------
    Timeline
        Times and counts of every call.

    Raises
    ------
    CapacityError, UnknownNameError, UsageError, TraceFormatError
        A wrong argument; no size of an expert in header or arguments.
    """
    size = _known_bytes(trace, expert_bytes)
    if foresight is None:
        seen = Foresight(predictor="none", lead=1, levels=np.zeros((0, 0, 0), np.uint8), staging_experts=0)
    else:
        seen = foresight.check(trace)
    setup = prepare(trace, policy, capacity, pool=pool, state=state, interleave=interleave)
    calls, block = len(setup.plan.phase), block or BlockTime()
    costs = Costs(
        *(size / device.bytes_per_s, device.fixed_s, device.queue_depth),
        *(block.attention_s, block.shared_s, block.expert_s, block.landing_s),
        *(block.pace_beside_reads, block.reading_beside_compute),
    )
    ahead = _ahead(seen, trace, staging_room(seen, trace, device, block=block, expert_bytes=size))
    times = Times(*(np.zeros(calls, np.float64) for _ in range(3)), *(np.zeros(calls, np.int64) for _ in range(5)))
    landings, clock = np.zeros(trace.num_experts), np.zeros(2)
    for piece in setup.pieces():
        timeline_calls(*piece, costs, ahead, landings, clock, times)
        if advance is not None:
            advance(piece[9] / calls)
    return Timeline(
        policy=setup.policy.name,
        device=device.name,
        pools=setup.pools,
        measured=setup.measured(warmup_tokens) & (setup.plan.phase == int(Phase.DECODE)),
        tokens_of_call=np.diff(setup.plan.starts),
        times=times,
        expert_bytes=size,
        foresight=foresight,
    )


def staging_room(
    foresight: Foresight,
    trace: Trace,
    device: DeviceProfile,
    *,
    block: BlockTime | None = None,
    expert_bytes: int | None = None,
) -> int:
    """Experts for which the staging area has room: as many as the foresight asks for.

    If it leaves that open, what the link can carry while a block computes, one more, and twice that for a lead of several MoE
    layers, but no more than K for each. More would only make the cache smaller; on slow links fewer pay better.

    Raises
    ------
    UsageError
        No size of an expert in header or arguments.
    """
    if foresight.staging_experts is not None:
        return foresight.staging_experts
    block = block or BlockTime()
    read_s = _known_bytes(trace, expert_bytes) / device.bytes_per_s + device.fixed_s
    computing_s = block.attention_s + block.shared_s + trace.top_k * block.expert_s
    carried = math.ceil(min(trace.top_k, computing_s / read_s))
    return min(trace.top_k, 1 + carried) * min(2, foresight.lead_layers())


def _known_bytes(trace: Trace, expert_bytes: int | None) -> int:
    size = default_expert_bytes(trace) if expert_bytes is None else expert_bytes
    if size is None or size < 1:
        step = "Give --expert-bytes SIZE (expert_bytes in Python)."
        raise UsageError(message("The size of an expert is unknown.", got=size, step=step))
    return size


def _ahead(foresight: Foresight, trace: Trace, room: int) -> Ahead:
    """State of reading ahead, before the first token."""
    width = min(foresight.width or trace.top_k, trace.num_experts)
    return Ahead(
        levels=np.ascontiguousarray(foresight.levels),
        lead=np.array([foresight.lead_layers()]),
        width=np.array([width]),
        pass_s=np.array([foresight.token_s / foresight.passes()]),
        asked=np.zeros(LEVELS, np.int64),
        used=np.zeros(LEVELS, np.int64),
        queue=np.zeros(trace.num_moe_layers * width, np.int64),
        queued=np.zeros(trace.num_moe_layers * width, np.uint8),
        ends=np.zeros(2, np.int64),
        staged=np.full(room, -1, np.int64),
        lands=np.zeros(room),
    )
