"""A dry run of the loaded model with experts that answer zero: what its KV cache takes, measured instead of derived.

Families keep very different things between steps (keys and values, latent vectors, convolution and recurrent states), and no
formula covers them all. Two short prefills without a single expert read tell the bytes a token and the bytes a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from swapless.runtime.door import ROOM_TOKENS, experts_of, windows_of

_SHORT, _LONG = 4, 20


class CacheSize(NamedTuple):
    """What a sequence takes in the KV cache, in bytes.

    ``fixed`` whatever its length, ``per_token`` for each token, and for each of the last tokens of layers with a window, by
    ``windows``: (bytes a token, tokens that are kept).
    """

    fixed: int
    per_token: int
    windows: tuple[tuple[int, int], ...] = ()

    def of(self, tokens: int) -> int:
        """Of a sequence of so many tokens, with the room that layers make for a few more."""
        room = -(-tokens // ROOM_TOKENS) * ROOM_TOKENS
        return self.fixed + self.per_token * room + sum(nbytes * min(tokens, kept) for nbytes, kept in self.windows)

    def whole(self, tokens: int) -> int:
        """What layers with a window hold beyond it until a prompt of so many tokens is over."""
        return sum(nbytes * max(0, tokens - kept) for nbytes, kept in self.windows)


class DryRun(NamedTuple):
    """The cache of one sequence, and K as the router really hands it out."""

    cache: CacheSize
    top_k: int


class _ZeroExperts:
    """Stands in for the engine at the door."""

    top_k = 1

    def forward(self, module: Any, hidden_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        self.top_k = ids_TK.shape[1]
        return torch.zeros_like(hidden_TD)


@contextmanager
def standing_in(model: PreTrainedModel, stand_in: Any) -> Iterator[None]:
    """Let ``stand_in`` be the engine of all experts modules of ``model``, which must not belong to one yet."""
    modules = [module for _, module in experts_of(model)]
    for module in modules:
        module.swapless_engine = stand_in
    try:
        yield
    finally:
        for module in modules:
            del module.swapless_engine


@torch.no_grad()
def dry_run(model: PreTrainedModel) -> DryRun:
    """Measure the cache of ``model``, whose experts modules must not belong to an engine yet. Leaves no trace in it."""
    stand_in = _ZeroExperts()
    with standing_in(model, stand_in):
        (small, seen), (large, _) = (_cache_bytes(model, tokens) for tokens in (_SHORT, _LONG))
    per_token = max(0, large - small) // (_LONG - _SHORT)
    fixed = max(0, small - _SHORT * per_token)
    # Windows are longer than the runs: until they are full, what they keep of a token looks like what all others keep.
    windows = tuple((nbytes, kept) for nbytes, kept in seen if kept >= _LONG)
    return DryRun(CacheSize(fixed, max(0, per_token - sum(nbytes for nbytes, _ in windows)), windows), stand_in.top_k)


def _cache_bytes(model: PreTrainedModel, tokens: int) -> tuple[int, list[tuple[int, int]]]:
    out = model(input_ids=torch.zeros((1, tokens), dtype=torch.long), use_cache=True)  # the one id that every vocabulary has
    cache = getattr(out, "past_key_values", None)
    return _tensor_bytes(cache, set()), windows_of(cache)


def _tensor_bytes(value: Any, seen: set[int]) -> int:
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        if storage.data_ptr() in seen:
            return 0
        seen.add(storage.data_ptr())
        return storage.nbytes()
    if isinstance(value, (list, tuple)):
        return sum(_tensor_bytes(item, seen) for item in value)
    if isinstance(value, dict):
        return sum(_tensor_bytes(item, seen) for item in value.values())
    if hasattr(value, "__dict__") and id(value) not in seen and not isinstance(value, type):
        seen.add(id(value))
        return _tensor_bytes(vars(value), seen)
    return 0
