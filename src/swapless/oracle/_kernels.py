"""Scans over the tokens of a sequence: group ids, running means, sticky choices, documents. Each has a slow twin in the tests.

All take validated arrays and one call of the model, whatever its length: a prefill is a long call and a decode step a short
one, so that both take the same decisions. S counts keys (those before the call and its own), N the tokens of the call.
"""

from __future__ import annotations

from typing import Any, no_type_check

import numpy as np

from swapless.compiled import kernel

HASHED_TOKENS = 4
"""Tokens at the start of a document that decide its hash."""
LENGTH, FIRST, START, NUMBER, ENDED, HASHED, HASH = range(7)
"""Places in a sequence's document state: valid tokens, first valid key, first key of the document, number of the document,
whether its last token ended it, tokens hashed, and the hash."""


@kernel()
@no_type_check
def assign_groups(scores: Any, start: Any, threshold: Any, past: int, fraction: float, gid: Any, count: Any) -> None:
    """Put each token into the group of the latest key it scores above its threshold, or into a new one.

    ``scores`` float (B, N, S), ``start`` int (B, N) first key a row may look at (-1: a padding row), ``threshold`` float
    (B, N), ``gid`` int (B, S) filled up to ``past`` and filled on here, ``count`` int (B,) groups so far, counted on here.
    """
    for b in range(scores.shape[0]):
        for n in range(scores.shape[1]):
            i = past + n
            low = start[b, n]
            if low < 0:
                gid[b, i] = -1
                continue
            limit = threshold[b, n]
            j = i - 1
            while j >= low and not (gid[b, j] >= 0 and scores[b, n, j] > limit):
                j -= 1
            joins = False
            if j >= low:
                members = 0
                passed = 0
                for s in range(low, i):
                    if gid[b, s] == gid[b, j]:
                        members += 1
                        if scores[b, n, s] > limit:
                            passed += 1
                joins = passed >= fraction * members
            if joins:
                gid[b, i] = gid[b, j]
            else:
                gid[b, i] = count[b]
                count[b] += 1


@kernel()
@no_type_check
def running_mean(h: Any, slot: Any, decay: float, sums: Any, weights: Any, mean: Any, weight_at: Any) -> None:
    """Mean of each token's slot up to and including the token; ``decay`` < 1 forgets older tokens.

    ``h`` float (B, N, D), ``slot`` int (B, N) (-1: the token itself), ``sums`` float64 (B, G, D) and ``weights`` float64 (B, G)
    are the state, ``mean`` (B, N, D) and ``weight_at`` (B, N) the result.
    """
    for b in range(h.shape[0]):
        for n in range(h.shape[1]):
            g = slot[b, n]
            if g < 0:
                weight_at[b, n] = 1.0
                mean[b, n] = h[b, n]
                continue
            weight = weights[b, g] * decay + 1.0
            weights[b, g] = weight
            weight_at[b, n] = weight
            for d in range(h.shape[2]):
                total = sums[b, g, d] * decay + h[b, n, d]
                sums[b, g, d] = total
                mean[b, n, d] = total / weight


@kernel()
@no_type_check
def running_mean_backward(grad: Any, slot: Any, decay: float, groups: int, weight_at: Any, out: Any) -> None:
    """Gradient of :func:`running_mean` with respect to ``h``: the same scan, backwards."""
    carried = np.zeros((groups, grad.shape[2]), np.float64)
    for b in range(grad.shape[0]):
        carried[:] = 0.0
        for n in range(grad.shape[1] - 1, -1, -1):
            g = slot[b, n]
            if g < 0:
                out[b, n] = grad[b, n]
                continue
            for d in range(grad.shape[2]):
                total = carried[g, d] + grad[b, n, d] / weight_at[b, n]
                out[b, n, d] = total
                carried[g, d] = total * decay


