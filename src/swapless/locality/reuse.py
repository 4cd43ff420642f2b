"""How soon routing comes back: overlap of neighbouring tokens, distance of reuse, experts touched by a window."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from swapless.locality._segments import check_segments, layer_ids
from swapless.trace.capacity import PIECE_DOCUMENTS, PIECE_TOKENS, Source
from swapless.trace.parallel import Advance, nothing, spread
from swapless.trace.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReuseResult:
    """Reuse of every MoE layer; distances are in tokens and never cross a document.

    Parameters
    ----------
    segments : tuple of int
        Window lengths S of ``working_set`` and ``within``.
    shared, could_share : int64 ndarray of shape (L,)
        Experts that a token shares with the one before it, and experts of the tokens that have one before them.
    distance : int64 ndarray of shape (L, R)
        Uses whose expert was last used r + 1 tokens ago, R the longest document.
    uses : int64 ndarray of shape (L,)
        All uses, first uses of a document included.
    touched : int64 ndarray of shape (L, len(segments))
        Different experts of a window, summed over windows.
    windows : int64 ndarray of shape (len(segments),)
        Windows of each length.
    """

    segments: tuple[int, ...]
    shared: np.ndarray
    could_share: np.ndarray
    distance: np.ndarray
    uses: np.ndarray
    touched: np.ndarray
    windows: np.ndarray

    @property
    def overlap(self) -> np.ndarray:
        """Share of a token's experts that the token before used too, float64 (L,); NaN without such tokens."""
        return _ratio(self.shared, self.could_share)

    @property
    def working_set(self) -> np.ndarray:
        """Mean number of different experts in a window, float64 (L, len(segments)); NaN without a window."""
        return _ratio(self.touched, np.broadcast_to(self.windows, self.touched.shape))

    @property
    def within(self) -> np.ndarray:
        """Share of all uses whose expert was used at most S tokens before, float64 (L, len(segments))."""
        reached = np.concatenate([np.zeros((len(self.uses), 1), np.int64), np.cumsum(self.distance, axis=1)], axis=1)
        places = np.minimum(np.asarray(self.segments), self.distance.shape[1])
        return _ratio(reached[:, places], np.broadcast_to(self.uses[:, None], (len(self.uses), len(places))))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def reuse(source: Source, segments: int | Sequence[int] = (16,), *, advance: Advance = nothing) -> ReuseResult:
    """Overlap, reuse distances and working sets of every MoE layer.

    Parameters
    ----------
    source : Trace or TraceFile
        What to measure.
    segments : int or sequence of int
        Window lengths in tokens.

    Returns
    -------
    ReuseResult
        Counts, and the rates made of them.

    Raises
    ------
    UsageError
        A window below 1.

    Examples
    --------
    >>> from swapless.trace import TraceHeader
    >>> header = TraceHeader(model_id=None, num_experts=4, top_k=2, moe_blocks=(0,))
    >>> reuse(Trace.from_arrays(header, expert_ids=[[[0, 1]], [[1, 2]]])).overlap
    array([0.5])
    """
    from swapless.locality._kernels import distances, windows_at_least

    lengths = check_segments(segments)
    layers, experts = source.header.num_moe_layers, source.header.num_experts
    shared, could_share, uses = (np.zeros(layers, np.int64) for _ in range(3))
    touched, windows = np.zeros((layers, len(lengths)), np.int64), np.zeros(len(lengths), np.int64)
    distance = np.zeros((layers, 1), np.int64)

    def items() -> Iterator[tuple[Trace, int]]:
        for piece in source.pieces(PIECE_TOKENS, PIECE_DOCUMENTS):
            for layer in range(layers):
                yield piece, layer

    def work(item: tuple[Trace, int]) -> tuple[np.ndarray, np.ndarray, list[int]]:
        piece, layer = item
        ids, offsets = layer_ids(piece, layer)
        counts, gaps = np.zeros(3, np.int64), np.zeros(int(np.diff(offsets).max()), np.int64)
        distances(ids, offsets, experts, counts, gaps)
        found = []
        for window in (min(length, len(piece) + 1) for length in lengths):
            by_expert = np.zeros((experts, window + 1), np.int64)
            windows_at_least(ids, offsets, experts, window, by_expert, np.zeros((len(offsets) - 1, window + 1), np.int64))
            found.append(int(by_expert[:, 1].sum()))
        return counts, gaps, found

    for (piece, layer), (counts, gaps, found) in spread(work, items()):
        shared[layer] += counts[0]
        could_share[layer] += counts[1]
        uses[layer] += counts[2]
        touched[layer] += found
        if layer == 0:
            windows += [int(np.maximum(np.diff(piece.document_offsets) - m + 1, 0).sum()) for m in lengths]
        if len(gaps) > distance.shape[1]:
            distance = np.pad(distance, ((0, 0), (0, len(gaps) - distance.shape[1])))
        distance[layer, : len(gaps)] += gaps
        advance(len(piece) / max(1, len(source) * layers))
    return ReuseResult(
        segments=tuple(lengths),
        shared=shared,
        could_share=could_share,
        distance=distance,
        uses=uses,
        touched=touched,
        windows=windows,
    )
