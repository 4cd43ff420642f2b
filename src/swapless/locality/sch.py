"""Segment cache best hit rate, under both definitions that carry the name, for every cache size at once.

``lookahead`` (the current definition) is an online cache that knows how often each expert is used in the coming S tokens;
``static`` (the first one) keeps the C most used experts of each segment and replaces nothing inside it. They differ by up to
17 points on the same model, so neither is ever called plain SCH here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from swapless.locality._segments import check_segments
from swapless.trace.capacity import CapacityCurves, Level, Source, StackPass, capacity_curves
from swapless.trace.parallel import Advance, nothing


def sch_lookahead(
    source: Source,
    segments: int | Sequence[int],
    *,
    level: Level = "moe_layer",
    marks: Sequence[int] = (),
    advance: Advance = nothing,
) -> list[CapacityCurves]:
    """Hit rate of a cache that evicts the expert used least in the coming S tokens, the least recent one among equals.

    Every use of a token is judged on the cache before that token. The uses are then processed one by one, in recorded order:
    a miss evicts (no bypass), and a use counts as coming until it has been processed. ``S = 1`` is LRU. Each document starts
    with an empty cache, and the window ends with the document.

    Parameters
    ----------
    source : Trace or TraceFile
        What to measure.
    segments : int or sequence of int
        Look-ahead S in tokens, the current token included.
    level : {"moe_layer", "model"}
        One cache of 1..E experts a MoE layer, or one pool of 1..L*E shared by all MoE layers.
    marks : sequence of int
        Capacities for which the counts of each document are kept.

    Returns
    -------
    list of CapacityCurves
        One a segment length; ``rate("free")`` follows the published convention, where a first use is a hit while a slot
        is free, ``rate("miss")`` counts it as a miss.

    Raises
    ------
    UsageError
        A segment length below 1, or a mark out of range.

    Notes
    -----
    Not an upper bound on any cache: the rule is a heuristic, and the rate may fall as S grows.

    References
    ----------
    .. [1] arXiv:2505.16056, version 4, section 3; public code of December 2025.
    """
    from swapless.trace.stacks import LOOKAHEAD, stack_hits

    def pass_of(window: int) -> StackPass:
        def kernel(refs: np.ndarray, offsets: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
            return stack_hits(refs, offsets, width, rule=LOOKAHEAD, window=window)

        return StackPass("lookahead", kernel, window)

    return capacity_curves(source, [pass_of(m) for m in check_segments(segments)], level=level, marks=marks, advance=advance)


def sch_static(
    source: Source,
    segments: int | Sequence[int],
    *,
    level: Level = "moe_layer",
    marks: Sequence[int] = (),
    advance: Advance = nothing,
) -> list[CapacityCurves]:
    """Share of the uses in a segment that fall on its C most used experts, over all segments of S tokens.

    Segments are all windows of S tokens within a document, one token apart; a document shorter than S has none, and the rate
    is NaN where no window exists. First uses need no convention: the experts of a segment are there from its start.

    Parameters, results and errors as in :func:`sch_lookahead`.

    References
    ----------
    .. [1] arXiv:2505.16056, version 1, section 3.
    """
    from swapless.locality._kernels import ranked_uses
    from swapless.trace.stacks import check_references

    def pass_of(window: int) -> StackPass:
        def kernel(refs: np.ndarray, offsets: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
            check_references(refs, offsets, width)
            uses = np.zeros((len(offsets) - 1, width), np.int64)
            ranked_uses(refs, offsets, width, min(window, len(refs) + 1), uses)
            return uses, np.zeros_like(uses)

        return StackPass("static", kernel, window)

    return capacity_curves(source, [pass_of(m) for m in check_segments(segments)], level=level, marks=marks, advance=advance)
