"""Where hit rates come from: a replay of the engine's own cache over a trace of the model, or the nearest stored curve."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from swapless.cache import DEFAULT_POLICY
from swapless.cache.capacity import Pools
from swapless.cache.replay import replay
from swapless.cache.residency import layer_pools
from swapless.errors import TraceMismatchError, message
from swapless.notation import Phase
from swapless.plan.curves import nearest_curve
from swapless.plan.speed import binomial
from swapless.runtime.open import OpenCheckpoint
from swapless.trace import Trace
from swapless.trace.select import require_decode

REPLAY_TOKENS = 4096
"""Of a longer trace so many tokens are replayed, from its beginning: enough for two digits, and seconds of time."""


class Expected(NamedTuple):
    """``hit_rate`` of requests, and ``misses``: the share of (token, MoE layer) pairs with 0 to K misses, float64 (K + 1,)."""

    hit_rate: float
    misses: np.ndarray


class Hits(Protocol):
    """Says how often a cache of so many slots hits."""

    source: str

    def of(self, slots: int) -> Expected:
        """What is to be expected of ``slots`` slots for all MoE layers together."""
        ...


class _Shape(NamedTuple):
    layers: int
    experts: int
    top_k: int

    @classmethod
    def of(cls, opened: OpenCheckpoint) -> _Shape:
        layers = opened.layout.moe_layers
        experts = max(layer.num_experts for layer in layers)
        return cls(len(layers), experts, opened.experts_a_token // len(layers))


class TraceHits:
    """Hits of a policy over a trace of the very model.

    Parameters
    ----------
    trace : Trace
        Of the model; its first tokens are replayed, the first tenth of them to warm the cache.
    opened : OpenCheckpoint
        The model.
    policy : str
        Name of the cache policy.
    name : str
        What the trace is called in the source.

    Raises
    ------
    TraceMismatchError
        The trace is of a model of another shape.
    TraceValueError
        It has no decode steps.
    """

    def __init__(self, trace: Trace, opened: OpenCheckpoint, policy: str = DEFAULT_POLICY, name: str = "the trace") -> None:
        self._shape = _Shape.of(opened)
        found = _Shape(trace.num_moe_layers, trace.num_experts, trace.top_k)
        if found != self._shape:
            raise TraceMismatchError(
                message(
                    "The trace is of another model.",
                    got="L={}, E={}, K={} in the trace".format(*found),
                    allowed="L={}, E={}, K={} as in the checkpoint".format(*self._shape),
                    step="Record one with swapless record, or leave --trace out.",
                )
            )
        self._trace = trace.rows(slice(0, REPLAY_TOKENS))
        require_decode(self._trace)
        self._policy = policy
        self._known: dict[int, Expected] = {}
        self.source = f"{name}, {len(self._trace)} of its {len(trace)} tokens"

    def of(self, slots: int) -> Expected:
        """Hits of the engine's slots: a quota a MoE layer, or one pool where a layer would get none."""
        if slots not in self._known:
            self._known[slots] = self._replay(slots)
        return self._known[slots]

    def _replay(self, slots: int) -> Expected:
        layers, experts, top_k = self._shape
        pools = Pools(*layer_pools(layers, experts, slots), 0, "layer", slots // layers, slots / (layers * experts))
        found = replay(self._trace, self._policy, pools, warmup_tokens=len(self._trace) // 10)
        decode = found.measured & (found.schedule.phase == int(Phase.DECODE))
        missed = (found.tally.requests[decode].astype(np.int64) - found.tally.hits[decode]).reshape(-1)
        counts = np.bincount(np.minimum(missed, top_k), minlength=top_k + 1)
        return Expected(found.hit_rate, counts / max(1, counts.sum()))


class CurveHits:
    """Hits as of the traced model that is nearest in shape, as if every request hit by itself.

    Parameters
    ----------
    opened : OpenCheckpoint
        The model.
    policy : str
        Name of the cache policy.

    Raises
    ------
    UnknownNameError
        The policy has no stored curve.
    """

    def __init__(self, opened: OpenCheckpoint, policy: str = DEFAULT_POLICY) -> None:
        self._shape = _Shape.of(opened)
        self._policy = policy
        self._curve = nearest_curve(self._shape.experts, self._shape.top_k)
        curve = self._curve
        curve.rate(policy, curve.num_experts, curve.num_experts, curve.top_k)  # refuse early what has no curve
        self.source = f"the curve of {curve.model_id} (E={curve.num_experts}, K={curve.top_k}), no trace of this model given"

    def of(self, slots: int) -> Expected:
        """Read off the curve at ``slots`` over the MoE layers."""
        layers, experts, top_k = self._shape
        rate = self._curve.rate(self._policy, slots / layers, experts, top_k)
        return Expected(rate, binomial(top_k, rate))
