"""The policy contract: one cache policy, run by the replay over a trace and by the engine over a model.

A policy is a file with three parts: a ``NamedTuple`` of arrays, which is its whole state; compiled rules over that state,
registered for its type with :func:`rules`; and a final class with a ``name`` and a ``state`` method that builds a fresh state
for a shape. ``key`` is ``moe_layer * E + expert``. ``clock`` grows with every demand set and wave; ``residency`` is the
:class:`~swapless.cache.residency.Residency` that the rules may read and never change.

``on_access(state, residency, pool, key, hit, clock, phase)``
    A request for ``key`` was judged: called once a distinct expert of a demand set, hits and misses alike.
``on_insert(state, residency, pool, key, clock, phase)``
    ``key`` was given a slot.
``on_evict(state, residency, pool, key, clock)``
    ``key`` left its slot.
``victim(state, residency, pool, clock)``
    The slot of ``pool`` whose expert goes, or -1 if every expert there is pinned (``residency.pinned[slot] == clock``).
    Called only when the pool has no free slot.
``admit(state, residency, pool, key, clock, phase)``
    Whether ``key``, a miss, may take a slot by eviction. A free slot is always taken.

A policy counts nothing: the replay and the engine count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from numba.extending import overload


class Policy(Protocol):
    """What the registry hands out: a name, and a fresh state for a shape."""

    name: str

    def state(self, num_moe_layers: int, num_experts: int, pools: int) -> NamedTuple:
        """A fresh state for keys ``0 .. num_moe_layers * num_experts - 1`` spread over ``pools`` pools."""
        ...


# Rules allocate nothing, so numba may leave reference counts out: with them (an atomic operation for each of some twenty
# arrays, several times a request) a replay is twenty times slower.
COMPILE = {"nogil": True, "_nrt": False, "error_model": "numpy"}

# These bodies never run: compiled code takes the rule registered for the state's own type.
def on_access(state: Any, residency: Any, pool: Any, key: Any, hit: Any, clock: Any, phase: Any) -> Any:
    """Rule of the contract; see the module's text."""
    raise TypeError(f"no on_access rule for {type(state).__name__}")


def on_insert(state: Any, residency: Any, pool: Any, key: Any, clock: Any, phase: Any) -> Any:
    """Rule of the contract; see the module's text."""
    raise TypeError(f"no on_insert rule for {type(state).__name__}")


def on_evict(state: Any, residency: Any, pool: Any, key: Any, clock: Any) -> Any:
    """Rule of the contract; see the module's text."""
    raise TypeError(f"no on_evict rule for {type(state).__name__}")


def victim(state: Any, residency: Any, pool: Any, clock: Any) -> Any:
    """Rule of the contract; see the module's text."""
    raise TypeError(f"no victim rule for {type(state).__name__}")


def admit(state: Any, residency: Any, pool: Any, key: Any, clock: Any, phase: Any) -> Any:
    """Rule of the contract; see the module's text."""
    raise TypeError(f"no admit rule for {type(state).__name__}")


_CONTRACT: dict[str, Callable[..., Any]] = {
    "on_access": on_access,
    "on_insert": on_insert,
    "on_evict": on_evict,
    "victim": victim,
    "admit": admit,
}


def rules(state_type: type, **functions: Callable[..., Any]) -> None:
    """Register the rules of one state type, as plain functions that numba compiles.

    They become overloads on the state's type, so that they are inlined into the one serving loop and cached on disk with
    it; function pointers would allow neither. A rule left out does nothing (``admit``: says yes).
    """
    for name, generic in _CONTRACT.items():
        _register(generic, name, state_type, functions.get(name))


def _register(generic: Callable[..., Any], name: str, state_type: type, function: Callable[..., Any] | None) -> None:
    # numba matches the parameter names of the overload with the generic's, hence one chooser for each arity.
    def chosen(state: Any) -> Callable[..., Any] | None:
        if getattr(state, "instance_class", None) is not state_type:
            return None
        return function if function is not None else _DEFAULTS[name]

    if name == "on_access":
        overload(generic, jit_options=COMPILE)(lambda state, residency, pool, key, hit, clock, phase: chosen(state))
    elif name in ("on_insert", "admit"):
        overload(generic, jit_options=COMPILE)(lambda state, residency, pool, key, clock, phase: chosen(state))
    elif name == "on_evict":
        overload(generic, jit_options=COMPILE)(lambda state, residency, pool, key, clock: chosen(state))
    else:
        overload(generic, jit_options=COMPILE)(lambda state, residency, pool, clock: chosen(state))


_DEFAULTS: dict[str, Callable[..., Any]] = {
    "on_access": lambda state, residency, pool, key, hit, clock, phase: None,
    "on_insert": lambda state, residency, pool, key, clock, phase: None,
    "on_evict": lambda state, residency, pool, key, clock: None,
    "admit": lambda state, residency, pool, key, clock, phase: True,
}
