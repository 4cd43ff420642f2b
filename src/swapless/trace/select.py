"""Choosing, joining and splitting rows of traces, always by whole labels: documents, domains, phases."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from swapless.errors import TraceMismatchError, TraceValueError, UnknownNameError, UsageError, message
from swapless.notation import Phase
from swapless.trace.checks import check_trace
from swapless.trace.trace import Trace


def select(
    trace: Trace, *, documents: str | Sequence[int] | None = None, domain: str | None = None, phase: str | Phase | None = None
) -> Trace:
    """Rows that meet every condition given.

    Parameters
    ----------
    trace : Trace
        Where to choose from.
    documents : str or sequence of int, optional
        Document numbers; as text ``"0-998"``, ``"3"`` or ``"0-9,20-29"``, both ends included.
    domain : str, optional
        One label.
    phase : {"prefill", "decode"} or Phase, optional
        One phase.

    Returns
    -------
    Trace
        At least one row.

    Raises
    ------
    UsageError
        Text that names no documents, or conditions that no row meets.
    UnknownNameError
        No such domain or phase; the message lists what there is.

    Examples
    --------
    >>> from swapless.trace import TraceHeader
    >>> header = TraceHeader(model_id=None, num_experts=2, top_k=1, moe_blocks=(0,))
    >>> trace = Trace.from_arrays(header, expert_ids=[[[0]], [[1]], [[1]]], document=[0, 1, 2])
    >>> select(trace, documents="1-2").document.tolist()
    [1, 2]
    """
    return chosen_rows(trace, Choice.of(documents, domain, phase))


def require_decode(trace: Trace) -> None:
    """Refuse a trace on which no cache can be judged.

    Raises
    ------
    TraceValueError
        No row is a decode step.
    """
    if not (trace.phase == int(Phase.DECODE)).any():
        raise TraceValueError(
            message(
                "The trace has no decode steps, and only those can be judged: one read of a prefill serves many tokens.",
                got=f"{len(trace)} tokens of prefill",
                step="Record it again without --decode 0, or choose other documents.",
            )
        )


def chosen_rows(trace: Trace, chosen: Choice) -> Trace:
    """Rows of ``trace`` that meet ``chosen``; errors as :func:`select`."""
    chosen.check_domain(trace.domains)
    kept = chosen.mask(trace.document, trace.domain, trace.domains, trace.phase)
    if not kept.any():
        raise chosen.nothing(int(trace.document.min()), int(trace.document.max()))
    return trace if kept.all() else trace.rows(kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Conditions on rows; those that are None hold for every row.

    Parameters
    ----------
    documents : tuple of (int, int), optional
        First and last document of each range.
    domain : str, optional
        One label.
    phase : Phase, optional
        One phase.
    """

    documents: tuple[tuple[int, int], ...] | None = None
    domain: str | None = None
    phase: Phase | None = None

    @classmethod
    def of(cls, documents: str | Sequence[int] | None, domain: str | None, phase: str | Phase | None) -> Choice:
        """Conditions in the forms that :func:`select` takes; its errors, but for those that need the rows."""
        ranges = None
        if documents is not None:
            ranges = document_ranges(documents) if isinstance(documents, str) else [(int(d), int(d)) for d in documents]
        if isinstance(phase, str):
            labels = {item.label: item for item in Phase}
            if phase not in labels:
                raise UnknownNameError.of("phase", phase, labels)
            phase = labels[phase]
        return cls(documents=None if ranges is None else tuple(ranges), domain=domain, phase=phase)

    def check_domain(self, domains: Iterable[str]) -> None:
        """Refuse a label that none of ``domains`` is (UnknownNameError)."""
        if self.domain is not None and self.domain not in (known := list(domains)):
            raise UnknownNameError.of("domain", self.domain, known)

    def mask(self, document: np.ndarray, domain: np.ndarray, domains: Sequence[str], phase: np.ndarray) -> np.ndarray:
        """Which rows meet every condition, bool of shape (T,), from their columns as :class:`Trace` has them."""
        kept = np.ones(len(document), np.bool_)
        if self.documents is not None:
            inside = np.zeros(len(document), np.bool_)
            for first, last in self.documents:
                inside |= (document >= first) & (document <= last)
            kept &= inside
        if self.domain is not None:
            kept &= (domain == domains.index(self.domain)) if self.domain in domains else False
        if self.phase is not None:
            kept &= phase == int(self.phase)
        return kept

    def nothing(self, first_document: int, last_document: int) -> UsageError:
        """The error of a trace without a row that meets the conditions."""
        ranges = None if self.documents is None else ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in self.documents)
        asked = {"documents": ranges, "domain": self.domain, "phase": None if self.phase is None else self.phase.label}
        got = ", ".join(f"{name} {value}" for name, value in asked.items() if value is not None)
        there = f"documents {first_document}-{last_document}"
        return UsageError(message("No token of the trace meets the conditions.", got=got, allowed=there))


