"""Learned next use: which experts follow the ones just used? Learned while serving, from nothing.

For every MoE layer a linear map takes what was just used to ``value``, the expected ``horizon ** (tokens until next use - 1)``
of each of its E experts; the resident expert with the lowest value goes. What goes in, F = 3E + 1 numbers: which experts this
token used, the same faded fast and slowly, and a constant. So beside how recently and how often an expert itself was used
(all that LRU and LFU see) its companions speak for or against it, and that is worth as much again.

The map is the ridge regression of all that was seen so far, held towards a decayed LFU. It is kept current by one row of a
Gauss-Seidel sweep a token; no step costs more than O(F E), so a block costs microseconds and none ever stalls. Nothing is
read of the future: the value of an expert's next use is credited when that use comes, to the faded sum of what had gone in
since its last use.

What was learned is only followed while it does better than LRU, by what each of the two would have hit (``_rivals``). Following
the better of two policies by the misses of their ghosts is the idea of LeCaR [1]_, here without chance.

.. [1] G. Vietri et al., "Driving Cache Replacement with ML-based LeCaR", HotStorage 2018.
"""

from __future__ import annotations

from typing import Any, NamedTuple, final

import numpy as np

from swapless.cache._next_use import FORGOTTEN_TOKENS, begin_token, predict, take_in, value_part
from swapless.cache._rivals import compare, new_rivals
from swapless.cache.compiled import compiled
from swapless.cache.policy import rules
from swapless.cache.residency import may_go
from swapless.errors import UsageError, message
from swapless.notation import Phase

_PREFILL = int(Phase.PREFILL)


class NextUseState(NamedTuple):
    """Float32, for each MoE layer: ``fed`` (L, F) what goes in now; ``moment`` (L, F, F), of which the upper half is kept, and
    ``cross`` (L, E, F) the sums of the regression; ``weight`` (L, F, E) the map; ``trail`` (L, F) the faded sum of ``fed``, and
    ``before`` (L, E, F) that sum when the expert was last used, at ``used_at`` int64 (L, E); ``value`` (L, E), and whether it
    is out of date, ``valued_at`` int64 (L,) = -1; ``row`` int64 (L,) the sweep's next row; ``learned`` int64 (L,) tokens;
    ``seen`` int64 (L,) the last token, ``open`` uint8 (L,) whether it waits to be learned from, ``parts`` and ``last_parts``
    int64 (L,) demand sets of it and of the one before. ``fade``, ``prior`` (blocks,); ``horizon``, ``ridge`` (1,); ``powers``
    (100,) of the horizon.

    ``uses`` int64 (1,) requests so far and ``last`` int64 (L*E,) the expert's latest. With P pools, the rivals' ghosts:
    ``ring_before`` and ``ring_after`` uint32 (L*E + P,) LRU's, ``recent`` uint8 (L*E,) whether it holds the key,
    ``recent_held`` int64 (P,) how many; ``valued`` and ``valued_held`` that of the values, while LRU is followed; ``asked_at``
    int64 (L*E,) clock of the latest request. ``followed`` uint8 (1,) whether the values are; ``ahead``, ``gained``, ``needed``
    int64 (1,) the account.
    """

    fed: np.ndarray
    moment: np.ndarray
    cross: np.ndarray
    weight: np.ndarray
    trail: np.ndarray
    before: np.ndarray
    used_at: np.ndarray
    value: np.ndarray
    valued_at: np.ndarray
    row: np.ndarray
    learned: np.ndarray
    seen: np.ndarray
    open: np.ndarray
    parts: np.ndarray
    last_parts: np.ndarray
    fade: np.ndarray
    prior: np.ndarray
    horizon: np.ndarray
    ridge: np.ndarray
    powers: np.ndarray
    uses: np.ndarray
    last: np.ndarray
    ring_before: np.ndarray
    ring_after: np.ndarray
    recent: np.ndarray
    recent_held: np.ndarray
    valued: np.ndarray
    valued_held: np.ndarray
    asked_at: np.ndarray
    followed: np.ndarray
    ahead: np.ndarray
    gained: np.ndarray
    needed: np.ndarray


