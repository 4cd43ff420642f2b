"""Replay a trace against a policy: the loop written once, and everything that is counted.

A policy only decides; requests, hits, reads, evictions and bytes are counted here. Warm-up and measured requests are disjoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from swapless.arrays import want, want_ids
from swapless.cache import POLICIES
from swapless.cache._loop import Tally, new_buffers, new_tally, replay_calls
from swapless.cache.belady import future_state
from swapless.cache.capacity import PoolKind, Pools, pools_for
from swapless.cache.policy import Policy, fresh_state
from swapless.cache.residency import empty_residency
from swapless.cache.schedule import Schedule, schedule
from swapless.errors import TraceFormatError, UsageError, message
from swapless.notation import Phase
from swapless.trace import Trace

RequestModel = Literal["token", "single"]
_CHUNK_CALLS = 8192


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replay:
    """What a policy did with a trace.

    Parameters
    ----------
    policy : str
        Its name.
    pools : Pools
        The cache it ran on.
    request_model : {"token", "single"}
        All K of a token judged on the state before it, or one at a time.
    schedule : Schedule
        The forward calls, in the order of the replay.
    measured : bool ndarray of shape (N,)
        Forward calls after the warm-up.
    tally : Tally
        Counts of each (forward call, MoE layer).
    tokens_of_call : int64 ndarray of shape (N,)
        Rows of each forward call.
    expert_bytes : int or None
        Size of one expert, where known.
    """

    policy: str
    pools: Pools
    request_model: RequestModel
    schedule: Schedule
    measured: np.ndarray
    tally: Tally
    tokens_of_call: np.ndarray
    expert_bytes: int | None

    def _decode(self) -> np.ndarray:
        return self.measured & (self.schedule.phase == int(Phase.DECODE))

    @property
    def requests(self) -> int:
        """Measured decode requests: one distinct expert of a MoE layer and forward call each."""
        return int(self.tally.requests[self._decode()].sum(dtype=np.int64))

    @property
    def hits(self) -> int:
        """Measured decode requests whose expert was resident before the call reached its MoE layer."""
        return int(self.tally.hits[self._decode()].sum(dtype=np.int64))

    @property
    def hit_rate(self) -> float:
        """Hits over requests; NaN without requests."""
        return self.hits / self.requests if self.requests else float("nan")

    @property
    def evictions(self) -> int:
        """Experts that went in measured calls of either phase."""
        return int(self.tally.evictions[self.measured].sum(dtype=np.int64))

    @property
    def warmup_requests(self) -> int:
        """Requests before the measured ones, of either phase."""
        return int(self.tally.requests[~self.measured].sum(dtype=np.int64))

    @property
    def prefill_reads(self) -> int:
        """Experts read in measured prefill calls; never part of a hit rate, for one read serves many tokens."""
        prefill = self.measured & ~self._decode()
        return int((self.tally.requests[prefill].astype(np.int64) - self.tally.hits[prefill]).sum())

    @property
    def decode_tokens(self) -> int:
        """Rows of the measured decode calls."""
        return int(self.tokens_of_call[self._decode()].sum())

    @property
    def bytes_read_per_token(self) -> float | None:
        """Bytes read in measured decode calls over their tokens; None where the size of an expert is unknown."""
        if self.expert_bytes is None or self.decode_tokens == 0:
            return None
        return (self.requests - self.hits) * self.expert_bytes / self.decode_tokens

    def by_document(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Documents in order of first appearance, and their measured decode hits and requests (a call counts for the
        document of its first row)."""
        chosen = self._decode()
        documents, first, inverse = np.unique(self.schedule.document, return_index=True, return_inverse=True)
        sums = [
            np.bincount(inverse[chosen], counts[chosen].sum(axis=1, dtype=np.int64), minlength=len(documents)).astype(np.int64)
            for counts in (self.tally.hits, self.tally.requests)
        ]
        order = np.argsort(first, kind="stable")
        return documents[order], sums[0][order], sums[1][order]

    def row(self) -> dict[str, Any]:
        """The figures as one flat row, for tables and JSON."""
        return {
            "policy": self.policy,
            "capacity_fraction": self.pools.capacity_fraction,
            "capacity_experts": self.pools.capacity_experts,
            "pool": self.pools.kind,
            "request_model": self.request_model,
            "requests": self.requests,
            "hits": self.hits,
            "hit_rate": None if not self.requests else self.hit_rate,
            "bytes_read_per_token": self.bytes_read_per_token,
            "evictions": self.evictions,
            "decode_tokens": self.decode_tokens,
            "warmup_requests": self.warmup_requests,
            "prefill_reads": self.prefill_reads,
            "streamed": int(self.tally.streamed[self.measured].sum(dtype=np.int64)),
            "expert_bytes": self.expert_bytes,
        }