def document_ranges(text: str) -> list[tuple[int, int]]:
    """First and last document of each range in ``"0-9,20"``.

    Raises
    ------
    UsageError
        Not of that form, or a range that runs backwards.
    """
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise UsageError(message("Not a range of documents.", got=repr(part), allowed="0-998, or 3, or 0-9,20-29"))
        ranges.append((first, last))
    return ranges


def concatenate(traces: Sequence[Trace], *, renumber: bool = True) -> Trace:
    """Traces of one model, one after the other.

    Parameters
    ----------
    traces : sequence of Trace
        Of the same model id, revision, E, K and MoE blocks. Optional columns must be in all of them or in none.
    renumber : bool
        Give documents new numbers from 0, so that two traces' documents never merge; without it equal numbers are refused.

    Returns
    -------
    Trace
        With the first trace's header.

    Raises
    ------
    TraceMismatchError
        Another model, shape or set of columns, or the same document number twice.
    UsageError
        No trace.
    """
    if not traces:
        raise UsageError(message("There is no trace to join."))
    first = traces[0]
    for number, other in enumerate(traces[1:], start=1):
        for name in ("model_id", "revision", "num_experts", "top_k", "moe_blocks"):
            ours, theirs = getattr(first.header, name), getattr(other.header, name)
            if ours != theirs:
                what = f"Traces of different models cannot be joined: {name} differs."
                raise TraceMismatchError(message(what, where=f"trace {number}", got=repr(theirs), allowed=repr(ours)))
        for name in ("token_id", "token", "step", "gate_weights", "router_scores"):
            if (getattr(first, name) is None) != (getattr(other, name) is None):
                what = f"Traces with and without {name} cannot be joined."
                raise TraceMismatchError(message(what, where=f"trace {number}"))
    documents, steps, next_document, next_step = [], [], 0, 0
    for trace in traces:
        numbers, inverse = np.unique(trace.document, return_inverse=True)
        documents.append((inverse + next_document if renumber else trace.document).astype(np.int32))
        next_document += len(numbers)
        if trace.step is not None:
            steps.append(trace.step + np.int32(next_step))
            next_step += int(trace.step.max()) + 1
    if not renumber and sum(len(np.unique(part)) for part in documents) > len(np.unique(np.concatenate(documents))):
        raise TraceMismatchError(message("Traces share document numbers.", step="Join them with renumber=True."))
    names = tuple(dict.fromkeys(name for trace in traces for name in trace.domains))
    table = {name: code for code, name in enumerate(names)}
    codes = [np.array([table[name] for name in t.domains] + [-1], np.int32)[t.domain] for t in traces]
    joined = replace(
        first,
        document=np.concatenate(documents),
        position=np.concatenate([t.position for t in traces]),
        phase=np.concatenate([t.phase for t in traces]),
        domain=np.concatenate(codes),
        domains=names,
        expert_ids=np.concatenate([t.expert_ids for t in traces]),
        gate_weights=_joined(traces, "gate_weights"),
        router_scores=_joined(traces, "router_scores"),
        token_id=_joined(traces, "token_id"),
        step=np.concatenate(steps) if steps else None,
        token=None if first.token is None else _joined_texts(traces),
    )
    check_trace(joined)
    return joined


def _joined(traces: Sequence[Trace], name: str) -> np.ndarray | None:
    parts = [getattr(trace, name) for trace in traces]
    return None if parts[0] is None else np.concatenate(parts)


def _joined_texts(traces: Sequence[Trace]) -> object:
    import pyarrow as pa

    return pa.concat_arrays([trace.token.cast(pa.string()) for trace in traces if trace.token is not None])


def split(trace: Trace, fractions: Sequence[float] = (0.8, 0.2), *, seed: int = 0, by: str = "document") -> list[Trace]:
    """Traces over disjoint documents, drawn at random.

    Parameters
    ----------
    trace : Trace
        What to split.
    fractions : sequence of float
        Share of the documents of each part, summing to 1.
    seed : int
        Seed of the draw.
    by : {"document", "domain"}
        What stays together. Tokens of one document are never split.

    Returns
    -------
    list of Trace
        One a fraction, in recorded order, each with at least one document.

    Raises
    ------
    UsageError
        Fractions that do not sum to 1, or too few documents for so many parts.
    """
    if by not in ("document", "domain"):
        raise UsageError(message("A trace is split by document or by domain, never by token.", got=repr(by)))
    if not fractions or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-9:
        raise UsageError(message("Fractions must be positive and sum to 1.", got=list(fractions)))
    labels = trace.document if by == "document" else trace.domain
    groups = np.unique(labels)
    if len(groups) < len(fractions):
        raise UsageError(message(f"Too few {by}s for so many parts.", got=len(groups), allowed=f"at least {len(fractions)}"))
    order = np.random.default_rng(seed).permutation(groups)
    edges = np.round(np.cumsum([0.0, *fractions]) * len(groups)).astype(int)
    for part in range(1, len(edges) - 1):  # every part keeps at least one
        edges[part] = min(max(edges[part], edges[part - 1] + 1), len(groups) - (len(fractions) - part))
    return [trace.rows(np.isin(labels, order[first:last])) for first, last in itertools.pairwise(edges)]