def _on_demand(state, residency, moe_layer, experts, phase):  # type: ignore[no-untyped-def]
    decode = phase != _PREFILL
    token = residency.demand_sets[moe_layer]
    fresh = token != state.seen[moe_layer]
    if fresh:
        begin_token(state, moe_layer, token, decode)
    take_in(state, moe_layer, experts, fresh, decode)
    state.parts[moe_layer] += 1
    if state.parts[moe_layer] < state.last_parts[moe_layer]:
        value_part(state, moe_layer, experts)
    else:
        state.valued_at[moe_layer] = -1
    compare(state, residency, moe_layer, experts, decode)


def _on_access(state, residency, pool, key, hit, clock, phase):  # type: ignore[no-untyped-def]
    state.uses[0] += 1
    state.last[key] = state.uses[0]


def _victim(state, residency, pool, clock):  # type: ignore[no-untyped-def]
    if not state.followed[0]:
        return _oldest(state, residency, pool, clock)
    best = np.int32(-1)
    lowest = np.float32(np.inf)
    num_experts = state.value.shape[1]
    for slot in range(residency.pool_start[pool], residency.pool_start[pool + 1]):
        if may_go(residency, slot, clock):
            key = residency.key_of_slot[slot]
            moe_layer = residency.layer_of_key[key]
            if state.valued_at[moe_layer] < 0:
                predict(state, moe_layer)
                state.valued_at[moe_layer] = 0
            value = state.value[moe_layer, key - moe_layer * num_experts]
            if value < lowest or best < 0:
                lowest = value
                best = np.int32(slot)
    return best


@compiled
def _oldest(state: Any, residency: Any, pool: Any, clock: Any) -> Any:
    best = np.int32(-1)
    for slot in range(residency.pool_start[pool], residency.pool_start[pool + 1]):
        if may_go(residency, slot, clock) and (
            best < 0 or state.last[residency.key_of_slot[slot]] < state.last[residency.key_of_slot[best]]
        ):
            best = np.int32(slot)
    return best


rules(NextUseState, on_demand=_on_demand, on_access=_on_access, victim=_victim)


@final
class NextUse:
    """Evicts the expert whose learned next use is farthest away. Ties: the lower slot.

    Parameters
    ----------
    horizon : float
        What the value of a use loses with each token that it lies ahead, in (0, 1).
    ridge : float
        How strongly the map is held to its start, a decayed LFU; above 0.

    Raises
    ------
    UsageError
        A parameter outside its range.
    """

    name = "next_use"
    # Chosen on training documents only (docs/log.md): DeepSeek-V2-Lite Puffin 0-998 and gpt-oss-20b.
    _FADE = (0.0, 0.8, 0.95)
    _PRIOR = (0.0, 0.05, 0.15)

    def __init__(self, horizon: float = 0.8, ridge: float = 1000.0) -> None:
        if not 0 < horizon < 1:
            raise UsageError(message("horizon of the next_use policy must lie in (0, 1).", got=horizon))
        if not ridge > 0:
            raise UsageError(message("ridge of the next_use policy must be above 0.", got=ridge))
        self.horizon = horizon
        self.ridge = ridge

    def state(self, num_moe_layers: int, num_experts: int, pools: int) -> NextUseState:
        """The start: a decayed LFU that has seen nothing."""
        layers, experts, fed = num_moe_layers, num_experts, len(self._FADE) * num_experts + 1

        def zeros(*shape: int) -> Any:
            return np.zeros((layers, *shape), np.float32)

        def numbers(*shape: int) -> Any:
            return np.zeros((layers, *shape), np.int64)

        weight = zeros(fed, experts)
        for block, prior in enumerate(self._PRIOR):
            weight[:, np.arange(experts) + block * experts, np.arange(experts)] = prior
        return NextUseState(
            fed=zeros(fed),
            moment=zeros(fed, fed),
            cross=zeros(experts, fed),
            weight=weight,
            trail=zeros(fed),
            before=zeros(experts, fed),
            used_at=numbers(experts),
            value=zeros(experts),
            valued_at=numbers(),
            row=numbers(),
            learned=numbers(),
            seen=numbers(),
            open=np.zeros(layers, np.uint8),
            parts=numbers(),
            last_parts=numbers(),
            fade=np.array(self._FADE, np.float32),
            prior=np.array(self._PRIOR, np.float32),
            horizon=np.array([self.horizon], np.float32),
            ridge=np.array([self.ridge], np.float32),
            powers=np.cumprod(np.array([1.0] + [self.horizon] * (FORGOTTEN_TOKENS - 1), np.float32)),
            uses=np.zeros(1, np.int64),
            last=np.zeros(layers * experts, np.int64),
            **new_rivals(layers * experts, pools),
        )
