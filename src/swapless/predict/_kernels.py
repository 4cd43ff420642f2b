"""Compiled loops over routing; every slow twin stands in the tests.

Those that take a trace's ids have a door at the end of this file, which looks at them first. The others work on arrays that a
stream made for itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from swapless.arrays import want, want_ids
from swapless.compiled import kernel
from swapless.errors import UsageError, message
from swapless.portable import log, log32


@kernel()
def _add_routing(into: Any, rows: Any, ids: Any, num_experts: int) -> None:
    for t in range(len(rows)):
        row = rows[t]
        if row < 0:
            continue
        for layer in range(ids.shape[1]):
            for place in range(ids.shape[2]):
                expert = ids[t, layer, place]
                if expert >= 0:
                    into[row, layer * num_experts + expert] += 1


@kernel()
def _multi_hot(ids: Any, num_experts: int, out: Any) -> None:
    for t in range(ids.shape[0]):
        for layer in range(ids.shape[1]):
            for place in range(ids.shape[2]):
                expert = ids[t, layer, place]
                if expert >= 0:
                    out[t, layer, expert] = 1


@kernel()
def logs(values: Any, out: Any) -> None:
    """Natural logarithms of ``values`` (N, T), all above 0, into ``out``."""
    for row in range(values.shape[0]):
        for place in range(values.shape[1]):
            out[row, place] = log(values[row, place])


@kernel()
def prior_blocks(
    smooth: Any, total: Any, counts: Any, pair_total: Any, pair_counts: Any, seen: Any, met: Any, out: Any, row: int
) -> None:
    """The three prior blocks of one token, ``out[0..2, row]``.

    Half the log of each smoothed share over the one it falls back to: the token's over ``smooth``, the pair's over the
    token's, that of earlier places in the document over the pair's. Places without a count share one value.
    """
    half, one = np.float32(0.5), np.float32(1)
    lone, joint, again = -half * log32(total + one), -half * log32(pair_total + one), -half * log32(seen + one)
    for key in range(len(smooth)):
        share = smooth[key]
        value = lone
        if counts[key] > 0:
            value += half * log32(one + counts[key] / share)
        out[0, row, key] = value
        value = joint
        pair = pair_counts[key]
        if pair > 0 or met[key] > 0:
            share = (counts[key] + share) / (total + one)
            if pair > 0:
                value += half * log32(one + pair / share)
        out[1, row, key] = value
        value = again
        if met[key] > 0:
            share = (pair + share) / (pair_total + one)
            value += half * log32(one + met[key] / share)
        out[2, row, key] = value


@kernel()
def past_blocks(smooth: Any, before: Any, faded: Any, out: Any, row: int) -> None:
    """The blocks of past routing of one token, ``out[3.., row]``: the last token's choices, then the fading sums less share."""
    for key in range(len(smooth)):
        out[3, row, key] = before[key]
        for rate in range(faded.shape[0]):
            out[4 + rate, row, key] = 3 * (faded[rate, key] - smooth[key])


@kernel()
def finish_token(ids: Any, num_experts: int, fades: Any, before: Any, faded: Any, met: Any) -> None:
    """Take the choices (L, K) of a finished token into the fading sums, the last token's choices and its word's counts."""
    for key in range(len(before)):
        before[key] = 0
        for rate in range(len(fades)):
            faded[rate, key] *= fades[rate]
    for layer in range(ids.shape[0]):
        for place in range(ids.shape[1]):
            expert = ids[layer, place]
            if expert >= 0:
                key = layer * num_experts + expert
                before[key] = 1
                met[key] += 1
                for rate in range(len(fades)):
                    faded[rate, key] += np.float32(1) - fades[rate]


@kernel()
def _document_blocks(
    ids: Any,
    num_experts: int,
    fades: Any,
    smooth: Any,
    words: Any,
    num_words: int,
    single: Any,
    pair: Any,
    own_single: Any,
    own_pair: Any,
    out: Any,
    numbers: Any,
) -> None:
    width = len(smooth)
    met, seen = np.zeros((num_words + 1, width), np.float32), np.zeros(num_words + 1, np.float32)
    before, faded = np.zeros(width, np.float32), np.zeros((len(fades), width), np.float32)
    counts, nothing = np.zeros((2, width), np.float32), np.zeros(width, np.float32)
    for t in range(ids.shape[0]):
        for which in range(2):
            rows, totals, table = single if which == 0 else pair
            own_rows, own_totals, own_table = own_single if which == 0 else own_pair
            total = np.float32(0)
            counts[which, :] = 0
            if rows[t] >= 0:
                total = np.float32(totals[rows[t]])
                for key in range(width):
                    counts[which, key] = table[rows[t], key]
                if own_rows[t] >= 0:
                    total -= own_totals[own_rows[t]]
                    for key in range(width):
                        counts[which, key] -= own_table[own_rows[t], key]
            numbers[which, t] = total
        word = words[t]
        known = word >= 0
        numbers[2, t] = seen[word] if known else 0
        prior_blocks(
            smooth,
            numbers[0, t],
            counts[0],
            numbers[1, t],
            counts[1],
            numbers[2, t],
            met[word] if known else nothing,
            out,
            t,
        )
        past_blocks(smooth, before, faded, out, t)
        finish_token(ids[t], num_experts, fades, before, faded, met[word])
        seen[word] += 1


