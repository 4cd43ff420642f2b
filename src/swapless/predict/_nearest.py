"""Which of the stored rows is nearest, by loops whose sums have one order, so that every machine names the same one.

Closeness is the cosine of flat rows of L*E. The product of a row and all stored ones is kept in float64 and grows by one
stored column a choice: counts stay exact, and nothing depends on how many rows are looked at together. The row's own length
is the same for all and left out.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from swapless.compiled import kernel
from swapless.portable import exp32

_compiled: Any = kernel(error_model="numpy")

_CLEARLY = 1.0 + 1e-12
"""What a later row must exceed an earlier one by: equal cosines of whole numbers may differ in their last bit."""


@_compiled
def nearest(product: Any, length: Any, free: Any) -> int:
    """The row of the largest ``product / length`` among those that are ``free``; the lowest of equal ones, -1 without any."""
    best, most = -1, 0.0
    for row in range(len(product)):
        if free[row]:
            close = product[row] / length[row] if length[row] > 0 else 0.0
            if best < 0 or close > most * _CLEARLY:
                best, most = row, close
    return best


@_compiled
def lengths(rows: Any) -> Any:
    """Euclidean length of each row (M, N), float64 (M,)."""
    found = np.zeros(len(rows))
    for row in range(len(rows)):
        total = 0.0
        for place in range(rows.shape[1]):
            total += np.float64(rows[row, place]) * np.float64(rows[row, place])
        found[row] = np.sqrt(total)
    return found


@_compiled
def _add(product: Any, column: Any, times: float) -> None:
    for row in range(len(product)):
        product[row] += times * np.float64(column[row])


@_compiled
def keep(rows: Any, first: int, end: int, by_key: Any, length: Any, kept: Any) -> None:
    """Let rows ``first .. end - 1`` of ``rows`` (R, N) each replace the nearest one kept.

    ``kept`` int64 (C,) names the rows kept, ``by_key`` float32 (N, C) and ``length`` float64 (C,) hold them.
    """
    free, product = np.ones(len(kept), np.bool_), np.empty(len(kept))
    for number in range(first, end):
        product[:] = 0.0
        total = 0.0
        for key in range(rows.shape[1]):
            value = np.float64(rows[number, key])
            if value != 0:
                _add(product, by_key[key], value)
                total += value * value
        place = nearest(product, length, free)
        kept[place], length[place] = number, np.sqrt(total)
        for key in range(rows.shape[1]):
            by_key[key, place] = rows[number, key]


@_compiled
def matrix_scores(
    ids: Any, known: Any, by_key: Any, length: Any, matrices: Any, share: Any, neighbours: int, top_k: int, out: Any
) -> None:
    """Scores ``out`` (T, L, E) of one document by its nearest activation matrices.

    ``ids`` (T, L, K); ``known`` int64 (L,) layers of the current token that are known when each layer is asked for,
    ascending; ``by_key`` float32 (L*E, M) and ``matrices`` (M, L*E) the same counts; ``share`` (L, E).
    """
    layers, experts = share.shape
    past, now = np.zeros(len(matrices)), np.empty(len(matrices))
    free, summed = np.ones(len(matrices), np.bool_), np.empty(experts)
    begun = False
    for t in range(len(ids)):
        now[:] = past
        told, level = begun, 0
        for layer in range(layers + 1):
            end = known[layer] if layer < layers else layers
            while level < end:
                for place in range(ids.shape[2]):
                    if ids[t, level, place] >= 0:
                        _add(now, by_key[level * experts + ids[t, level, place]], 1.0)
                        told = True
                level += 1
            if layer == layers:
                break
            if not told:
                out[t, layer] = share[layer]
                continue
            summed[:] = 0.0
            free[:] = True
            for _ in range(min(neighbours, len(matrices))):
                row = nearest(now, length, free)
                free[row] = False
                for expert in range(experts):
                    summed[expert] += np.float64(matrices[row, layer * experts + expert])
            total = 0.0
            for expert in range(experts):
                total += summed[expert]
            for expert in range(experts):
                out[t, layer, expert] = min(summed[expert] * top_k / max(total, 1.0), 1.0)
        past[:] = now
        begun = told


@_compiled
def map_places(maps: Any, known: Any, by_key: Any, squares: Any, out: Any) -> None:
    """The stored map nearest to what is known of each token, ``out`` int64 (T, L), -1 where nothing is.

    ``maps`` float32 (T, L, E); ``known`` as in :func:`matrix_scores`; ``by_key`` float32 (L*E, M); ``squares`` float64 (L, M)
    the squared length of the first layers of each stored map.
    """
    layers, experts = maps.shape[1:]
    product, free, length = np.empty(by_key.shape[1]), np.ones(by_key.shape[1], np.bool_), np.empty(by_key.shape[1])
    for t in range(len(maps)):
        product[:] = 0.0
        level, place = 0, -1
        for layer in range(layers):
            if known[layer] > level:
                while level < known[layer]:
                    for expert in range(experts):
                        if maps[t, level, expert] != 0:
                            _add(product, by_key[level * experts + expert], np.float64(maps[t, level, expert]))
                    level += 1
                length[:] = np.sqrt(squares[level - 1])
                place = nearest(product, length, free)
            out[t, layer] = place


@_compiled
def text_places(texts: Any, by_bucket: Any, length: Any, out: Any) -> None:
    """The stored text nearest to each of ``texts`` uint8 (N, buckets), ``out`` int64 (N,), -1 where none has anything of it.

    ``by_bucket`` uint8 (buckets, M) and ``length`` float64 (M,) hold the stored ones.
    """
    product, free = np.empty(by_bucket.shape[1]), np.ones(by_bucket.shape[1], np.bool_)
    for number in range(len(texts)):
        product[:] = 0.0
        for bucket in range(texts.shape[1]):
            if texts[number, bucket] > 0:
                _add(product, by_bucket[bucket], np.float64(texts[number, bucket]))
        place = nearest(product, length, free)
        out[number] = place if place >= 0 and product[place] > 0 else -1


@_compiled
def softmax(scores: Any, out: Any) -> None:
    """Probabilities ``out`` float32 of router scores, both float32 (T, L, E)."""
    for t in range(scores.shape[0]):
        for layer in range(scores.shape[1]):
            row, most, total = out[t, layer], scores[t, layer, 0], np.float32(0)
            for expert in range(len(row)):
                row[expert] = scores[t, layer, expert]
                most = max(most, row[expert])
            for expert in range(len(row)):
                row[expert] = exp32(row[expert] - most)
                total += row[expert]
            for expert in range(len(row)):
                row[expert] /= total