@kernel()
@no_type_check
def choose(scores: Any, restart: Any, stay: float, previous: Any, ids: Any) -> None:
    """The K experts of highest score, where the experts of the token before have ``stay`` added to theirs.

    ``scores`` float (B, N, E), ``restart`` int (B, N): 1 forgets the token before, -1 is padding, which nobody remembers.
    ``previous`` int (B, K) is the state, -1 for none; ``ids`` int (B, N, K) the result. Ties go to the lower expert.
    """
    held = np.empty(scores.shape[2], np.float64)
    for b in range(scores.shape[0]):
        for n in range(scores.shape[1]):
            for e in range(scores.shape[2]):
                held[e] = scores[b, n, e]
            if restart[b, n] == 0:
                for k in range(previous.shape[1]):
                    if previous[b, k] >= 0:
                        held[previous[b, k]] += stay
            for k in range(ids.shape[2]):
                best = np.argmax(held)
                ids[b, n, k] = best
                held[best] = -np.inf
            if restart[b, n] >= 0:
                for k in range(ids.shape[2]):
                    previous[b, k] = ids[b, n, k]


@kernel()
@no_type_check
def top_mass(scores: Any, start: Any, past: int, mass: float) -> None:
    """Keep of each row the largest scores that make up ``mass`` of its sum over earlier tokens, scaled to sum 1; in place.

    A row without earlier tokens in its document becomes 1 at itself. The cut is found by bisection, so ties at it all stay.
    """
    for b in range(scores.shape[0]):
        for n in range(scores.shape[1]):
            i = past + n
            low = start[b, n]
            total = 0.0
            largest = 0.0
            for s in range(scores.shape[2]):
                if low < 0 or s < low or s >= i:
                    scores[b, n, s] = 0.0
                else:
                    total += scores[b, n, s]
                    largest = max(largest, scores[b, n, s])
            if total <= 0.0:
                scores[b, n, i] = 1.0
                continue
            under, over = 0.0, largest
            for _ in range(20):
                cut = 0.5 * (under + over)
                kept = 0.0
                for s in range(low, i):
                    if scores[b, n, s] >= cut:
                        kept += scores[b, n, s]
                if kept >= mass * total:
                    under = cut
                else:
                    over = cut
            kept = 0.0
            for s in range(low, i):
                if scores[b, n, s] < under:
                    scores[b, n, s] = 0.0
                kept += scores[b, n, s]
            for s in range(low, i):
                scores[b, n, s] /= kept


@kernel()
@no_type_check
def follow_documents(
    ids: Any, valid: Any, end: int, past: int, state: Any, number: Any, start: Any, rank: Any, hashed: Any
) -> None:
    """Number the documents of each sequence, which the token ``end`` parts, and hash their first tokens.

    ``ids`` int (B, N), ``valid`` bool (B, N), ``state`` int64 (B, 7); results, all int64 (B, N): document ``number`` (-1 for
    padding), first key of the document, keys attended to, and the hash so far.
    """
    for b in range(ids.shape[0]):
        for n in range(ids.shape[1]):
            if not valid[b, n]:
                number[b, n] = -1
                start[b, n] = -1
                rank[b, n] = 1
                hashed[b, n] = 0
                continue
            if state[b, LENGTH] == 0 or state[b, ENDED] == 1:
                if state[b, LENGTH] == 0:
                    state[b, FIRST] = past + n
                state[b, NUMBER] += 1
                state[b, START] = past + n
                state[b, HASHED] = 0
                state[b, HASH] = 1469598103
            if state[b, HASHED] < HASHED_TOKENS:
                state[b, HASHED] += 1
                state[b, HASH] = ((state[b, HASH] ^ ids[b, n]) * 16777619) % 4294967291
            state[b, LENGTH] += 1
            state[b, ENDED] = 1 if ids[b, n] == end else 0
            number[b, n] = state[b, NUMBER]
            start[b, n] = state[b, START]
            rank[b, n] = state[b, LENGTH]
            hashed[b, n] = state[b, HASH]