@kernel()
def _document_past(ids: Any, num_experts: int, fades: Any, before: Any, faded: Any) -> None:
    width = before.shape[1]
    last, sums, unused = np.zeros(width, np.float32), np.zeros((len(fades), width), np.float32), np.zeros(width, np.float32)
    for t in range(ids.shape[0]):
        before[t, :] = last
        for rate in range(len(fades)):
            faded[rate, t, :] = sums[rate]
        finish_token(ids[t], num_experts, fades, last, sums, unused)


def _checked(ids: np.ndarray, layers: int, num_experts: int, rows: int) -> None:
    want_ids(want(ids, "expert_ids", np.int16, (rows, layers, None)), num_experts)


def add_routing(into: np.ndarray, rows: np.ndarray, ids: np.ndarray, num_experts: int) -> None:
    """Add the choices ``ids`` (T, L, K) of each token to row ``rows[t]`` of ``into`` (R, L*E); row -1 is nowhere.

    Raises
    ------
    UsageError
        Ids out of range or twice in a row, or arrays that do not fit each other.
    """
    want(into, "sums", into.dtype, (None, ids.shape[1] * num_experts))
    _checked(ids, ids.shape[1], num_experts, len(rows))
    _rows_of(rows, len(into), len(ids))
    _add_routing(into, rows, ids, num_experts)


def _rows_of(rows: np.ndarray, length: int, tokens: int) -> None:
    """Refuse rows of a table that are not there; -1 is nowhere."""
    want(rows, "rows", np.int64, (tokens,))
    if rows.size and (rows.min() < -1 or rows.max() >= length):
        got = f"{rows.min()} to {rows.max()}"
        raise UsageError(message("A row of a table is out of range.", got=got, allowed=f"-1 to {length - 1}"))


def multi_hot(ids: np.ndarray, num_experts: int, out: np.ndarray) -> None:
    """Set ``out`` (T, L, E) to 1 where an expert of ``ids`` (T, L, K) was chosen.

    Raises
    ------
    UsageError
        Ids out of range or twice in a row, or arrays that do not fit each other.
    """
    want(out, "chosen", out.dtype, (len(ids), None, num_experts))
    _checked(ids, out.shape[1], num_experts, len(out))
    _multi_hot(ids, num_experts, out)


def document_blocks(
    ids: np.ndarray,
    num_experts: int,
    fades: np.ndarray,
    smooth: np.ndarray,
    words: np.ndarray,
    num_words: int,
    single: Any,
    pair: Any,
    own_single: Any,
    own_pair: Any,
    out: np.ndarray,
    numbers: np.ndarray,
) -> None:
    """All blocks (BLOCKS, T, L*E) of one document, and ``numbers`` (3, T): occurrences of word, of pair, and in this document.

    ``single`` and ``pair`` are (rows, totals, counts) of tables; ``own_*`` the same for what is to be left out, rows -1 for
    nothing. ``words`` (T,) number the distinct words from 0, -1 an unknown one.

    Raises
    ------
    UsageError
        Ids out of range or twice in a row, or arrays that do not fit each other.
    """
    width = ids.shape[1] * num_experts
    _checked(ids, ids.shape[1], num_experts, len(words))
    _rows_of(words, num_words, len(ids))
    want(smooth, "shares", np.float32, (width,))
    want(out, "blocks", np.float32, (4 + len(fades), len(ids), width))
    want(numbers, "numbers", np.float32, (3, len(ids)))
    for rows, totals, counts in (single, pair, own_single, own_pair):
        _rows_of(rows, len(totals), len(ids))
        want(counts, "counts", np.uint16, (len(totals), width))
    _document_blocks(ids, num_experts, fades, smooth, words, num_words, single, pair, own_single, own_pair, out, numbers)


def document_past(ids: np.ndarray, num_experts: int, fades: np.ndarray, before: np.ndarray, faded: np.ndarray) -> None:
    """Past routing of every token of one document.

    ``before`` (T, L*E) becomes the choices of the token before, ``faded`` (F, T, L*E) the fading sums of all finished ones, a
    token ``a`` back weighing ``(1 - fade) * fade**(a - 1)``.

    Raises
    ------
    UsageError
        Ids out of range or twice in a row, or arrays that do not fit each other.
    """
    width = ids.shape[1] * num_experts
    _checked(ids, ids.shape[1], num_experts, len(ids))
    want(before, "before", np.float32, (len(ids), width))
    want(faded, "fading sums", np.float32, (len(fades), len(ids), width))
    _document_past(ids, num_experts, fades, before, faded)
