"""The KV cache of a running model, as transformers makes it, but appended to in place.

transformers joins what is cached and what is new into a new tensor, for every layer and token: at 1,000 tokens and 48 layers
100 MB are copied for one token, and memory that is freed and asked for a little larger each time falls to pieces. Here each
layer keeps room for a few tokens more. What a layer answers has the same values, seen through other strides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, DynamicIndexedLayer, DynamicLayer, DynamicSlidingWindowLayer

ROOM_TOKENS = 64
"""Room is made for a multiple of so many tokens."""


class _Room(NamedTuple):
    """Memory for more tokens than are there: (B, H, room, D), and how many of them were ever written."""

    buffer: torch.Tensor
    written: int


_Update = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def _in_place(own: _Update) -> _Update:
    """What a layer that grows does instead of its ``own`` update."""

    def update(
        self: Any, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (B, H, new, D) keys and values; all that are there now, (B, H, tokens, D)."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            return own(self, key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for name, new in (("keys", key_states), ("values", value_states)):
            setattr(self, name, _appended(self, name, new))
        return self.keys, self.values

    return update


def _appended(layer: Any, name: str, new: torch.Tensor) -> torch.Tensor:
    held: torch.Tensor = getattr(layer, name)
    room: _Room | None = layer.__dict__.get(f"_room_of_{name}")
    tokens = held.shape[-2] if held.ndim > 1 else 0  # a layer begins with no axes; keys of width 0 have tokens
    total = tokens + new.shape[-2]
    buffer = None if room is None else room.buffer
    if (
        room is None
        or buffer is None
        or room.written != tokens  # cut back since: what was seen before must not change under whoever kept it
        or buffer.shape[-2] < total
        or buffer.shape[:-2] != new.shape[:-2]
        or buffer.dtype != new.dtype
        or held.data_ptr() != buffer.data_ptr()  # somebody put another tensor there
        or buffer.is_inference() != torch.is_inference_mode_enabled()
    ):
        buffer = new.new_empty((*new.shape[:-2], -(-total // ROOM_TOKENS) * ROOM_TOKENS, new.shape[-1]))
        if tokens:
            buffer[..., :tokens, :] = held
    buffer[..., tokens:total, :] = new
    setattr(layer, f"_room_of_{name}", _Room(buffer, total))
    return buffer[..., :total, :]


# No class is mixed in: a layer of transformers' own could not become one of these then.


class GrowingLayer(DynamicLayer):
    """All tokens."""

    update = _in_place(DynamicLayer.update)


class GrowingIndexedLayer(DynamicIndexedLayer):
    """All tokens, and keys of an indexer beside them, which are few."""

    update = _in_place(DynamicIndexedLayer.update)


class TrimmedSlidingLayer(DynamicSlidingWindowLayer):
    """The last tokens alone: of a long prompt, transformers' own keeps all until the next token comes."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As transformers' own."""
        seen: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, *args, **kwargs)
        if key_states.shape[-2] > 1:
            _trim(self)
        return seen


_GROWING: dict[type, type] = {
    DynamicLayer: GrowingLayer,
    DynamicIndexedLayer: GrowingIndexedLayer,
    DynamicSlidingWindowLayer: TrimmedSlidingLayer,
}
"""By transformers' class, and only of that very class: what a family makes of its own stays as it is."""


def grow_in_place(cache: Any) -> None:
    """Have a cache grow so from now on, if it is one of transformers' own that would grow otherwise."""
    if not isinstance(cache, Cache):
        return
    for layer in cache.layers:
        ours = _GROWING.get(type(layer))
        if ours is not None:
            layer.__class__ = ours
            if ours is TrimmedSlidingLayer:
                _trim(layer)
    if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer


def windows_of(cache: Any) -> list[tuple[int, int]]:
    """Of each layer with a window that :func:`grow_in_place` trims: bytes of a token, and tokens that are kept.

    ``cache`` holds one sequence of a few tokens.
    """
    return [
        ((layer.keys.nbytes + layer.values.nbytes) // layer.keys.shape[-2], layer.sliding_window)
        for layer in getattr(cache, "layers", ())
        if _GROWING.get(type(layer)) is TrimmedSlidingLayer and layer.is_initialized and layer.keys.numel()
    ]


def _trim(layer: Any) -> None:
    if layer.record_past or not layer.is_initialized:
        return
    for name in ("keys", "values"):
        held: torch.Tensor = getattr(layer, name)
        if held.untyped_storage().nbytes() > held.nbytes:
            setattr(layer, name, held.clone())
