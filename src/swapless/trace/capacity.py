"""Hit rates of every cache size, as one result type, and the walk over a trace that fills it.

The walk goes document by document; a cache starts empty at each document unless it is *kept*. Sums are integers, so neither
the order of the work nor the number of threads shows in a result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from swapless.errors import UsageError, message
from swapless.trace.header import TraceHeader
from swapless.trace.parallel import Advance, nothing, spread
from swapless.trace.trace import Trace

Level = Literal["moe_layer", "model"]
Cold = Literal["free", "miss"]
Kernel = Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]
"""References (T, R), document offsets and width to the depths of repeated and of first uses, each (D, width)."""

PIECE_TOKENS = 16384
PIECE_DOCUMENTS = 512


class Source(Protocol):
    """What can be measured: a trace in memory, or an open file that is read piece by piece."""

    @property
    def header(self) -> TraceHeader:
        """Shape and origin."""
        ...

    @property
    def num_documents(self) -> int:
        """Number of different documents."""
        ...

    def __len__(self) -> int:
        """T, the number of tokens."""
        ...

    def pieces(
        self, max_tokens: int | None = None, max_documents: int | None = None, *, columns: Sequence[str] = ()
    ) -> Iterator[Trace]:
        """Whole documents, in pieces of about that size, with these optional columns where they exist."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CapacityCurves:
    """Hits of every cache size from 1 to C.

    Parameters
    ----------
    variant : str
        Policy or definition: ``lru``, ``lfu``, ``belady``, ``lookahead``.
    level : {"moe_layer", "model"}
        One cache a MoE layer (G = L, C = E), or one pool for all (G = 1, C = L * E).
    segment_tokens : int or None
        Look-ahead in tokens, for ``lookahead`` only.
    domains : tuple of str or None
        Labels of the rows N; a document counts under the label of its first token.
    repeated_hits, first_hits : int64 ndarray of shape (N, G, C)
        Hits among repeated uses, and first uses that found a free slot; place c is the cache of c + 1 experts.
    requests : int64 ndarray of shape (N, G)
        Requests in all.
    marks : tuple of int
        Capacities for which the counts of each document are kept, to draw intervals from.
    document_hits : int64 ndarray of shape (D, 2, G, len(marks))
        Hits of each document at the marks: with free first loads, and without.
    document_requests : int64 ndarray of shape (D, G)
        Requests of each document.
    """

    variant: str
    level: Level
    segment_tokens: int | None
    domains: tuple[str | None, ...]
    repeated_hits: np.ndarray
    first_hits: np.ndarray
    requests: np.ndarray
    marks: tuple[int, ...]
    document_hits: np.ndarray
    document_requests: np.ndarray

    def hits(self, cold: Cold = "free", domain: str | None = None) -> np.ndarray:
        """Hits, int64 of shape (G, C): all documents, or those of one domain."""
        rows = slice(None) if domain is None else [self.domains.index(domain)]
        repeated = self.repeated_hits[rows].sum(axis=0)
        return repeated + self.first_hits[rows].sum(axis=0) if cold == "free" else repeated

    def rate(self, cold: Cold = "free", domain: str | None = None) -> np.ndarray:
        """Hits over requests, float64 of shape (G, C); NaN where a MoE layer had no request.

        ``cold`` says what the first use of an expert counts as: ``free`` is a hit while a slot is free, ``miss`` never.
        """
        rows = slice(None) if domain is None else [self.domains.index(domain)]
        requests = self.requests[rows].sum(axis=0)[:, None]
        return np.divide(
            self.hits(cold, domain), requests, out=np.full(self.repeated_hits.shape[1:], np.nan), where=requests > 0
        )


@dataclass(frozen=True, slots=True)
class StackPass:
    """One kernel to walk with, and how its result is called."""

    variant: str
    kernel: Kernel
    segment_tokens: int | None = None


