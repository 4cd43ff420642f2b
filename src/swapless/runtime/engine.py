"""Everything behind one loaded model: its calls, its slots, and what they did."""

from __future__ import annotations

import sys
import weakref
from collections import defaultdict
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import torch

from swapless.cache.serve import ExpertCache
from swapless.errors import ClosedError, IntegrityError, UnsupportedOperationError, message
from swapless.notation import Phase
from swapless.runtime.ahead import Lookahead
from swapless.runtime.block import decode_block, prefill_block
from swapless.runtime.budget import Budget
from swapless.runtime.compute import Experts, accumulator, routed
from swapless.runtime.crowd import Crowd, System
from swapless.runtime.fetch import Fetcher
from swapless.runtime.integrity import problems
from swapless.runtime.memory import MemoryMeter
from swapless.runtime.needs import Call, Needs
from swapless.runtime.nesting import Calls
from swapless.runtime.plain import check_plain, check_untraced
from swapless.runtime.pool import SlotPool
from swapless.runtime.room import Room
from swapless.runtime.routers import RouterTap
from swapless.runtime.routing import RoutingLog, Step
from swapless.runtime.stats import Stats
from swapless.runtime.store import Store
from swapless.runtime.texts import Texts
from swapless.runtime.turns import Turn, on_stack
from swapless.store.probe import Probe
from swapless.trace import Trace