def default_expert_bytes(trace: Trace, bits: float | None = None) -> int | None:
    """Bytes of one expert: as the header says, else three matrices D x F of 16 bits, where it says D and F.

    With ``bits`` a weight it is three such matrices in any case.
    """
    hidden, inner = trace.header.hidden_size, trace.header.moe_intermediate_size
    if bits is None and trace.header.expert_bytes:
        return trace.header.expert_bytes
    return None if hidden is None or inner is None else int(3 * hidden * inner * (bits or 16) / 8)


def replay(
    trace: Trace,
    policy: str | Policy = "lru",
    capacity: float | int | Pools = 0.25,
    *,
    pool: PoolKind = "layer",
    request_model: RequestModel = "token",
    state: Literal["keep", "reset"] = "keep",
    interleave: int = 1,
    warmup_tokens: int = 0,
    expert_bytes: int | None = None,
    advance: Callable[[float], None] | None = None,
) -> Replay:
    """Replay ``trace`` against ``policy``.

    Parameters
    ----------
    trace : Trace
        Rows that share a ``step`` are one forward call; without steps each row is one, served as decode.
    policy : str or Policy
        A registered name, or a policy object (the engine's own, for instance); it is left as it was.
    capacity : float, int or Pools
        See :func:`~swapless.cache.capacity.pools_for`; or what it gave.
    pool : {"layer", "shared", "floor"}
        As there.
    request_model : {"token", "single"}
        ``token``: the demand set of a forward call and MoE layer is judged on the state before it and pinned as a whole.
        ``single``: one request after the other, in the order of the list.
    state : {"keep", "reset"}
        Whether cache and policy live on from document to document.
    interleave : int
        Documents that take turns.
    warmup_tokens : int
        Tokens not counted, at the start of the replay, or of every document if the state is reset.
    expert_bytes : int, optional
        Size of one expert; by default as the header says, else three bf16 matrices of its shape.
    advance : callable, optional
        Called with the share done, from 0 to 1.

    Returns
    -------
    Replay
        The counts.

    Raises
    ------
    CapacityError, UnknownNameError, UsageError
        A wrong argument.
    TraceFormatError
        The policy needs router scores and the trace has none.
    """
    setup = prepare(trace, policy, capacity, pool=pool, request_model=request_model, state=state, interleave=interleave)
    if warmup_tokens < 0:
        raise UsageError(message("warmup_tokens must be at least 0.", got=warmup_tokens))
    plan = setup.plan
    tally = new_tally(len(plan.phase), trace.num_moe_layers)
    for piece in setup.pieces():
        replay_calls(*piece, tally)
        if advance is not None:
            advance(piece[9] / len(plan.phase))
    lengths = np.diff(plan.starts)
    return Replay(
        policy=setup.policy.name,
        pools=setup.pools,
        request_model=request_model,
        schedule=plan,
        measured=setup.measured(warmup_tokens),
        tally=tally,
        tokens_of_call=lengths,
        expert_bytes=default_expert_bytes(trace) if expert_bytes is None else expert_bytes,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Setup:
    """Everything that a pass over a trace starts from: shared by replay and timeline."""

    trace: Trace
    policy: Any
    pools: Pools
    plan: Schedule
    resets: np.ndarray
    single: bool

    def measured(self, warmup_tokens: int) -> np.ndarray:
        """Which forward calls come after the warm-up, which starts anew with every empty cache."""
        lengths = np.diff(self.plan.starts)
        before = np.cumsum(lengths) - lengths
        start = self.resets[np.searchsorted(self.resets, np.arange(len(lengths)), side="right") - 1]
        return np.asarray(before - before[start] >= warmup_tokens)

    def pieces(self) -> Iterator[tuple[Any, ...]]:
        """Arguments of the compiled loop, some thousand calls at a time; a fresh cache and policy after every reset."""
        trace, plan, policy, pools = self.trace, self.plan, self.policy, self.pools
        layers, experts = trace.num_moe_layers, trace.num_experts
        ids = np.ascontiguousarray(_checked_ids(trace)).view()
        ids.flags.writeable = False
        buffers = new_buffers(experts, int(np.diff(plan.starts).max()) * trace.top_k)
        optimum = getattr(policy, "optimum", False)
        if optimum:
            state = future_state(policy.state_type, ids, plan.rows, plan.starts, experts, single=self.single)
        ends = np.append(self.resets[1:], len(plan.phase))
        for start, end in zip(self.resets.tolist(), ends.tolist()):
            residency = empty_residency(layers, experts, pools.pool_of_layer, pools.pool_slots, pools.floor)
            if not optimum:
                state = fresh_state(policy, layers, experts, len(pools.pool_slots))
            for first in range(start, end, _CHUNK_CALLS):
                last = min(end, first + _CHUNK_CALLS)
                scores = _scores(trace, policy, plan, first, last)
                calls = (plan.rows, plan.starts, plan.phase, plan.begins, first, last)
                yield (state, residency, ids, scores, *calls, experts, self.single, buffers)


def prepare(
    trace: Trace,
    policy: str | Policy,
    capacity: float | int | Pools,
    *,
    pool: PoolKind = "layer",
    request_model: RequestModel = "token",
    state: Literal["keep", "reset"] = "keep",
    interleave: int = 1,
) -> Setup:
    """Check the arguments of :func:`replay` and lay out the pass.

    Raises
    ------
    CapacityError, UnknownNameError, UsageError, TraceFormatError
        As there.
    """
    if request_model not in ("token", "single"):
        raise UsageError(message("Unknown request model.", got=repr(request_model), allowed="token, single"))
    if state not in ("keep", "reset"):
        raise UsageError(message("Unknown treatment of the state.", got=repr(state), allowed="keep, reset"))
    if state == "reset" and interleave > 1:
        raise UsageError("Documents that share the cache cannot each start with an empty one: interleave with state keep.")
    chosen: Any = POLICIES.get(policy)() if isinstance(policy, str) else policy
    if getattr(chosen, "needs_scores", False) and trace.router_scores is None:
        what, step = f"The policy {chosen.name!r} needs the column router_scores.", "Record with `swapless record --scores`."
        raise TraceFormatError(message(what, got="a trace without", step=step))
    if not len(trace):
        raise UsageError(message("A replay needs at least one token.", got="0 rows"))
    plan = schedule(trace, interleave=interleave)
    shape = (trace.num_moe_layers, trace.num_experts, trace.top_k)
    return Setup(
        trace=trace,
        policy=chosen,
        pools=capacity if isinstance(capacity, Pools) else pools_for(capacity, *shape, pool),
        plan=plan,
        resets=np.flatnonzero(plan.begins) if state == "reset" else np.zeros(1, np.int64),
        single=request_model == "single",
    )


def _checked_ids(trace: Trace) -> np.ndarray:
    """Ids of a trace, which may have been made without checks or changed after them: compiled code trusts them."""
    ids = want(trace.expert_ids, "expert_ids", np.int16, (len(trace), trace.num_moe_layers, trace.top_k))
    return want_ids(ids, trace.num_experts)


def _scores(trace: Trace, policy: Any, plan: Schedule, first: int, last: int) -> np.ndarray:
    if trace.router_scores is None or not (getattr(policy, "needs_scores", False) or getattr(policy, "uses_scores", False)):
        return np.zeros((0, 0, 0), np.float32)
    scores = trace.router_scores[plan.rows[plan.starts[first] : plan.starts[last]]].astype(np.float32)
    return want(scores, "router_scores", np.float32, (None, trace.num_moe_layers, trace.num_experts))
