"""Every cache size at once: priority stacks over a string of references (Mattson et al. 1970).

A cache that evicts the resident of lowest priority, where priorities do not depend on the cache's size, has the inclusion
property: the contents of a cache of C experts are the first C places of one list. A reference found at depth d is a hit for
every C > d. One pass over the references therefore gives the hit rate of all sizes.

Four rules share the pass: LOOKAHEAD (uses within a window of coming tokens, then recency), FREQUENCY (uses so far, then
recency), NEXT_USE (the clairvoyant) and RECENCY. Scoring is either on the state before the token (``live=False``) or
reference by reference. Needs numba, so nothing imports this file before it has work for it.
"""

from __future__ import annotations

from typing import Any, no_type_check

import numpy as np

from swapless.arrays import want, want_ids, want_offsets
from swapless.compiled import kernel
from swapless.errors import UsageError, message

LOOKAHEAD, FREQUENCY, NEXT_USE, RECENCY = 0, 1, 2, 3


def check_references(refs: np.ndarray, offsets: np.ndarray, width: int) -> None:
    """Refuse what the passes cannot walk (UsageError): they trust every id, and that a row names none twice."""
    if width < 1:
        raise UsageError(message("A cache needs experts to choose from.", got=width, allowed="a width of at least 1"))
    want(refs, "refs", np.int32, (None, None))
    want_ids(refs, width, "refs")
    want_offsets(offsets, len(refs))


def key_bits(num_tokens: int, refs_a_token: int, width: int, rule: int, window: int) -> tuple[int, int]:
    """Bits of a priority key that hold the expert, and bits that hold the expert and the time of its last use."""
    id_bits = max(1, (width - 1).bit_length())
    time_bits = (num_tokens * refs_a_token + 2).bit_length()
    count_bits = 0 if rule in (NEXT_USE, RECENCY) else ((window if rule == LOOKAHEAD else num_tokens) + 1).bit_length()
    if id_bits + time_bits + count_bits > 62:
        what = "The trace is too long for the priority keys of one pass."
        got = f"{num_tokens} tokens x {refs_a_token} references, {width} experts"
        raise UsageError(message(what, got=got, step="Measure fewer documents at a time."))
    return id_bits, id_bits + time_bits


