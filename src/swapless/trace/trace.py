"""The trace: which experts a model chose, token by token. Immutable; every array is a read-only view.

Columns are numpy arrays over the memory that Arrow read; token texts stay an Arrow array. What this file leaves out:
files (``parquet``, ``stream``), choosing and joining rows (``select``), and the rules of a valid trace (``checks``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from swapless.errors import TraceValueError, message
from swapless.notation import Phase
from swapless.trace.header import TraceHeader

if TYPE_CHECKING:
    import pyarrow as pa
    from jaxtyping import Float16, Int8, Int16, Int32, Int64

_PER_TOKEN = ("document", "position", "phase", "domain", "token_id", "token", "step")
OPTIONAL = ("token_id", "token", "step", "gate_weights", "router_scores")
"""Columns that a trace may lack."""

_ROW_FIELDS = (*_PER_TOKEN, "expert_ids", "gate_weights", "router_scores")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Trace:
    """Routing of T tokens through L MoE layers.

    Build one with :meth:`from_arrays`, :func:`swapless.trace.read_trace` or an importer: those validate.

    Parameters
    ----------
    header : TraceHeader
        Shape and origin.
    document, position : int32 ndarray of shape (T,)
        Which text a token belongs to, and where in it; positions rise strictly within a document.
    phase : int8 ndarray of shape (T,)
        Codes of :class:`swapless.notation.Phase`.
    domain : int32 ndarray of shape (T,)
        Index into ``domains``, -1 where the token has no label.
    domains : tuple of str
        Names of the domains.
    expert_ids : int16 ndarray of shape (T, L, K)
        Chosen experts in [0, E), distinct within a token and MoE layer; -1 marks an unused place.
    gate_weights : float16 ndarray of shape (T, L, K), optional
        The router's weight of each chosen expert.
    router_scores : float16 ndarray of shape (T, L, E), optional
        The router's output for every expert.
    token_id : int32 ndarray of shape (T,), optional
        Ids of the tokens in the model's vocabulary.
    token : pyarrow.Array of string, optional
        Texts of the tokens.
    step : int32 ndarray of shape (T,), optional
        Rows of one forward call share it; None means that each row is its own call.
    """

    header: TraceHeader
    document: Int32[np.ndarray, " T"]
    position: Int32[np.ndarray, " T"]
    phase: Int8[np.ndarray, " T"]
    domain: Int32[np.ndarray, " T"]
    domains: tuple[str, ...]
    expert_ids: Int16[np.ndarray, "T L K"]
    gate_weights: Float16[np.ndarray, "T L K"] | None = None
    router_scores: Float16[np.ndarray, "T L E"] | None = None
    token_id: Int32[np.ndarray, " T"] | None = None
    token: pa.Array | None = None
    step: Int32[np.ndarray, " T"] | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, np.ndarray) and value.flags.writeable:
                view = value.view()
                view.flags.writeable = False
                object.__setattr__(self, item.name, view)

    @classmethod
    def from_arrays(
        cls,
        header: TraceHeader,
        *,
        expert_ids: Any,
        document: Any = None,
        position: Any = None,
        phase: Any = Phase.DECODE,
        domain: Any = None,
        token_id: Any = None,
        token: Sequence[str | None] | pa.Array | None = None,
        step: Any = None,
        gate_weights: Any = None,
        router_scores: Any = None,
    ) -> Trace:
        """Validated trace from plain arrays.

        Parameters
        ----------
        header : TraceHeader
            Shape and origin.
        expert_ids : int array of shape (T, L, K) or (T, L*K)
            Chosen experts; int16 is taken as it is, wider integers are converted after the range check.
        document : int array of shape (T,), optional
            All tokens belong to document 0 when left out.
        position : int array of shape (T,), optional
            Counted from 0 within each document when left out.
        phase : Phase, str, or sequence of either of length T
            ``"prefill"`` or ``"decode"`` (codes 0 and 1 work as well).
        domain : str, or sequence of str or None of length T, optional
            Labels.
        token_id, token, step, gate_weights, router_scores : optional
            As in the class.

        Returns
        -------
        Trace
            Shares memory with the arrays that already have the right type.

        Raises
        ------
        TraceValueError
            A wrong shape, an id out of range or twice in one token, positions that do not rise; row, MoE layer and value
            are named.

        Examples
        --------
        >>> header = TraceHeader(model_id=None, num_experts=4, top_k=2, moe_blocks=(0,))
        >>> trace = Trace.from_arrays(header, expert_ids=[[[0, 1]], [[1, 3]]], phase="decode")
        >>> len(trace), trace.position.tolist(), trace.num_documents
        (2, [0, 1], 1)
        """
        from swapless.trace.checks import check_trace, integers
        from swapless.trace.columns import domain_codes, phase_codes, positions, token_array

        ids = integers(expert_ids, "expert_ids", np.int16)
        num_tokens = len(ids) if ids.ndim else 0
        shape = (num_tokens, header.num_moe_layers, header.top_k)
        if ids.size != np.prod(shape) or ids.ndim not in (2, 3) or (ids.ndim == 3 and ids.shape != shape):
            allowed = f"(T, L, K) = (T, {shape[1]}, {shape[2]})"
            raise TraceValueError(message("expert_ids have the wrong shape.", got=ids.shape, allowed=allowed))

        def halves(values: Any) -> np.ndarray | None:
            array = None if values is None else np.asarray(values, np.float16)
            return array if array is None or array.ndim != 2 else array.reshape(num_tokens, shape[1], -1)

        documents = np.zeros(num_tokens, np.int32) if document is None else integers(document, "document", np.int32)
        codes, names = domain_codes(domain, num_tokens)
        trace = cls(
            header=header,
            document=documents,
            position=positions(documents) if position is None else integers(position, "position", np.int32),
            phase=phase_codes(phase, num_tokens),
            domain=codes,
            domains=names,
            expert_ids=ids.reshape(shape),
            gate_weights=halves(gate_weights),
            router_scores=halves(router_scores),
            token_id=None if token_id is None else integers(token_id, "token_id", np.int32),
            token=None if token is None else token_array(token),
            step=None if step is None else integers(step, "step", np.int32),
        )
        check_trace(trace)
        return trace

    def __len__(self) -> int:
        return len(self.document)

    def __repr__(self) -> str:
        shape = f"T={len(self)}, L={self.num_moe_layers}, E={self.num_experts}, K={self.top_k}"
        return f"Trace({self.header.model_id!r}, {shape}, documents={self.num_documents})"

    @property
    def num_experts(self) -> int:
        """E, routed experts a MoE layer."""
        return self.header.num_experts

    @property
    def top_k(self) -> int:
        """K, places for expert ids a token and MoE layer."""
        return self.header.top_k

    @property
    def num_moe_layers(self) -> int:
        """L, the number of MoE layers."""
        return self.header.num_moe_layers

    @property
    def num_documents(self) -> int:
        """Number of different documents."""
        return len(np.unique(self.document))

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the optional columns that it has."""
        return tuple(name for name in OPTIONAL if getattr(self, name) is not None)

    @property
    def document_offsets(self) -> Int64[np.ndarray, " D_plus_1"]:
        """Where each run of one document starts, and T at the end; whole documents after :meth:`grouped`."""
        starts = np.flatnonzero(np.diff(self.document, prepend=self.document[:1] - 1)) if len(self) else np.zeros(0, np.int64)
        return np.append(starts, len(self)).astype(np.int64)

    @property
    def tokens(self) -> list[str | None] | None:
        """Texts of the tokens as Python strings, or None."""
        return None if self.token is None else self.token.to_pylist()

    def rows(self, index: slice | np.ndarray) -> Trace:
        """The chosen rows as a trace of its own: views for a slice, copies for an index or a mask."""
        picked: dict[str, Any] = {"header": self.header, "domains": self.domains}
        for name in _ROW_FIELDS:
            value = getattr(self, name)
            if value is None or isinstance(value, np.ndarray):
                picked[name] = None if value is None else value[index]
            elif isinstance(index, slice):
                start, stop, stride = index.indices(len(self))
                whole = value.slice(start, max(0, stop - start)) if stride == 1 else value.take(np.arange(start, stop, stride))
                picked[name] = whole
            else:
                chosen = np.asarray(index)
                picked[name] = value.take(np.flatnonzero(chosen) if chosen.dtype == bool else chosen)
        return Trace(**picked)

    def grouped(self) -> Trace:
        """The same rows with every document in one piece; the trace itself where that holds already.

        A recorder of batches interleaves documents step by step; windows and caches run along one document. Order within
        a document stays, and documents stand in the order in which they first appear.
        """
        runs = self.document[self.document_offsets[:-1]]
        if len(np.unique(runs)) == len(runs):
            return self
        _, first, inverse = np.unique(self.document, return_index=True, return_inverse=True)
        return self.rows(np.argsort(first[inverse], kind="stable"))

    def pieces(
        self, max_tokens: int | None = None, max_documents: int | None = None, *, columns: Sequence[str] = ()
    ) -> Iterator[Trace]:
        """Whole documents, in pieces of about that size (at least one document each); all at once without limits.

        ``columns`` are optional columns that the caller looks at. A trace in memory hands out all that it has; a file reads
        no others.
        """
        whole = self.grouped()
        offsets, start = whole.document_offsets, 0
        last = len(offsets) - 1
        while start < last:
            stop = last
            if max_tokens is not None:
                stop = int(np.searchsorted(offsets, offsets[start] + max_tokens, side="right")) - 1
            if max_documents is not None:
                stop = min(stop, start + max_documents)
            stop = max(start + 1, stop)
            yield whole if (start, stop) == (0, last) else whole.rows(slice(int(offsets[start]), int(offsets[stop])))
            start = stop
