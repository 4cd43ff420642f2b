"""Linked rings of keys: lists from which a key is taken, and to which one is added, in constant time.

``before`` and ``after`` hold the neighbours of keys and heads. ``after[head]`` is the newest key of a list, ``before[head]``
the oldest; a key in no list points to itself. A key is in one list at most. Unsigned, because compiled code then need not ask
at every index whether it counts from the end.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from swapless.cache.compiled import compiled


def empty_ring(keys: int, heads: int) -> np.ndarray:
    """``before`` or ``after`` of ``heads`` empty lists; the heads follow the keys."""
    return np.arange(keys + heads, dtype=np.uint32)


@compiled
def push(before: Any, after: Any, head: Any, key: Any) -> None:
    """Add ``key``, which is in no list, as the newest."""
    newest = after[head]
    before[key] = head
    after[key] = newest
    before[newest] = key
    after[head] = key


@compiled
def unlink(before: Any, after: Any, key: Any) -> None:
    """Take ``key`` out of its list, if it is in one."""
    older, newer = after[key], before[key]
    before[older] = newer
    after[newer] = older
    before[key] = key
    after[key] = key


@compiled
def renew(before: Any, after: Any, head: Any, key: Any) -> None:
    """Make ``key``, in a list or in none, the newest of the list of ``head``."""
    older, newer = after[key], before[key]
    before[older] = newer
    after[newer] = older
    push(before, after, head, key)