def stack_hits(
    refs: np.ndarray, offsets: np.ndarray, width: int, *, rule: int, window: int = 1, live: bool = False, kept: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Depth at which each reference was found, counted for each document.

    Parameters
    ----------
    refs : int32 ndarray of shape (T, R)
        References in the order in which they are processed; -1 = none.
    offsets : int64 ndarray of shape (D + 1,)
        First token of each document, and T.
    width : int
        Number of experts that the cache may be asked for; ids lie in [0, width).
    rule : int
        LOOKAHEAD, FREQUENCY, NEXT_USE or RECENCY.
    window : int
        Tokens of look-ahead, this one included; for LOOKAHEAD only.
    live : bool
        Score a reference on the state that it meets, not on the state before its token.
    kept : bool
        Carry the cache from one document to the next.

    Returns
    -------
    found : int64 ndarray of shape (D, width)
        References found at each depth; those at depth d hit in every cache of more than d experts.
    first : int64 ndarray of shape (D, width)
        First uses, by the number of experts seen before them: where a free slot counts as a hit they hit in every
        cache of more than that many experts.

    Raises
    ------
    UsageError
        An id outside of [-1, width), or twice in a row; offsets that do not cut the rows; a pass that does not exist.
    """
    check_references(refs, offsets, width)
    if rule not in (LOOKAHEAD, FREQUENCY, NEXT_USE, RECENCY) or window < 1:
        raise UsageError(
            message("There is no such pass.", got=f"rule={rule}, window={window}", allowed="a window of at least 1")
        )
    window = min(window, len(refs) + 1)  # what lies behind the end is not looked at
    documents = len(offsets) - 1
    found, first = np.zeros((documents, width), np.int64), np.zeros((documents, width), np.int64)
    if not live and (rule == RECENCY or (rule == LOOKAHEAD and window == 1)):  # the same, then
        _recency_pass(refs, offsets, width, kept, found, first)
        return found, first
    id_bits, shift = key_bits(len(refs), refs.shape[1], width, rule, window)
    coming = next_uses(refs, offsets, width, kept) if rule == NEXT_USE else np.zeros((0, 0), np.int64)
    _stack_pass(refs, offsets, width, rule, window, live, kept, id_bits, shift, coming, found, first)
    return found, first


@kernel()
@no_type_check
def next_uses(refs: Any, offsets: Any, width: int, kept: bool) -> Any:
    """For each reference the index of the next one to the same expert, -1 if there is none (within the document)."""
    tokens, places = refs.shape
    coming = np.full((tokens, places), np.int64(-1))
    following = np.full(width, np.int64(-1))
    for document in range(len(offsets) - 2, -1, -1):
        if not kept:
            following[:] = -1
        for t in range(offsets[document + 1] - 1, offsets[document] - 1, -1):
            for j in range(places - 1, -1, -1):
                x = refs[t, j]
                if x >= 0:
                    coming[t, j] = following[x]
                    following[x] = t * places + j
    return coming


@kernel()
@no_type_check
def _carry(stack: Any, size: int, old_key: int, new_key: int) -> int:
    """Put ``new_key`` on top; each place below keeps the higher of what it held and what is carried down.

    The walk ends where ``old_key`` stood, or at ``size`` where the caller has put it as a sentinel. Returns the depth.
    """
    carried = stack[0]
    stack[0] = new_key
    if carried == old_key:
        return 0
    for i in range(1, size + 1):
        held = stack[i]
        if held == old_key:
            stack[i] = carried
            return i
        # Without a branch: which of the two is higher is a coin toss that no processor predicts.
        stack[i] = max(held, carried)
        carried = min(held, carried)
    return size


@kernel()
@no_type_check
def _stack_pass(
    refs: Any, offsets: Any, width: int, rule: int, window: int, live: bool, kept: bool, id_bits: int, shift: int,
    coming: Any, found: Any, first: Any,
) -> None:  # fmt: skip
    places = refs.shape[1]
    latest = np.int64(refs.shape[0]) * places + 1
    mask = (np.int64(1) << id_bits) - 1
    one = np.int64(1) << shift
    stack = np.empty(width + 1, np.int64)
    key = np.empty(width, np.int64)
    seen = np.zeros(width, np.bool_)
    depth = np.zeros(width, np.int64)
    size = 0
    for document in range(len(offsets) - 1):
        begin, end = offsets[document], offsets[document + 1]
        if document == 0 or not kept:
            size = 0
            seen[:] = False
            for x in range(width):
                key[x] = x
        for t in range(begin, end):
            if rule == 0:
                # The tokens that enter the window: all of it at the document's start, then one at a time.
                for entering in range(begin if t == begin else t + window - 1, min(t + window, end)):
                    for j in range(places):
                        x = refs[entering, j]
                        if x >= 0:
                            key[x] += one
            for i in range(size):
                x = stack[i] & mask
                stack[i] = key[x]
                depth[x] = i
            for j in range(places):
                x = refs[t, j]
                if x < 0:
                    continue
                old = key[x]
                clock = np.int64(t) * places + j + 1
                if rule == 2:
                    after = coming[t, j]
                    new = x if after < 0 else ((latest - after) << id_bits) | x
                else:
                    uses = np.int64(0)
                    if rule != 3:
                        uses = (old >> shift) - 1 if rule == 0 else (old >> shift) + 1
                    new = (uses << shift) | (clock << id_bits) | x
                key[x] = new
                if seen[x]:
                    met = _carry(stack, size, old, new)
                    found[document, met if live else depth[x]] += 1
                else:
                    first[document, size] += 1
                    seen[x] = True
                    stack[size] = -1
                    if size == 0:
                        stack[0] = new
                    else:
                        _carry(stack, size, np.int64(-1), new)
                    size += 1


@kernel()
@no_type_check
def _recency_pass(refs: Any, offsets: Any, width: int, kept: bool, found: Any, first: Any) -> None:
    """The stack of LRU, token by token: what was used goes on top, the last one highest, and the rest keeps its order."""
    places = refs.shape[1]
    stack, pushed = np.empty(width, np.int32), np.empty(places, np.int32)
    seen, asked = np.zeros(width, np.bool_), np.zeros(width, np.bool_)
    rest = np.empty(width, np.int32)
    size = 0
    for document in range(len(offsets) - 1):
        if document == 0 or not kept:
            size = 0
            seen[:] = False
        for t in range(offsets[document], offsets[document + 1]):
            top, awaited, unseen = 0, 0, size
            for j in range(places):
                x = refs[t, j]
                if x >= 0:
                    pushed[top] = x
                    top += 1
                    asked[x] = True
                    if seen[x]:
                        awaited += 1
                    else:
                        seen[x] = True
                        first[document, unseen] += 1
                        unseen += 1
            i = other = 0
            while awaited > 0 or (i < size and unseen > size):
                x = stack[i]
                if asked[x]:
                    found[document, i] += 1
                    awaited -= 1
                else:
                    rest[other] = x
                    other += 1
                i += 1
            for j in range(top):
                stack[top - 1 - j] = pushed[j]
                asked[pushed[j]] = False
            for j in range(other):
                stack[top + j] = rest[j]
            size = unseen
