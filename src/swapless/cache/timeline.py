"""Time on a device: what the misses of a policy cost when every byte is charged and compute runs beside the reads.

Per block: attention and the router run, the distinct experts are known, all misses are issued at once, the shared expert and
the residents are computed while they stream, and each miss is computed as it lands. Reads for what a predictor foresees use
the link only while no demand read wants it, cannot be interrupted, and land in a staging area of their own beside the cache,
so that they never evict anything. A read ahead is *useful* if it is there when asked for, *late* if it is still under way,
else *wasted*.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from swapless.cache._timeline import Ahead, Costs, Times, timeline_calls
from swapless.cache.capacity import PoolKind, Pools
from swapless.cache.devices import DeviceProfile
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

    Raises
    ------
    UsageError
        A negative time.
    """

    attention_s: float = 1.0e-3
    shared_s: float = 0.3e-3
    expert_s: float = 0.1e-3
    landing_s: float = 0.0

    def __post_init__(self) -> None:
        if min(self.attention_s, self.shared_s, self.expert_s, self.landing_s) < 0:
            raise UsageError(message("A compute time must be at least 0 seconds.", got=str(self)))


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
    """

    policy: str
    device: str
    pools: Pools
    measured: np.ndarray
    tokens_of_call: np.ndarray
    times: Times
    expert_bytes: int

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
            "prefetch_reads": ahead,
            "prefetch_useful": int(self._sum("useful")),
            "prefetch_late": int(self._sum("late")),
            "prefetch_wasted": int(self._sum("wasted")),
        }


def timeline(
    trace: Trace,
    policy: str | Policy,
    capacity: float | int,
    device: DeviceProfile,
    *,
    block: BlockTime | None = None,
    pool: PoolKind = "layer",
    state: Literal["keep", "reset"] = "keep",
    interleave: int = 1,
    warmup_tokens: int = 0,
    expert_bytes: int | None = None,
    predicted: np.ndarray | None = None,
    lead: int = 1,
    width: int | None = None,
    staging_experts: int | None = None,
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
    predicted : float32 ndarray of shape (T, L, E), optional
        A predictor's scores for the rows of the trace, made with the same ``lead``; an expert with a score of 0 or less is
        never read ahead. Only forward calls of one row read ahead.
    lead : int
        MoE layers between the moment of the prediction and its use, at least 1. The first ``lead`` are foreseen as the token
        begins.
    width : int, optional
        Experts foreseen a MoE layer, by default K.
    staging_experts : int, optional
        Room for what was read ahead, by default 2 K; memory beside the cache.

    Returns
    -------
    Timeline
        Times and counts of every call.

    Raises
    ------
    CapacityError, UnknownNameError, UsageError, TraceFormatError
        A wrong argument; no size of an expert in header or arguments.
    """
    size = default_expert_bytes(trace) if expert_bytes is None else expert_bytes
    if size is None or size < 1:
        step = "Give expert_bytes, or a trace whose header has hidden_size and moe_intermediate_size."
        raise UsageError(message("The size of an expert is unknown.", got=size, step=step))
    if predicted is not None and predicted.shape != (len(trace), trace.num_moe_layers, trace.num_experts):
        wanted = f"(T, L, E) = {(len(trace), trace.num_moe_layers, trace.num_experts)}"
        raise UsageError(message("predicted has the wrong shape.", got=predicted.shape, allowed=wanted))
    width, room = trace.top_k if width is None else width, 2 * trace.top_k if staging_experts is None else staging_experts
    if lead < 1 or width < 1 or room < 1:
        what = "lead, width and staging_experts must be at least 1."
        raise UsageError(message(what, got=f"lead={lead}, width={width}, staging_experts={room}"))
    setup = prepare(trace, policy, capacity, pool=pool, state=state, interleave=interleave)
    calls, block = len(setup.plan.phase), block or BlockTime()
    costs = Costs(
        *(size / device.bytes_per_s, device.fixed_s, device.queue_depth),
        *(block.attention_s, block.shared_s, block.expert_s, block.landing_s),
    )
    scores = np.zeros((0, 0, 0), np.float32) if predicted is None else np.ascontiguousarray(predicted, np.float32)
    one = (np.array([lead], np.int64), np.array([width], np.int64), np.zeros(trace.num_moe_layers * width, np.int64))
    ahead = Ahead(scores, *one, np.zeros(2, np.int64), np.full(0 if predicted is None else room, -1, np.int64), np.zeros(room))
    times = Times(*(np.zeros(calls, np.float64) for _ in range(3)), *(np.zeros(calls, np.int64) for _ in range(5)))
    landed, clock = np.zeros(trace.num_experts), np.zeros(2)
    for piece in setup.pieces():
        timeline_calls(*piece, costs, ahead, landed, clock, times)
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
    )
