"""Which recorded rows the places of a continuously batched cache hold: transformers shares one cache among all requests."""

from __future__ import annotations

import weakref
from types import MethodType
from typing import Any

import numpy as np

from swapless.runtime.calls import Paged
from swapless.runtime.texts import NO_ROW, UNKNOWN_ROW, Texts

_ATTRIBUTE = "_swapless_places"


class PagedHeld:
    """The rows in paged caches, place by place.

    Parameters
    ----------
    texts : Texts
        Where texts begin and end.
    """

    def __init__(self, texts: Texts) -> None:
        self._texts = texts
        self._stream_of_row: dict[int, int] = {}

    def rows_before(self, places: Paged) -> np.ndarray:
        """The row before each sequence's first, int64 (N,)."""
        rows = self._places(places.cache)
        return np.array([NO_ROW if place < 0 else rows.get(place, UNKNOWN_ROW) for place in places.before.tolist()])

    def streams(self, before: np.ndarray) -> np.ndarray:
        """The name of each sequence, int32 (N,)."""
        new = self._texts.streams(len(before))
        return np.array([self._stream_of_row.pop(row, own) for row, own in zip(before.tolist(), new.tolist())], np.int32)

    def append(self, places: Paged, rows: np.ndarray, before: np.ndarray, of_row: np.ndarray, streams: np.ndarray) -> None:
        """A call was run: its rows int64 (T,) are in their places now."""
        self._places(places.cache).update(zip(places.write.tolist(), rows.tolist(), strict=True))
        last = rows[np.flatnonzero(np.diff(of_row, append=-1))]
        self._stream_of_row.update(zip(last.tolist(), streams.tolist(), strict=True))
        for end, begun in zip(last.tolist(), before.tolist(), strict=True):
            self._texts.end(end, begun)

    def _places(self, cache: Any) -> dict[int, int]:
        rows: dict[int, int] | None = getattr(cache, _ATTRIBUTE, None)
        if rows is None:
            rows = {}
            setattr(cache, _ATTRIBUTE, rows)
            weakref.finalize(cache, self._stream_of_row.clear)
            cache.perform_cache_copy = MethodType(perform_cache_copy, cache)
        return rows


def perform_cache_copy(cache: Any, copy_src_and_dst: Any) -> None:
    """As the cache's own: a request that forks takes copies of the blocks that it cannot share."""
    type(cache).perform_cache_copy(cache, copy_src_and_dst)
    rows: dict[int, int] = getattr(cache, _ATTRIBUTE)
    kinds = list(cache.cache_allocators)
    kind = "full_attention" if "full_attention" in kinds else kinds[0]
    allocator = cache.cache_allocators[kind]
    for source, copy in zip(*copy_src_and_dst[kind], strict=True):
        for place in range(allocator.tokens_per_page):
            row = rows.get(source * allocator.block_physical_stride + place, UNKNOWN_ROW)
            rows[copy * allocator.block_physical_stride + place] = row
