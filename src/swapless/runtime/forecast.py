"""What a load will come to hold, known before a weight is read: so that the smallest budget is one number, named at once."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from swapless.runtime.allocator import give_back
from swapless.runtime.cgroups import available_bytes
from swapless.runtime.door import foreign_errors, group_heads, part_heads
from swapless.runtime.dry import dry_run
from swapless.runtime.hollow import hollow_model
from swapless.runtime.needs import Needs
from swapless.runtime.open import OpenCheckpoint
from swapless.runtime.product_code import product_code_bytes
from swapless.runtime.rehearsal import rehearse
from swapless.store.headers import TensorRef

_LOADING_BYTES = 6 << 20
_MODULE_BYTES = 16 << 10
"""What a load leaves behind beside weights, and what a module of the model takes in the interpreter, with what it holds."""

_MOST_BYTES = 4 << 30
"""No trial holds more, whatever the machine has, unless the budget is larger."""

_AT_ONCE = 4
"""Tensors that transformers converts at the same time."""


class Forecast(NamedTuple):
    """``needs`` of forward calls, ``top_k`` as the router hands it out, ``code_bytes`` of products, ``modules`` of the model.

    ``converting_bytes`` is what loading holds besides, for weights whose type is not the one to compute in.
    """

    needs: Needs
    top_k: int
    code_bytes: int
    modules: int
    converting_bytes: int

    @property
    def loading_bytes(self) -> int:
        """What a load leaves behind beside weights."""
        return _LOADING_BYTES + _MODULE_BYTES * self.modules


def forecast(
    opened: OpenCheckpoint, context_tokens: int, attn_implementation: str | None = None, budget_bytes: int | None = None
) -> Forecast:
    """Try ``opened`` out without its weights, for calls of up to ``context_tokens`` tokens.

    Once for each model, context and attention: figures of the kernel are never the same twice, and a floor is one number. What
    holds more than ``budget_bytes``, or than four GiB where that is less, is not tried but foreseen, from shorter prompts.
    """
    wide = max(
        ((ref.shape[0], ref.shape[1]) for ref in _matrices(opened)), key=lambda shape: shape[0] * shape[1], default=(64, 64)
    )
    # Before the trial, which leaves the heap in another state each time.
    code = product_code_bytes(opened.layout.dtype, *wide, context_tokens)
    key = opened.cls, opened.config.to_json_string(), opened.layout.dtype, opened.bits, context_tokens, attn_implementation
    trial = _trials.get(key) or _tried(opened, context_tokens, attn_implementation, max(_MOST_BYTES, budget_bytes or 0))
    if trial.needs.tried:
        _trials[key] = trial
    return Forecast(trial.needs, trial.top_k, code, trial.modules, _converting(opened))


class _Trial(NamedTuple):
    needs: Needs
    top_k: int
    modules: int


_trials: dict[tuple[Any, ...], _Trial] = {}


def _tried(opened: OpenCheckpoint, context_tokens: int, attn_implementation: str | None, most_bytes: int) -> _Trial:
    with _no_old_garbage(), foreign_errors("The model does not run with this configuration.", opened.folder):
        model = hollow_model(opened, attn_implementation)
        part_heads(model)
        if attn_implementation is None and opened.rounded:
            group_heads(model, True)
        dry = dry_run(model)
        needs = rehearse(model, opened.layout.moe_layers, dry.cache, context_tokens, min(most_bytes, available_bytes()))
        modules = sum(1 for _ in model.modules())
        del model
    give_back()
    return _Trial(needs, dry.top_k, modules)


@contextmanager
def _no_old_garbage() -> Iterator[None]:
    """Garbage is only looked for among what is made from now on: all objects of torch and transformers take half a second.

    Young objects grow old by collections alone, so there are none but our own. A full collection of few objects, the others
    frozen, would be the worst: the interpreter takes its count for that of all objects, and collects them all ever so often.
    """
    ours = gc.isenabled()
    try:
        gc.disable()
        yield
    finally:
        try:
            gc.collect(1)
        finally:
            if ours:
                gc.enable()


def _matrices(opened: OpenCheckpoint) -> list[TensorRef]:
    """Weights as large as an expert's, or smaller: of what they are like, most shapes are met."""
    most = max(layer.expert_bytes for layer in opened.layout.moe_layers)
    return [ref for ref in opened.refs.values() if len(ref.shape) == 2 and ref.nbytes <= most]


def _converting(opened: OpenCheckpoint) -> int:
    types = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
    own = types.get(opened.layout.dtype)
    others = (ref.nbytes for key, ref in opened.refs.items() if key not in opened.layout.expert_keys and ref.dtype != own)
    return sum(sorted(others, reverse=True)[:_AT_ONCE])
