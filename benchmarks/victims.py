"""Does a predictor know better whom to drop? Share of the gap between LRU and Belady that victims by predicted next use take.

    python benchmarks/victims.py --data DIR --learned FILE            # about 5 minutes
    python benchmarks/victims.py --data DIR --learned FILE --quick    # few tokens, nothing stored

DeepSeek-V2-Lite, token at once, C = E/4, state kept. ``next_use``, the default policy, learns each expert's value, the expected
``horizon ** (tokens until its next use - 1)``, from what was used. Two ways to mix in a predictor's scores:

- ``losers``, with a cache a MoE layer: to the value comes ``weight`` times the faded mean of the scores that the expert got (at
  lead 1, before its layer was routed): one that was nearly chosen may be chosen soon. Of the next token nothing can be known,
  for its text is not there while this one runs.
- ``coming``, with one pool for all layers: an expert of a layer that this token has yet to reach is used there with the
  probability p that the predictor gives (at lead 1 for the next layer, before the token for those behind); its value becomes
  ``p + (1 - p) * horizon * value``.

``weight`` and ``fade`` are chosen on documents 1299 and later, the figures are of documents 999-1298; the predictor was trained
on neither.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
from prefetch_value import some_documents
from results import document, emit, store

from swapless.cache._next_use import predict
from swapless.cache.foresight import LEVELS, levels_of
from swapless.cache.next_use import NextUse, NextUseState
from swapless.cache.policy import on_access, on_demand, rules
from swapless.cache.replay import Replay, replay
from swapless.cache.residency import may_go
from swapless.predict.evaluate import scores_of
from swapless.predict.saved import load_predictor
from swapless.trace import Trace, read_trace, select

TEST, TUNING = "999-1298", "1299-1998"
WEIGHTS = (0.1, 0.25, 0.5, 1.0)
FADES = (0.0, 0.5, 0.8)
RESAMPLES = 2000


class MixedState(NamedTuple):
    """``inner`` of next_use; ``near`` and ``far`` uint8 (T, L, E) scores at lead 1 and before the token; ``mean`` float32
    (L, E) faded mean of ``near``; float32 (1,) ``weight``, ``fade``, and ``ahead``: 1 to look at the coming layers."""

    inner: NextUseState
    near: np.ndarray
    far: np.ndarray
    mean: np.ndarray
    weight: np.ndarray
    fade: np.ndarray
    ahead: np.ndarray


def _on_demand(state, residency, moe_layer, experts, phase):  # type: ignore[no-untyped-def]
    on_demand(state.inner, residency, moe_layer, experts, phase)
    token = residency.demand_sets[moe_layer] - 1
    fade = state.fade[0]
    for expert in range(state.mean.shape[1]):
        score = np.float32(state.near[token, moe_layer, expert]) / np.float32(LEVELS - 1)
        state.mean[moe_layer, expert] = fade * state.mean[moe_layer, expert] + (np.float32(1) - fade) * score


def _on_access(state, residency, pool, key, hit, clock, phase):  # type: ignore[no-untyped-def]
    on_access(state.inner, residency, pool, key, hit, clock, phase)


def _victim(state, residency, pool, clock):  # type: ignore[no-untyped-def]
    inner, asking = state.inner, residency.asking[0]
    token, num_experts = residency.demand_sets[asking] - 1, state.mean.shape[1]
    best, lowest = np.int32(-1), np.float32(np.inf)
    for slot in range(residency.pool_start[pool], residency.pool_start[pool + 1]):
        if may_go(residency, slot, clock):
            key = residency.key_of_slot[slot]
            moe_layer = residency.layer_of_key[key]
            expert = key - moe_layer * num_experts
            if inner.valued_at[moe_layer] < 0:
                predict(inner, moe_layer)
                inner.valued_at[moe_layer] = 0
            value = inner.value[moe_layer, expert] + state.weight[0] * state.mean[moe_layer, expert]
            if state.ahead[0] > 0 and moe_layer > asking:
                level = state.near[token, moe_layer, expert] if moe_layer == asking + 1 else state.far[token, moe_layer, expert]
                chance = np.float32(level) / np.float32(LEVELS - 1)
                value = chance + (np.float32(1) - chance) * inner.horizon[0] * value
            if value < lowest:
                lowest = value
                best = np.int32(slot)
    return best


rules(MixedState, on_demand=_on_demand, on_access=_on_access, victim=_victim)


@final
class Mixed:
    """next_use without its guard, and a predictor's scores mixed in; for documents one after the other, a token a call."""

    def __init__(
        self, near: np.ndarray, far: np.ndarray, *, weight: float = 0.0, fade: float = 0.0, ahead: bool = False
    ) -> None:
        self.name = f"mixed, weight {weight}, fade {fade}" + (", coming layers" if ahead else "")
        self._levels = (near, far)
        self._numbers = [np.array([number], np.float32) for number in (weight, fade, ahead)]

    def state(self, num_moe_layers: int, num_experts: int, pools: int) -> MixedState:
        """Nothing learned yet."""
        inner = NextUse().state(num_moe_layers, num_experts, pools)
        return MixedState(inner, *self._levels, np.zeros((num_moe_layers, num_experts), np.float32), *self._numbers)


