"""Every cache size at once for an engine's requests: all experts of a token are judged together and pinned together.

The contents of a cache of C >= K experts after a token are the token's experts and the C - K others of highest priority among
those that it held. That is again one list: the token's experts on top, then at each further place the best of what was
pushed out above it. Below K experts the request model cannot work, so the first K - 1 sizes mean nothing here.
"""

from __future__ import annotations

from typing import Any, no_type_check

import numpy as np

from swapless.compiled import kernel
from swapless.errors import UsageError, message
from swapless.trace.stacks import FREQUENCY, NEXT_USE, RECENCY, check_references, key_bits, next_uses


def pinned_hits(
    refs: np.ndarray, offsets: np.ndarray, width: int, *, rule: int, kept: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Depth at which each reference was found when all of a token are pinned, counted for each document.

    Parameters and results as in :func:`swapless.trace.stacks.stack_hits`; ``rule`` is RECENCY, FREQUENCY or NEXT_USE.
    """
    check_references(refs, offsets, width)
    if rule not in (RECENCY, FREQUENCY, NEXT_USE):
        raise UsageError(message("There is no such rule.", got=rule, allowed=f"{RECENCY}, {FREQUENCY} or {NEXT_USE}"))
    documents = len(offsets) - 1
    found, first = np.zeros((documents, width), np.int64), np.zeros((documents, width), np.int64)
    id_bits, shift = key_bits(len(refs), refs.shape[1], width, rule, 1)
    coming = next_uses(refs, offsets, width, kept) if rule == NEXT_USE else np.zeros((0, 0), np.int64)
    _pinned_pass(refs, offsets, width, rule, kept, id_bits, shift, coming, found, first)
    return found, first


@kernel()
@no_type_check
def _pinned_pass(
    refs: Any, offsets: Any, width: int, rule: int, kept: bool, id_bits: int, shift: int, coming: Any, found: Any, first: Any
) -> None:
    places = refs.shape[1]
    latest = np.int64(refs.shape[0]) * places + 1
    stack, after_token = np.empty(width, np.int64), np.empty(width, np.int64)
    key = np.zeros(width, np.int64)
    seen, asked = np.zeros(width, np.bool_), np.zeros(width, np.bool_)
    out = np.empty(places + 1, np.int64)  # pushed out above this place, and not yet given one
    size = 0
    for document in range(len(offsets) - 1):
        if document == 0 or not kept:
            size = 0
            seen[:] = False
            key[:] = 0
        for t in range(offsets[document], offsets[document + 1]):
            top, awaited = 0, 0
            for j in range(places):
                x = refs[t, j]
                if x < 0:
                    continue
                clock = np.int64(t) * places + j + 1
                if rule == 2:
                    after = coming[t, j]
                    key[x] = x if after < 0 else ((latest - after) << id_bits) | x
                else:
                    uses = (key[x] >> shift) + 1 if rule == 1 else 0
                    key[x] = (uses << shift) | (clock << id_bits) | x
                asked[x] = True
                awaited += seen[x]
                after_token[top] = x
                top += 1
            new_size, waiting = top, 0
            for i in range(size):
                x = stack[i]
                if asked[x]:
                    found[document, i] += 1
                    awaited -= 1
                else:
                    out[waiting] = x
                    waiting += 1
                # Place i + 1 is one more expert of capacity: from the top on, the best one waiting gets it.
                if i + 1 > top and waiting > 0:
                    best = 0
                    for w in range(1, waiting):
                        if key[out[w]] > key[out[best]]:
                            best = w
                    after_token[new_size] = out[best]
                    new_size += 1
                    waiting -= 1
                    out[best] = out[waiting]
                if awaited == 0 and waiting == 0 and i + 1 >= top:
                    break  # below, every place keeps what it held
            while waiting > 0:
                best = 0
                for w in range(1, waiting):
                    if key[out[w]] > key[out[best]]:
                        best = w
                after_token[new_size] = out[best]
                new_size += 1
                waiting -= 1
                out[best] = out[waiting]
            unseen = size
            for j in range(top):
                x = after_token[j]
                asked[x] = False
                if not seen[x]:
                    seen[x] = True
                    first[document, unseen] += 1
                    unseen += 1
            for i in range(new_size):
                stack[i] = after_token[i]
            size = unseen
