"""The KV cache that is appended to in place: what it answers is what transformers' own answers, and it stays a cache."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from swapless.runtime.door import ROOM_TOKENS, grow_in_place
from swapless.runtime.door.cache import GrowingLayer, TrimmedSlidingLayer


def filled(*layers: Any, tokens: int = 5, batch: int = 2) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = list(layers)
    for number in range(len(layers)):
        cache.update(*new(tokens, batch, number), number)
    return cache


def new(tokens: int, batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(100 * seed + tokens)
    return torch.randn(batch, 3, tokens, 4, generator=rng), torch.randn(batch, 3, tokens, 6, generator=rng)


def both() -> tuple[DynamicCache, DynamicCache]:
    theirs = filled(DynamicLayer(), DynamicSlidingWindowLayer(8))
    ours = filled(DynamicLayer(), DynamicSlidingWindowLayer(8))
    grow_in_place(ours)
    assert [type(layer) for layer in ours.layers] == [GrowingLayer, TrimmedSlidingLayer]
    return ours, theirs


def agree(ours: DynamicCache, theirs: DynamicCache, tokens: int = 1, batch: int = 2) -> None:
    for number in range(2):
        given = new(tokens, batch, number + 7)
        got, expected = ours.update(*given, number), theirs.update(*given, number)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert ours.get_seq_length() == theirs.get_seq_length()
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
        assert a.get_mask_sizes(3) == b.get_mask_sizes(3)


@torch.no_grad()
def test_it_answers_what_transformers_answers_and_copies_only_now_and_then() -> None:
    ours, theirs = both()
    places = set()
    for _ in range(2 * ROOM_TOKENS):
        agree(ours, theirs)
        places.add(ours.layers[0].keys.data_ptr())
    assert len(places) <= 3
    agree(ours, theirs, tokens=ROOM_TOKENS + 3)


@torch.no_grad()
def test_what_was_seen_before_never_changes() -> None:
    """A cache that is cut back and goes on with other tokens writes elsewhere, as transformers' does."""
    ours, theirs = both()
    theirs.layers[1] = DynamicSlidingWindowLayer(1000)
    ours.layers[1] = DynamicSlidingWindowLayer(1000)
    for cache in (ours, theirs):
        cache.update(*new(5), 1)
    agree(ours, theirs, tokens=4)
    seen = ours.layers[0].keys
    was = seen.clone()
    for cache in (ours, theirs):
        cache.crop(-3)
    agree(ours, theirs, tokens=2)
    assert torch.equal(seen, was)


@torch.no_grad()
def test_beams_batches_and_copies() -> None:
    ours, theirs = both()
    agree(ours, theirs)
    apart = copy.deepcopy(ours)
    other = copy.deepcopy(theirs)
    for cache in (ours, theirs):
        cache.reorder_cache(torch.tensor([1, 1]))
    agree(ours, theirs)
    agree(apart, other, tokens=2)
    for cache in (ours, theirs):
        cache.batch_repeat_interleave(2)
    agree(ours, theirs, batch=4)
    for cache in (ours, theirs):
        cache.batch_select_indices(torch.tensor([0, 3]))
    agree(ours, theirs)


def test_gradients_and_inference_tensors_go_their_own_way() -> None:
    ours, theirs = both()
    with torch.inference_mode():
        agree(ours, theirs)
    with torch.no_grad():
        agree(ours, theirs)
    key, value = new(1)
    key.requires_grad_()
    ours.update(key, value, 0)
    assert ours.layers[0].keys.requires_grad


@torch.no_grad()
def test_a_window_keeps_no_more_than_it_shows() -> None:
    cache = filled(DynamicSlidingWindowLayer(8), tokens=1)
    grow_in_place(cache)
    cache.update(*new(500), 0)
    assert cache.layers[0].keys.untyped_storage().nbytes() == 2 * 3 * 7 * 4 * 4


def test_layers_that_a_family_made_for_itself_stay_as_they_are() -> None:
    class Own(DynamicLayer):
        pass

    cache = filled(Own())
    grow_in_place(cache)
    grow_in_place(None)
    assert type(cache.layers[0]) is Own and cache.layer_class_to_replicate is GrowingLayer