def scored(learned: Path, trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """Levels at lead 1 and before the token."""
    predictor = load_predictor(learned)
    near, far = (levels_of(trace, scores_of(predictor, trace, lead)) for lead in (1, "token"))
    return near, far


def shares(found: dict[str, Replay], seed: int = 0) -> dict[str, Any]:
    """Hit rate and share of the gap of each policy, with a 95 % interval from resampling documents."""
    hits = {name: result.by_document()[1] for name, result in found.items()}
    draws = np.random.default_rng(seed).integers(0, len(hits["lru"]), (RESAMPLES, len(hits["lru"])))
    low, best = (hits[name][draws].sum(axis=1) for name in ("lru", "belady"))
    rows = {}
    for name, result in found.items():
        mine = hits[name][draws].sum(axis=1)
        gap = found["belady"].hits - found["lru"].hits
        interval = np.quantile((mine - low) / (best - low), (0.025, 0.975)).tolist()
        share = (result.hits - found["lru"].hits) / gap
        rows[name] = {"hit_rate": result.hit_rate, "share_of_gap": share, "interval": interval}
        print(f"{name:44s} hits {result.hit_rate:.4f}  {share:7.2%} of the gap", file=sys.stderr, flush=True)
    return rows


def choose(trace: Trace, levels: tuple[np.ndarray, np.ndarray], capacity: int) -> list[dict[str, float]]:
    """Hits of every weight and fade, the best first."""
    rows = [
        {"weight": weight, "fade": fade, "hit_rate": replay(trace, Mixed(*levels, weight=weight, fade=fade), capacity).hit_rate}
        for weight in WEIGHTS
        for fade in FADES
    ]
    return sorted(rows, key=lambda row: -row["hit_rate"])


def main() -> None:
    """Measure, print a table and one JSON document, store the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the handed data")
    parser.add_argument("--learned", type=Path, required=True, help="a saved predictor")
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--tuning-tokens", type=int, default=3000)
    parser.add_argument("--quick", action="store_true", help="few tokens, nothing stored")
    asked = parser.parse_args()
    if asked.quick:
        asked.tokens = asked.tuning_tokens = 400
    trace = read_trace(asked.data / "traces" / "deepseek-v2-lite.puffin.parquet")
    tuning = some_documents(select(trace, documents=TUNING), asked.tuning_tokens)
    test = some_documents(select(trace, documents=TEST), asked.tokens)
    capacity = test.num_experts // 4
    chosen = choose(tuning, scored(asked.learned, tuning), capacity)
    best = {name: chosen[0][name] for name in ("weight", "fade")}
    print(f"chosen on {len(tuning)} tokens: {best}", file=sys.stderr, flush=True)
    levels = scored(asked.learned, test)
    whole = capacity * test.num_moe_layers
    tables: dict[str, Any] = {}
    for label, pool, slots, mixed in (
        ("a cache a MoE layer", "layer", capacity, Mixed(*levels, **best)),
        ("one pool", "shared", whole, Mixed(*levels, ahead=True)),
    ):
        print(f"\n{label}, {slots} slots", file=sys.stderr)
        policies = {"lru": "lru", "next_use": "next_use", "next_use without its guard": Mixed(*levels), mixed.name: mixed}
        policies["belady"] = "belady"
        found = {name: replay(test, policy, slots, pool=pool) for name, policy in policies.items()}
        tables[label] = shares(found)
    config = {
        "test_documents": TEST,
        "tuning_documents": TUNING,
        "tokens": len(test),
        "tuning_tokens": len(tuning),
        "capacity_experts": capacity,
        "file": asked.learned.name,
    }
    result = document("victims", config=config, measured={"tables": tables, "tuning": chosen})
    emit(result)
    if not asked.quick:
        store(result)


if __name__ == "__main__":
    main()
