"""The policy contract: one cache policy, run by the replay over a trace and by the engine over a model.

A policy is a file with three parts: a ``NamedTuple`` of arrays, which is its whole state; compiled rules over that state,
registered for its type with :func:`rules`; and a final class with a ``name`` and a ``state`` method that builds a fresh state
for a shape. ``key`` is ``moe_layer * E + expert``. ``clock`` grows with every demand set and wave; ``residency`` is the
:class:`~swapless.cache.residency.Residency` that the rules may read and never change. Rules allocate nothing.

``on_demand(state, residency, moe_layer, experts, phase)``
    The distinct ``experts`` of one demand set are known; called before any of them is judged.
``on_access(state, residency, pool, key, hit, clock, phase)``
    A request for ``key`` was judged: called once a distinct expert of a demand set, hits and misses alike, in list order.
``on_insert(state, residency, pool, key, clock, phase)``
    ``key``, which missed, was given a slot.
``on_evict(state, residency, pool, key, clock)``
    ``key`` left its slot.
``victim(state, residency, pool, clock)``
    The slot of ``pool`` whose expert goes, or -1 if none :func:`~swapless.cache.residency.may_go`. Called only when the pool
    has no free slot.
``admit(state, residency, pool, key, clock, phase)``
    Whether ``key``, a miss, may take a slot by eviction. A free slot is always taken.
``on_scores(state, residency, moe_layer, scores)``
    The router's output for all E experts (float32), once a token, before its demand set is served; only where they are known.
``on_document(state, residency)``
    A new text begins.
``arrange(state, residency, base, experts)``
    Put the demand set (``experts + base`` are its keys) into the order in which it is served. For the optima, in replay only.

A policy counts nothing: the replay and the engine count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from swapless.cache.compiled import OPTIONS
from swapless.compiled import rule
from swapless.errors import UsageError, message


class Policy(Protocol):
    """What the registry hands out: a name, and a fresh state for a shape.

    A class attribute ``needs_scores = True`` says that the policy works only where ``on_scores`` is fed, ``optimum = True``
    that it knows the future and serves as a bound, in the replay only.
    """

    name: str

    def state(self, num_moe_layers: int, num_experts: int, pools: int) -> NamedTuple:
        """A fresh state for keys ``0 .. num_moe_layers * num_experts - 1`` spread over ``pools`` pools."""
        ...


def fresh_state(policy: Policy, num_moe_layers: int, num_experts: int, pools: int) -> Any:
    """A fresh state of ``policy``, as compiled code may take it.

    Raises
    ------
    UsageError
        It is no ``NamedTuple`` of arrays: a policy from elsewhere does not keep the contract.
    """
    state = policy.state(num_moe_layers, num_experts, pools)
    arrays = state if isinstance(state, tuple) and hasattr(state, "_fields") else (None,)
    if not all(isinstance(array, np.ndarray) and array.flags.c_contiguous for array in arrays):
        got = f"{type(state).__name__} from {type(policy).__name__}.state"
        raise UsageError(message("A policy's state must be a NamedTuple of contiguous arrays.", got=got))
    return state


def state_bytes(policy: Policy, num_moe_layers: int, num_experts: int) -> int:
    """Memory of the policy's state, with a pool for each MoE layer."""
    return sum(array.nbytes for array in fresh_state(policy, num_moe_layers, num_experts, num_moe_layers))


def _rule(name: str) -> Callable[..., Any]:
    def unregistered(state: Any, *_: Any) -> Any:
        raise TypeError(f"no {name} rule for {type(state).__name__}: the rules run in compiled code only")

    unregistered.__name__ = name
    unregistered.__doc__ = "Rule of the contract; see the module's text."
    return unregistered


# These bodies never run: compiled code takes the rule registered for the state's own type.
on_demand = _rule("on_demand")
on_access = _rule("on_access")
on_insert = _rule("on_insert")
on_evict = _rule("on_evict")
victim = _rule("victim")
admit = _rule("admit")
on_scores = _rule("on_scores")
on_document = _rule("on_document")
arrange = _rule("arrange")

_DEFAULTS: dict[Callable[..., Any], Callable[..., Any]] = {
    on_demand: lambda state, residency, moe_layer, experts, phase: None,
    on_access: lambda state, residency, pool, key, hit, clock, phase: None,
    on_insert: lambda state, residency, pool, key, clock, phase: None,
    on_evict: lambda state, residency, pool, key, clock: None,
    victim: lambda state, residency, pool, clock: -1,
    admit: lambda state, residency, pool, key, clock, phase: True,
    on_scores: lambda state, residency, moe_layer, scores: None,
    on_document: lambda state, residency: None,
    arrange: lambda state, residency, base, experts: None,
}


def rules(state_type: type, **functions: Callable[..., Any]) -> None:
    """Register the rules of one state type, as plain functions that numba compiles.

    They become overloads on the state's type, so that they are inlined into the one serving loop and cached on disk with
    it; function pointers would allow neither. A rule left out does nothing (``admit``: says yes).
    """
    unknown = functions.keys() - {generic.__name__ for generic in _DEFAULTS}
    if unknown:
        raise TypeError(f"no such rule in the policy contract: {', '.join(sorted(unknown))}")
    for generic, default in _DEFAULTS.items():
        rule(generic, state_type, functions.get(generic.__name__, default), OPTIONS)
