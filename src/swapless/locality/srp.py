"""Segment routing best performance: how well one yes-or-no choice an expert and segment can follow the router."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from swapless.locality._segments import check_segments, layer_ids
from swapless.trace.capacity import PIECE_DOCUMENTS, PIECE_TOKENS, Source, document_labels
from swapless.trace.parallel import Advance, nothing, spread
from swapless.trace.trace import Trace


class Thresholded(NamedTuple):
    """Best threshold on the uses in a segment, and what it reaches; arrays of one shape.

    ``value`` is SRP in [0, 1]; ``relative_size`` (rho_hat) the experts kept on over the experts used; ``threshold`` the least
    number of uses that keeps an expert on; ``activation`` the share of (window, expert, token) triples that are active,
    NaN without any window.
    """

    value: np.ndarray
    relative_size: np.ndarray
    threshold: np.ndarray
    activation: np.ndarray


class Interval(NamedTuple):
    """Two-sided 95 % interval, arrays of one shape; NaN where none was asked for or there is only one document."""

    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SrpResult:
    """SRP of one segment length at every level.

    Parameters
    ----------
    segment_tokens : int
        S, the segment length.
    windows : int
        Segments counted, over all documents; 0 where every document is shorter than S.
    model, moe_layer, expert : Thresholded
        Shapes (), (L,) and (L, E); a level shares one threshold over all of its experts.
    domains : tuple of str or None
        Labels N; a document counts under the label of its first token.
    domain_model, domain_moe_layer : Thresholded
        Shapes (N,) and (N, L).
    model_interval, moe_layer_interval : Interval
        Reverse-percentile bootstrap over documents.
    """

    segment_tokens: int
    windows: int
    model: Thresholded
    moe_layer: Thresholded
    expert: Thresholded
    domains: tuple[str | None, ...]
    domain_model: Thresholded
    domain_moe_layer: Thresholded
    model_interval: Interval
    moe_layer_interval: Interval


def best_threshold(at_least: np.ndarray) -> Thresholded:
    """Maximise F1 over thresholds, given how many (window, expert) pairs have at least a uses.

    Parameters
    ----------
    at_least : int64 or float64 ndarray of shape (..., S + 1)
        Pairs with at least a = 0..S uses.

    Returns
    -------
    Thresholded
        Of the leading shape. Where several thresholds reach the best value, the lowest; without any use all are 0.

    Examples
    --------
    >>> best_threshold(np.array([4, 2, 2])).value  # two of four pairs are on for both tokens
    array(1.)
    """
    window = at_least.shape[-1] - 1
    tail = np.cumsum(at_least[..., ::-1], axis=-1)[..., ::-1]  # tail[a] = sum of at_least[a:]
    beyond = np.concatenate([tail[..., 1:], np.zeros_like(tail[..., :1])], axis=-1)
    true_positives = np.arange(window + 1) * at_least + beyond
    positives = window * at_least
    used = beyond[..., :1]
    with np.errstate(invalid="ignore", divide="ignore"):
        f1 = np.nan_to_num(2 * true_positives / (positives + used))
        best = np.argmax(f1, axis=-1, keepdims=True)
        value = np.take_along_axis(f1, best, -1)[..., 0]
        kept = np.nan_to_num(np.take_along_axis(positives, best, -1) / used)[..., 0]
        activation = (used / positives[..., :1])[..., 0]
    some = used[..., 0] > 0
    return Thresholded(value, np.where(some, kept, 0.0), np.where(some, best[..., 0], 0), activation)


def srp(
    source: Source,
    segments: int | Sequence[int],
    *,
    replicates: int = 0,
    seed: int = 0,
    advance: Advance = nothing,
) -> list[SrpResult]:
    """Segment routing best performance of every expert, MoE layer and the model.

    All windows of S tokens within a document count, one token apart; a document shorter than S has none. A segment router
    says "on" or "off" for an expert and a whole window; SRP is the best F1 that it reaches on the (window, token) pairs.

    Parameters
    ----------
    source : Trace or TraceFile
        What to measure.
    segments : int or sequence of int
        Segment lengths in tokens, any of at least 1.
    replicates : int
        Bootstrap replicates over documents; 0 for no intervals.
    seed : int
        Seed of the bootstrap.
    advance : callable, optional
        Told the share of the work done.

    Returns
    -------
    list of SrpResult
        One a segment length, in the order given.

    Raises
    ------
    UsageError
        A segment length below 1.

    Notes
    -----
    Unlike the published code, any S and E are served and sums are 64-bit. O(T L K) a segment length.

    References
    ----------
    .. [1] "Not All Models Suit Expert Offloading: On Local Routing Consistency of Mixture-of-Expert Models", ICLR 2026,
       arXiv:2505.16056, section 3 and appendix C.

    Examples
    --------
    >>> from swapless.trace import TraceHeader
    >>> header = TraceHeader(model_id=None, num_experts=2, top_k=1, moe_blocks=(0,))
    >>> trace = Trace.from_arrays(header, expert_ids=[[[0]], [[0]], [[1]], [[1]]])
    >>> round(float(srp(trace, 2)[0].model.value), 4)  # 6 / 7: on where used at least once
    0.8571
    """
    from swapless.locality._kernels import windows_at_least

    lengths = check_segments(segments)
    totals = [_Totals(source, window, replicates, seed) for window in lengths]
    layers = source.header.num_moe_layers
    share = 1 / max(1, len(source) * layers * len(lengths))

    def items() -> Iterator[tuple[Trace, int, int, int]]:
        first = 0
        for piece in source.pieces(PIECE_TOKENS, PIECE_DOCUMENTS):
            for layer in range(layers):
                for number in range(len(lengths)):
                    yield piece, first, layer, number
            first += len(piece.document_offsets) - 1

    def work(item: tuple[Trace, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
        piece, _, layer, number = item
        ids, offsets = layer_ids(piece, layer)
        experts, window = piece.num_experts, lengths[number]
        by_expert = np.zeros((experts, window + 1), np.int64)
        by_document = np.zeros((len(offsets) - 1, window + 1), np.int64)
        windows_at_least(ids, offsets, experts, window, by_expert, by_document)
        windows = np.maximum(np.diff(offsets) - window + 1, 0)
        by_expert[:, 0] = windows.sum()
        by_document[:, 0] = windows * experts
        return by_expert, by_document

    for (piece, first, layer, number), (by_expert, by_document) in spread(work, items()):
        totals[number].add(layer, first, document_labels(piece), by_expert, by_document)
        advance(len(piece) * share)
    return [total.result() for total in totals]


class _Totals:
    """Sums of one segment length."""

    def __init__(self, source: Source, window: int, replicates: int, seed: int) -> None:
        self.window, layers = window, source.header.num_moe_layers
        self.by_expert = np.zeros((layers, source.header.num_experts, window + 1), np.int64)
        self.by_domain: dict[str | None, np.ndarray] = {}
        documents = source.num_documents
        replicates = replicates if documents > 1 else 0
        rng = np.random.default_rng(np.random.SeedSequence([seed, documents]))
        self.drawn = np.zeros((replicates, documents), np.uint16)
        for replicate in self.drawn:
            replicate += np.bincount(rng.integers(documents, size=documents), minlength=documents).astype(np.uint16)
        self.resampled = np.zeros((layers, replicates, window + 1))

    def add(self, layer: int, first: int, labels: list[str | None], by_expert: np.ndarray, by_document: np.ndarray) -> None:
        self.by_expert[layer] += by_expert
        for label in set(labels):
            picked = np.array([other == label for other in labels])
            row = self.by_domain.setdefault(label, np.zeros((len(self.by_expert), self.window + 1), np.int64))
            row[layer] += by_document[picked].sum(axis=0)
        if len(self.drawn):
            weights = self.drawn[:, first : first + len(labels)].astype(np.float64)
            self.resampled[layer] += weights @ by_document.astype(np.float64)

    def result(self) -> SrpResult:
        names = sorted(self.by_domain, key=lambda name: (name is None, name or ""))
        domains = np.array([self.by_domain[name] for name in names])
        layers = self.by_expert.sum(axis=1)
        model, moe_layer = best_threshold(layers.sum(axis=0)), best_threshold(layers)
        return SrpResult(
            segment_tokens=self.window,
            windows=int(self.by_expert[0, 0, 0]),
            model=model,
            moe_layer=moe_layer,
            expert=best_threshold(self.by_expert),
            domains=tuple(names),
            domain_model=best_threshold(domains.sum(axis=1)),
            domain_moe_layer=best_threshold(domains),
            model_interval=reverse_percentile(model.value, best_threshold(self.resampled.sum(axis=0)).value),
            moe_layer_interval=reverse_percentile(moe_layer.value, best_threshold(self.resampled).value),
        )


def reverse_percentile(value: np.ndarray, replicates: np.ndarray) -> Interval:
    """95 % interval ``[2 x - q(.975), 2 x - q(.025)]`` from replicates along the last axis; NaN without replicates."""
    if replicates.shape[-1] == 0:
        return Interval(np.full(value.shape, np.nan), np.full(value.shape, np.nan))
    low, high = np.quantile(replicates, [0.025, 0.975], axis=-1)
    return Interval(2 * value - high, 2 * value - low)