def references(piece: Trace, level: Level, moe_layer: int, *, demand_sets: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Reference string of one MoE layer or of all, and the document offsets in its rows.

    A row is a token; with ``demand_sets`` at model level it is a (token, MoE layer) pair, as an engine asks.
    """
    offsets, layers = piece.document_offsets, piece.num_moe_layers
    if level == "moe_layer":
        return np.ascontiguousarray(piece.expert_ids[:, moe_layer], np.int32), offsets
    base = (np.arange(layers, dtype=np.int32) * piece.num_experts)[None, :, None]
    ids = piece.expert_ids.astype(np.int32)
    pooled = np.where(ids >= 0, ids + base, np.int32(-1))
    if demand_sets:
        return pooled.reshape(-1, piece.top_k), offsets * layers
    return pooled.reshape(len(piece), -1), offsets


class _Sums:
    """Integer sums of one pass, filled piece by piece."""

    def __init__(self, groups: int, width: int, marks: Sequence[int]) -> None:
        self.groups, self.width, self.marks = groups, width, np.asarray(marks, np.int64)
        self.rows: dict[str | None, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self.hits: dict[int, np.ndarray] = {}
        self.requests: dict[int, np.ndarray] = {}

    def add(self, group: int, first_document: int, names: list[str | None], found: np.ndarray, first: np.ndarray) -> None:
        for name in set(names):
            picked = np.array([other == name for other in names])
            empty = (np.zeros((self.groups, self.width), np.int64), np.zeros((self.groups, self.width), np.int64))
            row = self.rows.setdefault(name, (*empty, np.zeros(self.groups, np.int64)))
            row[0][group] += found[picked].sum(axis=0)
            row[1][group] += first[picked].sum(axis=0)
            row[2][group] += found[picked].sum() + first[picked].sum()
        hits = self.hits.setdefault(first_document, np.zeros((len(names), 2, self.groups, len(self.marks)), np.int64))
        requests = self.requests.setdefault(first_document, np.zeros((len(names), self.groups), np.int64))
        if len(self.marks):
            repeated = np.cumsum(found, axis=1)[:, self.marks - 1]
            hits[:, 1, group] = repeated
            hits[:, 0, group] = repeated + np.cumsum(first, axis=1)[:, self.marks - 1]
        requests[:, group] = found.sum(axis=1) + first.sum(axis=1)

    def result(self, spec: StackPass, level: Level) -> CapacityCurves:
        names = sorted(self.rows, key=lambda name: (name is None, name or ""))
        order = sorted(self.hits)
        return CapacityCurves(
            variant=spec.variant,
            level=level,
            segment_tokens=spec.segment_tokens,
            domains=tuple(names),
            repeated_hits=np.cumsum([self.rows[name][0] for name in names], axis=2),
            first_hits=np.cumsum([self.rows[name][1] for name in names], axis=2),
            requests=np.array([self.rows[name][2] for name in names]),
            marks=tuple(int(mark) for mark in self.marks),
            document_hits=np.concatenate([self.hits[start] for start in order]),
            document_requests=np.concatenate([self.requests[start] for start in order]),
        )


def document_labels(piece: Trace) -> list[str | None]:
    """Domain of each document of a piece: the label of its first token."""
    codes = piece.domain[piece.document_offsets[:-1]]
    return [piece.domains[code] if code >= 0 else None for code in codes.tolist()]


def capacity_curves(
    source: Source,
    passes: Sequence[StackPass],
    *,
    level: Level,
    marks: Sequence[int] = (),
    kept: bool = False,
    demand_sets: bool = False,
    advance: Advance = nothing,
) -> list[CapacityCurves]:
    """Walk ``source`` once for each pass, all passes side by side on all cores.

    Raises
    ------
    UsageError
        A level that does not exist, or a mark outside [1, C].
    """
    header = source.header
    if level not in ("moe_layer", "model"):
        raise UsageError(message("Unknown level of a cache.", got=repr(level), allowed="moe_layer, model"))
    groups = header.num_moe_layers if level == "moe_layer" else 1
    width = header.num_experts * (1 if level == "moe_layer" else header.num_moe_layers)
    if any(not 1 <= mark <= width for mark in marks):
        raise UsageError(message("A capacity is out of range.", got=list(marks), allowed=f"1 to {width} experts"))
    sums = [_Sums(groups, width, marks) for _ in passes]
    share = 1 / max(1, len(source) * groups * len(passes))

    def items() -> Iterator[tuple[Trace, int, int, int]]:
        documents = 0
        for piece in source.pieces(*((None, None) if kept else (PIECE_TOKENS, PIECE_DOCUMENTS))):
            for number in range(len(passes)):
                for group in range(groups):
                    yield piece, documents, number, group
            documents += len(piece.document_offsets) - 1

    def work(item: tuple[Trace, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
        piece, _, number, group = item
        refs, offsets = references(piece, level, group, demand_sets=demand_sets)
        return passes[number].kernel(refs, offsets, width)

    for (piece, documents, number, group), (found, first) in spread(work, items()):
        sums[number].add(group, documents, document_labels(piece), found, first)
        advance(len(piece) * share)
    return [total.result(spec, level) for total, spec in zip(sums, passes)]
