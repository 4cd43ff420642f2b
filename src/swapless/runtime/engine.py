"""The loop of one MoE block: what is needed, what is missing, compute what is here while the rest arrives.

Decode reads all misses of a wave at once and computes residents meanwhile. Prefill walks the experts in ascending order and
reads ahead of itself; an expert that gets no slot passes through a staging slot. Either way outputs are added in ascending
expert id and no expert's tokens are split, so the result does not depend on what was resident.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from typing import Any

import numpy as np
import torch

from swapless.cache.serve import ExpertCache, Served
from swapless.errors import ClosedError, ReadError, UnsupportedOperationError, message
from swapless.notation import Phase
from swapless.runtime.budget import Budget
from swapless.runtime.compute import Routed, accumulator, expert_output, routed
from swapless.runtime.loader import Loader, Read
from swapless.runtime.memory import MemoryMeter
from swapless.runtime.pool import SlotPool
from swapless.runtime.routers import RouterTap
from swapless.runtime.routing import RoutingLog, Step
from swapless.runtime.stats import Stats
from swapless.store.checkpoint import CheckpointStore
from swapless.store.probe import Probe
from swapless.trace import Trace


class Engine:
    """Everything behind ``model.swapless``: cache, slots, reader threads and counters of one loaded model.

    Made by :func:`swapless.load`. One forward call at a time: the slots of a block are pinned for that call.

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
        store: CheckpointStore,
        cache: ExpertCache,
        pool: SlotPool,
        budget: Budget,
        probe: Probe,
        meter: MemoryMeter,
        routing: RoutingLog,
    ) -> None:
        self.budget = budget
        self.probe = probe
        self._store = store
        self._cache = cache
        self._pool = pool
        self._meter = meter
        self._routing = routing
        self._loader = Loader(store.read_part, store.parts, pool.bytes_of, store.bounce_buffer, probe.depth)
        self._staging = list(range(budget.slots, budget.slots + budget.staging_slots))
        self._phase = Phase.PREFILL
        self._step_started: float | None = None
        self._under_way: tuple[int, np.ndarray] | None = None
        self._closed = False
        self.reset_stats()

    # -- what users call ---------------------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """Counters since the load or the last :meth:`reset_stats`."""
        counts = dict(self._counts)
        return Stats(
            **counts,
            first_token_s=self._first_token_s,
            peak_memory_bytes=self._peak if self._closed else self._meter.peak_bytes(),
            peak_memory_source=self._meter.source,
        )

    def reset_stats(self) -> None:
        """Start counting afresh; cache and trace stay as they are. The peak of memory is of the process and stays too."""
        self._counts: dict[str, Any] = defaultdict(int)
        self._first_token_s: float | None = None

    def trace(self) -> Trace:
        """The routing so far, in the trace format."""
        return self._routing.trace()

    def reset_trace(self) -> None:
        """Forget the routing so far."""
        self._routing.clear()

    def record_scores(self, tap: RouterTap | None) -> None:
        """Keep the router's output for every expert in the trace from now on; None ends it. Forgets the routing so far."""
        self._routing.clear()
        self._routing.tap = tap

    def close(self) -> None:
        """End the reader threads, close the files and give the slots back. The model cannot run any more."""
        if self._closed:
            return
        self._closed = True
        self._loader.close()
        self._store.close()
        self._pool.close()
        self._peak = self._meter.peak_bytes()
        self._meter.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- what the model calls ----------------------------------------------------------------------------------------

    def begin_step(self, step: Step) -> None:
        """A forward call of the whole model begins."""
        if self._closed:
            raise ClosedError(message("The model was closed.", step="Load it again with swapless.load."))
        self._phase = step.phase
        self._routing.begin(step)
        self._step_rows = int(step.valid.sum())
        self._stalled_before = self._counts["stall_s"]
        self._step_started = time.perf_counter()

    def end_step(self) -> None:
        """The forward call is complete."""
        if self._step_started is None:
            return
        seconds = time.perf_counter() - self._step_started
        self._step_started = None
        self._routing.end()
        counts = self._counts
        stall = counts["stall_s"] - self._stalled_before
        counts["steps"] += 1
        counts["compute_s"] += seconds - stall
        counts[f"{self._phase.label}_tokens"] += self._step_rows
        counts[f"{self._phase.label}_s"] += seconds
        if self._phase is Phase.DECODE:
            counts["decode_stall_s"] += stall
        else:
            self._first_token_s = seconds

    def abandon_step(self) -> None:
        """Leave a forward call that is not the whole model's: its routing is not kept and its time not counted."""
        self._routing.abandon()
        self._step_started = None

    def forward(self, module: Any, hidden_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """The experts' share of one MoE block, as transformers' experts interface has it."""
        if torch.compiler.is_compiling():
            raise UnsupportedOperationError(
                message("An offloaded model cannot be compiled: its experts are read while it runs.", step="Leave compile out.")
            )
        if self._closed:
            raise ClosedError(message("The model was closed.", step="Load it again with swapless.load."))
        moe_layer: int = module.swapless_moe_layer
        ids = ids_TK.numpy()
        if self._under_way is not None:
            self._come_to_rest()  # a call was cut off while it came to rest: a second Ctrl-C
        self._under_way = moe_layer, ids
        counts = self._counts
        before = counts["reads"], counts["bytes_read"]
        try:
            self._routing.add(moe_layer, ids_TK, weights_TK)
            served = self._cache.request(moe_layer, ids, self._phase)
            tokens = routed(hidden_TD, ids, weights_TK)
            if self._phase is Phase.DECODE:
                out = self._decode(module, moe_layer, served, tokens, accumulator(module, hidden_TD, weights_TK))
            else:
                out = self._prefill(module, moe_layer, served, tokens, accumulator(module, hidden_TD, weights_TK))
            self._under_way = None
        except BaseException:
            self._come_to_rest()
            raise
        self._meter.sample()
        if self._phase is Phase.DECODE:
            counts["requests"] += len(served.experts)
            counts["hits"] += int(served.hit.sum())
            counts["waves"] += served.waves
            counts["decode_reads"] += counts["reads"] - before[0]
            counts["decode_bytes_read"] += counts["bytes_read"] - before[1]
        return out.to(hidden_TD.dtype)

    def _decode(self, module: Any, moe_layer: int, served: Served, tokens: Routed, out_TD: torch.Tensor) -> torch.Tensor:
        slot_of = dict(zip(served.experts.tolist(), served.slot.tolist(), strict=True))
        waves: list[list[int]] = [[] for _ in range(served.waves)]
        residents: list[int] = []
        for expert, hit, wave in zip(served.experts.tolist(), served.hit.tolist(), served.wave.tolist(), strict=True):
            (residents if hit else waves[wave]).append(expert)
        outputs: dict[int, torch.Tensor] = {}

        def compute(expert: int) -> None:
            weights = self._pool.parameters(moe_layer, slot_of[expert])
            outputs[expert] = expert_output(module, weights, tokens.gather(expert))

        for wave in waves:
            for expert in wave:
                self._loader.submit(moe_layer, expert, slot_of[expert])
            for expert in residents:
                compute(expert)
            residents = []
            for _ in wave:
                compute(self._arrival().expert)
        for expert in sorted(outputs):
            tokens.add(out_TD, outputs[expert], expert)
        return out_TD

    def _prefill(self, module: Any, moe_layer: int, served: Served, tokens: Routed, out_TD: torch.Tensor) -> torch.Tensor:
        slot_of: dict[int, int] = dict(zip(served.experts.tolist(), served.slot.tolist(), strict=True))
        hits = {expert for expert, hit in zip(served.experts.tolist(), served.hit.tolist(), strict=True) if hit}
        to_read = deque(sorted(expert for expert in slot_of if expert not in hits))
        free_staging = list(self._staging)
        streamed: dict[int, int] = {}
        here = set(hits)

        def read_ahead() -> None:
            while to_read:
                expert = to_read[0]
                slot = slot_of[expert]
                if slot < 0:
                    if not free_staging:
                        return
                    slot = streamed[expert] = free_staging.pop()
                self._loader.submit(moe_layer, to_read.popleft(), slot)

        read_ahead()
        for expert in sorted(slot_of):
            while expert not in here:
                here.add(self._arrival().expert)
            slot = streamed[expert] if expert in streamed else slot_of[expert]
            y_ND = expert_output(module, self._pool.parameters(moe_layer, slot), tokens.gather(expert))
            tokens.add(out_TD, y_ND, expert)
            if expert in streamed:
                free_staging.append(slot)
                read_ahead()
        return out_TD

    def _arrival(self) -> Read:
        """Wait for the next finished read, count it, and raise its error if it failed."""
        waited = time.perf_counter()
        read = self._loader.next()
        stall = time.perf_counter() - waited
        counts = self._counts
        counts["reads"] += 1
        counts["bytes_read"] += read.nbytes
        counts["read_s"] += read.seconds
        counts["stall_s"] += stall
        if read.error is not None:
            if isinstance(read.error, ReadError):
                raise read.error
            raise ReadError(
                message(
                    "A read of expert weights failed.",
                    where=f"MoE layer {read.moe_layer}, expert {read.expert}",
                    got=repr(read.error),
                )
            ) from read.error
        return read

    def _come_to_rest(self) -> None:
        """After an error or Ctrl-C: no read under way, and no slot that claims bytes it may not hold.

        Forgets the whole demand set: Ctrl-C may have struck before anybody knew which of it was missing. May be called again.
        """
        if self._under_way is None:
            return
        moe_layer, ids = self._under_way
        self._loader.drain()
        self._cache.forget(moe_layer, np.unique(ids[(ids >= 0) & (ids < self._cache.num_experts)]))
        self.abandon_step()
        self._under_way = None
