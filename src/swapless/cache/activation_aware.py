"""MoE-Infinity's rule: which past text does this one resemble, and how much did that one use each expert?

Counts of the running text (an L x E matrix) go into a collection when the text ends. At every MoE layer of a token the past
matrix closest to the experts this token has used so far (cosine) predicts the rest, and the resident expert with the lowest
predicted share goes, early layers being kept (factor ``1 - moe_layer / L``).
"""

from __future__ import annotations

from typing import NamedTuple, final

import numpy as np

from swapless.cache.policy import rules
from swapless.cache.residency import may_go
from swapless.errors import UsageError, message

_EPSILON = 1e-3


class ActivationAwareState(NamedTuple):
    """``running`` float64 (L*E,): counts of this text. ``past`` float64 (N, L*E): the collection, of which ``filled`` (1,) are
    used; ``norm`` (N,) their lengths; ``dot`` (N,) their products with this token so far; ``row_sum`` (N, L) sums a layer.
    ``nearest`` int64 (2,): the closest one, and the MoE layer of the last access.
    """

    running: np.ndarray
    past: np.ndarray
    filled: np.ndarray
    norm: np.ndarray
    dot: np.ndarray
    row_sum: np.ndarray
    nearest: np.ndarray


def _on_document(state, residency):  # type: ignore[no-untyped-def]
    total = 0.0
    for key in range(state.running.size):
        total += state.running[key] * state.running[key]
    if total > 0.0:
        place = state.filled[0]
        if place < state.past.shape[0]:
            state.filled[0] += 1
        else:  # the stored matrix most like the new one makes room
            best = -1.0
            for other in range(state.past.shape[0]):
                product = 0.0
                for key in range(state.running.size):
                    product += state.running[key] * state.past[other, key]
                if product / state.norm[other] > best:
                    best = product / state.norm[other]
                    place = other
        for moe_layer in range(state.row_sum.shape[1]):
            state.row_sum[place, moe_layer] = 0.0
        for key in range(state.running.size):
            state.past[place, key] = state.running[key]
            state.row_sum[place, residency.layer_of_key[key]] += state.running[key]
            state.running[key] = 0.0
        state.norm[place] = np.sqrt(total)
    for other in range(state.dot.size):
        state.dot[other] = 0.0
    state.nearest[1] = -1


def _on_access(state, residency, pool, key, hit, clock, phase):  # type: ignore[no-untyped-def]
    moe_layer = residency.layer_of_key[key]
    if moe_layer < state.nearest[1]:  # the next token has begun
        for other in range(state.filled[0]):
            state.dot[other] = 0.0
    state.nearest[1] = moe_layer
    state.running[key] += 1.0
    best = -1.0
    for other in range(state.filled[0]):
        state.dot[other] += state.past[other, key]
        if state.dot[other] / state.norm[other] > best:
            best = state.dot[other] / state.norm[other]
            state.nearest[0] = other


def _victim(state, residency, pool, clock):  # type: ignore[no-untyped-def]
    best = np.int32(-1)
    lowest = np.inf
    layers = residency.held.size
    for slot in range(residency.pool_start[pool], residency.pool_start[pool + 1]):
        if may_go(residency, slot, clock):
            key = residency.key_of_slot[slot]
            moe_layer = residency.layer_of_key[key]
            share = state.running[key]
            if state.filled[0] > 0:
                near = state.nearest[0]
                share = (state.past[near, key] + _EPSILON) / (state.row_sum[near, moe_layer] + _EPSILON)
            share *= 1.0 - moe_layer / layers
            if share < lowest:
                lowest = share
                best = np.int32(slot)
    return best


rules(ActivationAwareState, on_access=_on_access, on_document=_on_document, victim=_victim)


@final
class ActivationAware:
    """After MoE-Infinity (arXiv 2401.14361v3), algorithm 1. Departs: in its first text it goes by that text's own counts.

    Parameters
    ----------
    collection : int
        Past texts kept; when full, the one most like the new one makes room.

    Raises
    ------
    UsageError
        A collection of fewer than one.
    """

    name = "activation_aware"

    def __init__(self, collection: int = 120) -> None:
        if collection < 1:
            raise UsageError(message("collection of the activation_aware policy must be at least 1.", got=collection))
        self.collection = collection

    def state(self, num_moe_layers: int, num_experts: int, pools: int) -> ActivationAwareState:
        """An empty collection."""
        keys = num_moe_layers * num_experts
        return ActivationAwareState(
            running=np.zeros(keys),
            past=np.zeros((self.collection, keys)),
            filled=np.zeros(1, np.int64),
            norm=np.ones(self.collection),
            dot=np.zeros(self.collection),
            row_sum=np.zeros((self.collection, num_moe_layers)),
            nearest=np.array([0, -1], np.int64),
        )