class Engine:
    """Everything behind ``model.swapless``: cache, slots, reader threads and counters of one loaded model.

    Made by :func:`swapless.load`. One forward call at a time: the slots of a block are pinned for that call. Calls from several
    threads wait for each other; so does :meth:`close`.

    Attributes
    ----------
    budget : Budget
        Where the bytes go.
    probe : Probe
        What the read path did when the model was loaded.
    """

    def __init__(
        self,
        *,
        store: Store,
        cache: ExpertCache,
        pool: SlotPool,
        experts: Experts,
        budget: Budget,
        probe: Probe,
        meter: MemoryMeter,
        routing: RoutingLog,
        lookahead: Lookahead | None = None,
        needs: Needs | None = None,
    ) -> None:
        self.budget = budget
        self.probe = probe
        self._store, self._cache = store, cache
        self._pool = pool
        self._experts = experts
        self._meter = meter
        self._routing = routing
        self._fetcher = Fetcher(store, pool, budget, probe.depth, lookahead, cache.resident, cache.pool_slots)
        self._room = None if needs is None else Room(budget, needs, meter, pool, self._fetcher, cache)
        self.turn = Turn(self._begin_child)
        self._phase = Phase.PREFILL
        self._under_way: tuple[int, np.ndarray] | None = None
        own = weakref.proxy(self)  # an engine that is dropped is to be gone at once, without a garbage collection
        self.calls = Calls(routing, lambda: own._fetcher.counts["stall_s"], lambda step: own._go_on(step))
        self._crowd = Crowd(System(lambda: own._fetcher.reader_ids()))
        self._block: FrameType | None = None  # a frame and no flag: what Ctrl-C cut off is told from what is under way
        self._forked: str | None = None  # what it was at: only at rest, what its slots hold is certain
        self._closed = False
        self._peak = 0
        self.reset_stats()

    # -- what users call ---------------------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """Counters since the load or the last :meth:`reset_stats`."""
        counts = self._counts | self._fetcher.counts
        if self._fetcher.prefetcher is not None:
            counts |= self._fetcher.prefetcher.figures()
        taken_back = {phase: self.texts.num_taken_back(phase) for phase in Phase}
        for phase, rows in taken_back.items():
            counts[f"{phase.label}_tokens"] -= rows
        return Stats(
            **counts,
            taken_back_tokens=sum(taken_back.values()),
            first_token_s=self._first_token_s,
            peak_memory_bytes=max(self._peak, 0 if self._closed else self._meter.peak_bytes()),
            peak_memory_source=self._meter.source,
        )

    def reset_stats(self) -> None:
        """Start counting afresh; cache and trace stay as they are. The peak of memory is of the process and stays too."""
        with self.turn.lock:
            self._counts: dict[str, Any] = defaultdict(int)
            self._first_token_s: float | None = None
            self._fetcher.reset_counts()
            self.texts.count_from_here()

    @property
    def texts(self) -> Texts:
        """Which of the rows that were run make up which text."""
        return self._routing.texts

    def trace(self) -> Trace:
        """The routing so far, in the trace format: a document for each text, see :meth:`RoutingLog.trace`."""
        with self.turn.lock:
            return self._routing.trace()

    def reset_trace(self) -> None:
        """Forget the routing so far."""
        with self.turn.lock:
            self._routing.clear()

    def record_scores(self, tap: RouterTap | None) -> None:
        """Keep the router's output for every expert in the trace from now on; None ends it. Forgets the routing so far."""
        with self.turn.lock:
            self._routing.tap = tap

    def check_integrity(self, *, weights: bool = True) -> None:
        """Hold slots, cache, policy and reads against each other, between two forward calls or two blocks.

        Parameters
        ----------
        weights : bool
            Read every resident expert again and compare it with its slot, bit for bit. That takes memory beside the budget:
            a slot and a bounce buffer.

        Raises
        ------
        IntegrityError
            They disagree; the message says in what.
        UnsupportedOperationError
            Called while the experts of a block are computed.
        ReadError
            An expert cannot be read again.
        """
        with self.turn.lock:
            self._check_usable()
            if on_stack(self._block):
                raise UnsupportedOperationError(message("The engine is at work in a block.", step="Check it between two."))
            self._fetcher.collect()
            found = problems(self._store, self._cache, self._pool, self._fetcher, weights=weights)
            if found:
                raise IntegrityError(message("The engine's parts disagree.", got=" ".join(found[:4])))

    def close(self) -> None:
        """End the reader threads, close the files and give the slots back. The model cannot run any more.

        Waits for a forward call that another thread is at. A model that is dropped closes itself when it is collected.

        Raises
        ------
        UnsupportedOperationError
            Called from inside a forward call of the model, whose memory is in use.
        """
        with self.turn.lock:
            if self.calls.inside or on_stack(self._block):
                what = "A model cannot be closed from inside its own forward call."
                raise UnsupportedOperationError(message(what, step="Close it when the call has returned."))
            self._peak = max(self._peak, self._meter.peak_bytes())
            self._closed = True
            self._fetcher.close()
            self._pool.close()
            self._meter.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        what = "An offloaded model cannot be copied or pickled: its slots and reader threads belong to one process."
        raise UnsupportedOperationError(message(what, step="Load the checkpoint again where it is needed."))

    # -- what the model calls ----------------------------------------------------------------------------------------

    def whole_call(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one forward call of the whole model with its hooks: alone, and at rest afterwards whatever happened in it."""
        with self.turn.lock:
            self._check_usable()
            try:
                return self.calls.run(forward, args, kwargs)
            finally:
                if not self.calls.inside:
                    self._crowd.leave()

    def make_room(self, call: Call, phase: Phase) -> None:
        """A forward call of these sizes is about to begin: slots lend it what it holds beside the budget's parts.

        Raises
        ------
        BudgetError
            The budget has no room for it.
        """
        if self._room is not None:
            self._check_usable()
            rows = call.batch * call.new * self._routing.row_bytes
            self._room.make(call, decode=phase is Phase.DECODE, nested=self.calls.nested, rows_bytes=rows)

    def begin_step(self, step: Step) -> None:
        """A forward call of the whole model begins."""
        self._check_usable()
        self.calls.begin(step)
        self._go_on(step)

    def _go_on(self, step: Step) -> None:
        self._phase = step.phase
        if self.calls.inside:
            self._crowd.begin()
        if self._fetcher.prefetcher is not None:
            self._fetcher.prefetcher.begin(step)

    def end_step(self) -> None:
        """The forward call is complete."""
        done = self.calls.end()
        if done is None:
            return
        self._meter.sample()
        if self._room is not None:
            self._room.done(nested=self.calls.nested)
        decode = done.step.phase is Phase.DECODE
        done.add_to(self._counts)
        self._crowd.step_done(done.seconds, decode=decode)
        if not decode:
            self._first_token_s = done.seconds + (self._first_token_s or 0.0 if done.step.continues else 0.0)
        elif self._fetcher.prefetcher is not None:
            self._fetcher.prefetcher.token_done(done.seconds)

    def abandon_step(self) -> None:
        """Leave a forward call that is not the whole model's: its routing is not kept and its time not counted."""
        self.calls.abandon()

    def forward(self, module: Any, hidden_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """The experts' share of one MoE block, as transformers' experts interface has it."""
        check_untraced()
        check_plain("experts", hidden_TD, ids_TK, weights_TK)
        with self.turn.lock:
            if on_stack(self._block):
                what = "An offloaded model was called from inside its own experts, which are in use."
                raise UnsupportedOperationError(message(what, step="Call it from a hook of another module."))
            self._block = sys._getframe()
            try:
                return self._forward(module, hidden_TD, ids_TK, weights_TK)
            finally:
                self._block = None

    def _forward(self, module: Any, hidden_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        self._check_usable()
        moe_layer: int = module.swapless_moe_layer
        ids = ids_TK.numpy()
        if self._under_way is not None:
            self._come_to_rest()  # a call was cut off while it came to rest: a second Ctrl-C
        self._under_way = moe_layer, ids
        counts = self._counts
        fetched = self._fetcher.counts
        before = fetched["reads"], fetched["bytes_read"]
        try:
            self._routing.add(moe_layer, ids_TK, weights_TK)
            served = self._cache.request(moe_layer, ids, self._phase)
            if self._fetcher.prefetcher is not None:
                self._fetcher.collect()
                self._fetcher.prefetcher.chosen(moe_layer, ids_TK, served.experts.tolist())
            tokens, out = routed(hidden_TD, ids, weights_TK), accumulator(module, hidden_TD, weights_TK)
            if self._phase is Phase.DECODE:
                out = decode_block(self._fetcher, self._experts, module, moe_layer, served, tokens, out, hidden_TD)
            else:
                out = prefill_block(self._fetcher, self._experts, module, moe_layer, served, tokens, out)
            self._under_way = None
        except BaseException:
            self._come_to_rest()
            raise
        if self._meter.blind:
            self._meter.sample()
        if self._phase is Phase.PREFILL and self.calls.inside:
            self._crowd.block_done()
        if self._phase is Phase.DECODE:
            counts["requests"] += len(served.experts)
            counts["hits"] += int(served.hit.sum())
            counts["waves"] += served.waves
            counts["decode_reads"] += fetched["reads"] - before[0]
            counts["decode_bytes_read"] += fetched["bytes_read"] - before[1]
        return out.to(hidden_TD.dtype)

    def _check_usable(self) -> None:
        """Refuse a closed model, and make one usable that came into this process by a fork."""
        if self._closed:
            raise ClosedError(message("The model was closed.", step="Load it again with swapless.load."))
        if self._forked is None:
            return
        if self._forked == "at rest":
            self._fetcher.come_to_rest()
        else:
            self._cache.reset()
            self._fetcher.start_afresh()
        self._forked = None

    def _begin_child(self, alone: bool) -> None:
        """The process was forked, and this is the child: it has the slots, but neither reader threads nor compute threads."""
        self._forked = "at rest" if alone and not on_stack(self._block) else "at work"
        self._fetcher.begin_child()
        self._routing.begin_child()
        self._meter.reopen()
        self._crowd.begin_child()
        torch.set_num_threads(1)  # else OpenMP waits for ever for threads that the fork has not copied

    def _come_to_rest(self) -> None:
        """After an error or Ctrl-C: no read under way, and no slot that claims bytes it may not hold.

        Forgets the whole demand set: Ctrl-C may have struck before anybody knew which of it was missing. May be called again.
        """
        if self._under_way is None:
            return
        moe_layer, ids = self._under_way
        self._fetcher.come_to_rest()
        self._cache.forget(moe_layer, np.unique(ids[(ids >= 0) & (ids < self._cache.num_experts)]))
        self.abandon_step()
        self._under_way = None
