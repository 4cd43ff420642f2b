"""How evenly the experts are used: over the whole trace, and within the segments that a cache lives through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from swapless.locality._segments import check_segments, layer_ids
from swapless.trace.capacity import PIECE_DOCUMENTS, PIECE_TOKENS, Source
from swapless.trace.parallel import Advance, nothing, spread
from swapless.trace.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BalanceResult:
    """Load of every expert, and its evenness globally and locally.

    Parameters
    ----------
    segments : tuple of int
        Window lengths S of the local figures.
    load : int64 ndarray of shape (L, E)
        Uses of each expert.
    window_variation, window_entropy : float64 ndarray of shape (L, len(segments))
        Mean over windows of the coefficient of variation of the load within a window, and of its entropy over ln E; windows
        without any use are left out, NaN where none is left.
    activation : float64 ndarray of shape (L, E, len(segments))
        Share of the (window, token) pairs in which the expert is active; NaN without a window.
    """

    segments: tuple[int, ...]
    load: np.ndarray
    window_variation: np.ndarray
    window_entropy: np.ndarray
    activation: np.ndarray

    @property
    def entropy(self) -> np.ndarray:
        """Entropy of the load over ln E, float64 (L,): 1 is perfectly even, 0 one single expert; NaN without a use."""
        return entropy(self.load)

    @property
    def variation(self) -> np.ndarray:
        """Standard deviation of the load over its mean (population), float64 (L,); NaN without a use."""
        mean = self.load.mean(axis=1)
        return np.divide(self.load.std(axis=1), mean, out=np.full(len(mean), np.nan), where=mean > 0)

    @property
    def deviation(self) -> np.ndarray:
        """The published load balance: standard deviation (ddof=1) of ``activation`` over all (MoE layer, expert), a fraction.

        float64 (len(segments),); the paper prints it times 100, for S = 16.
        """
        flat = self.activation.reshape(-1, len(self.segments))
        return flat.std(axis=0, ddof=1) if len(flat) > 1 else np.full(len(self.segments), np.nan)


def entropy(load: np.ndarray) -> np.ndarray:
    """Entropy of each row over the logarithm of its length; 1.0 for rows of one place.

    Examples
    --------
    >>> entropy(np.array([[5, 5], [7, 0]]))
    array([1., 0.])
    """
    total = load.sum(axis=-1, keepdims=True)
    share = np.divide(load, total, out=np.full(load.shape, np.nan), where=total > 0)
    plain = -np.sum(share * _log(np.where(share > 0, share, 1.0)), axis=-1)
    return plain / _log(np.array([load.shape[-1]]))[0] + 0.0 if load.shape[-1] > 1 else plain + 1.0


def _log(values: np.ndarray) -> np.ndarray:
    from swapless.locality._kernels import logs_of

    flat = np.ascontiguousarray(values, np.float64).reshape(-1)
    found = np.empty_like(flat)
    logs_of(flat, found)
    return found.reshape(values.shape)


def balance(source: Source, segments: int | Sequence[int] = (16,), *, advance: Advance = nothing) -> BalanceResult:
    """Load and its evenness for every MoE layer.

    Parameters
    ----------
    source : Trace or TraceFile
        What to measure.
    segments : int or sequence of int
        Window lengths in tokens; windows slide by one token within a document.

    Returns
    -------
    BalanceResult
        Load, global and local evenness.

    Raises
    ------
    UsageError
        A window below 1.

    Notes
    -----
    The published figure measures global load only, although the trade-off that it is used for is about local load.
    """
    from swapless.locality._kernels import window_balance

    lengths = check_segments(segments)
    layers, experts = source.header.num_moe_layers, source.header.num_experts
    load = np.zeros((layers, experts), np.int64)
    sums = np.zeros((layers, len(lengths), 3))
    active = np.zeros((layers, experts, len(lengths)))
    windows = np.zeros(len(lengths), np.int64)

    def items() -> Iterator[tuple[Trace, int, int]]:
        for number, piece in enumerate(source.pieces(PIECE_TOKENS, PIECE_DOCUMENTS)):
            for layer in range(layers):
                yield piece, number, layer

    def work(item: tuple[Trace, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        piece, _, layer = item
        ids, offsets = layer_ids(piece, layer)
        local, covered = np.zeros((len(lengths), 3)), np.zeros((experts, len(lengths)))
        for number, window in enumerate(min(length, len(piece) + 1) for length in lengths):
            logs = np.arange(max(2, window * ids.shape[1] + 1), dtype=np.float64)
            logs[1:] *= _log(logs[1:])
            window_balance(ids, offsets, experts, window, logs, local[number], covered[:, number])
        used = ids[ids >= 0]
        return np.bincount(used, minlength=experts), local, covered

    # Pieces are summed in their own order, whenever they finish: floating-point sums must not depend on the threads.
    waiting: dict[tuple[int, int], np.ndarray] = {}
    for (piece, number, layer), (used, local, covered) in spread(work, items()):
        load[layer] += used
        active[layer] += covered  # integers in float64: exact in any order
        waiting[number, layer] = local
        if layer == 0:
            windows += [int(np.maximum(np.diff(piece.document_offsets) - m + 1, 0).sum()) for m in lengths]
        advance(len(piece) / max(1, len(source) * layers))
    for number, layer in sorted(waiting):
        sums[layer] += waiting[number, layer]
    with np.errstate(invalid="ignore", divide="ignore"):
        return BalanceResult(
            segments=tuple(lengths),
            load=load,
            window_variation=sums[:, :, 0] / sums[:, :, 2],
            window_entropy=sums[:, :, 1] / sums[:, :, 2],
            activation=active / (windows * np.asarray(lengths)),
        )
