"""The compiled replay: every forward call of a schedule through :func:`~swapless.cache.serve.serve`, and what it counted."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from swapless.cache.compiled import compiled, compiled_apart
from swapless.cache.policy import arrange, on_document, on_scores
from swapless.cache.serve import demand_order, serve


class Tally(NamedTuple):
    """What each (forward call, MoE layer) asked and got, int16 (N, L) each.

    ``requests`` distinct experts, ``hits`` of them resident before, ``evictions`` experts that went for them, ``streamed``
    misses that were given no slot.
    """

    requests: np.ndarray
    hits: np.ndarray
    evictions: np.ndarray
    streamed: np.ndarray


class Buffers(NamedTuple):
    """Room for one demand set: int32 and one uint8 array of length E, and the ids (int16) of the largest forward call."""

    experts: np.ndarray
    tokens: np.ndarray
    slot: np.ndarray
    wave: np.ndarray
    counts: np.ndarray
    hit: np.ndarray
    ids: np.ndarray


def new_tally(calls: int, num_moe_layers: int) -> Tally:
    """Zeros."""
    return Tally(*(np.zeros((calls, num_moe_layers), np.int16) for _ in Tally._fields))


def new_buffers(num_experts: int, largest_call_ids: int) -> Buffers:
    """Room for one demand set."""
    experts, tokens, slot, wave, counts = (np.empty(num_experts, np.int32) for _ in range(5))
    hit, ids = np.empty(num_experts, np.uint8), np.empty(largest_call_ids, np.int16)
    return Buffers(experts, tokens, slot, wave, counts, hit, ids)


@compiled
def gather(ids: Any, moe_layer: Any, rows: Any, first: Any, end: Any, num_experts: Any, buffers: Any) -> Any:
    """Distinct experts that one forward call asks of one MoE layer, into the buffers; returns how many."""
    if end - first > 1:
        return _gather_rows(ids, moe_layer, rows, first, end, num_experts, buffers)
    n = np.uint64(0)
    asked = ids[np.uint64(rows[np.uint64(first)]), np.uint64(moe_layer)]  # one token: its list as it is
    for k in range(asked.size):
        expert = asked[np.uint64(k)]
        if expert >= 0:
            buffers.experts[n] = expert
            n += np.uint64(1)
    return np.int64(n)


@compiled_apart
def _gather_rows(ids: Any, moe_layer: Any, rows: Any, first: Any, end: Any, num_experts: Any, buffers: Any) -> Any:
    n = 0
    for i in range(first, end):
        for k in range(ids.shape[2]):
            buffers.ids[n] = ids[rows[i], moe_layer, k]
            n += 1
    return demand_order(buffers.ids[:n], num_experts, buffers.experts, buffers.tokens, buffers.counts)


@compiled
def replay_calls(
    state: Any,
    residency: Any,
    ids: Any,
    scores: Any,
    rows: Any,
    starts: Any,
    phase: Any,
    begins: Any,
    first_call: int,
    end_call: int,
    num_experts: int,
    single: bool,
    buffers: Any,
    tally: Any,
) -> None:
    """Replay the calls ``first_call .. end_call - 1``. State, residency, buffers and tally change.

    ``scores`` float32 (rows of these calls in order, L, E), or (0, 0, 0) where none are fed. ``single``: requests are judged
    one at a time.
    """
    b = buffers
    for c in range(first_call, end_call):
        if begins[c]:
            on_document(state, residency)
        for moe_layer in range(ids.shape[1]):
            if scores.shape[0] > 0:
                for i in range(starts[c], starts[c + 1]):
                    on_scores(state, residency, moe_layer, scores[i - starts[first_call], moe_layer])
            n = gather(ids, moe_layer, rows, starts[c], starts[c + 1], num_experts, b)
            hits = evictions = streamed = 0
            if n > 0:
                experts = b.experts[:n]
                if not single:
                    arrange(state, residency, moe_layer * num_experts, experts)
                _, hits, evictions, streamed = serve(
                    state, residency, moe_layer, num_experts, experts, np.int64(phase[c]), single, b.hit, b.slot, b.wave
                )
            tally.requests[c, moe_layer] = n
            tally.hits[c, moe_layer] = hits
            tally.evictions[c, moe_layer] = evictions
            tally.streamed[c, moe_layer] = streamed
