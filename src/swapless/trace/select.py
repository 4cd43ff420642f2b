"""Choosing, joining and splitting rows of traces, always by whole labels: documents, domains, phases."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from swapless.errors import TraceMismatchError, UnknownNameError, UsageError, message
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
    kept = np.ones(len(trace), np.bool_)
    if documents is not None:
        wanted = document_ranges(documents) if isinstance(documents, str) else [(int(d), int(d)) for d in documents]
        inside = np.zeros(len(trace), np.bool_)
        for first, last in wanted:
            inside |= (trace.document >= first) & (trace.document <= last)
        kept &= inside
    if domain is not None:
        if domain not in trace.domains:
            raise UnknownNameError.of("domain", domain, trace.domains)
        kept &= trace.domain == trace.domains.index(domain)
    if phase is not None:
        labels = {item.label: int(item) for item in Phase}
        name = phase.label if isinstance(phase, Phase) else phase
        if name not in labels:
            raise UnknownNameError.of("phase", str(name), labels)
        kept &= trace.phase == labels[name]
    if not kept.any():
        got = f"documents={documents}, domain={domain}, phase={phase}"
        there = f"documents {trace.document.min()}-{trace.document.max()}"
        raise UsageError(message("No token of the trace meets the conditions.", got=got, allowed=there))
    return trace if kept.all() else trace.rows(kept)


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
