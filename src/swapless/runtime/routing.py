"""The routing of a live model, kept as it happens and handed out as a trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from swapless.errors import TraceValueError, message
from swapless.notation import NO_EXPERT, Phase
from swapless.runtime.routers import RouterTap
from swapless.runtime.row_store import FILE_BYTES, MEMORY_BYTES, RowStore
from swapless.runtime.texts import NO_ROW, Path, Texts
from swapless.trace import Trace, TraceHeader


class Step(NamedTuple):
    """One forward call of the whole model.

    Of every row, rows being B sequences of S tokens, sequence-major: ``document`` int32 (T,) names the sequence while it is
    run, ``position`` int32 (T,) is the place in its text, ``valid`` bool (T,) is False for padding, ``token_id`` int32 (T,)
    or None. Of those the recording takes the ``kept`` ones, bool (T,), which are the valid ones if it is None; ``parent``
    int64 (n,) is the recorded row before each of them, by default the row above where the sequence is the same.
    ``continues`` says that the call goes on with a prefill that the last one began.
    """

    phase: Phase
    document: np.ndarray
    position: np.ndarray
    valid: np.ndarray
    token_id: np.ndarray | None
    kept: np.ndarray | None = None
    parent: np.ndarray | None = None
    continues: bool = False

    @property
    def recorded(self) -> np.ndarray:
        """The rows that the recording takes, bool (T,)."""
        return self.valid if self.kept is None else self.kept


class RoutingLog:
    """Collects the chosen experts of every step.

    Memory is bounded: beyond some MiB rows lie in a temporary file, and beyond ``max_tokens`` rows, or where no file can be
    written, the oldest are dropped; the trace's ``notes`` say so.

    Parameters
    ----------
    header : TraceHeader
        Shape of the model; rows must fit it.
    max_tokens : int
        Rows kept, about.
    memory_bytes, file_bytes : int
        What they may take in memory and on disk.

    Attributes
    ----------
    texts : Texts
        Which rows make up which text.
    """

    def __init__(
        self,
        header: TraceHeader,
        max_tokens: int = 100_000,
        *,
        memory_bytes: int = MEMORY_BYTES,
        file_bytes: int = FILE_BYTES,
    ) -> None:
        self.header = header
        self.texts = Texts()
        self._bounds = max_tokens, memory_bytes, file_bytes
        self._tap: RouterTap | None = None
        self._next_step = 0
        self.clear()

    @property
    def tap(self) -> RouterTap | None:
        """Set it to keep the router's output for every expert as well; forgets the rows."""
        return self._tap

    @tap.setter
    def tap(self, tap: RouterTap | None) -> None:
        self._tap = tap
        self.clear()

    @property
    def row_bytes(self) -> int:
        """What a row takes while its step is under way."""
        return self._store.record.itemsize

    def clear(self) -> None:
        """Forget the rows; steps are numbered on, so that pieces of one recording can be put together."""
        self.texts.clear()
        max_tokens, memory_bytes, file_bytes = self._bounds
        self._store = RowStore(self._record(), max_tokens, memory_bytes=memory_bytes, file_bytes=file_bytes)
        self._store.first = self._store.stop = self.texts.base
        self._step: Step | None = None
        self._misfit: str | None = None
        self._dropped = 0

    def _record(self) -> np.dtype:
        layers, top_k, experts = self.header.num_moe_layers, self.header.top_k, self.header.num_experts
        fields = [("position", np.int32), ("step", np.int32), ("phase", np.int8)]
        chosen = [("ids", np.int16, (layers, top_k)), ("gates", np.float16, (layers, top_k))]
        return np.dtype([*fields, *chosen, *([("scores", np.float16, (layers, experts))] if self._tap else [])])

    def begin(self, step: Step) -> None:
        """A forward call begins."""
        recorded = step.recorded
        self._step = step
        self._all = bool(recorded.all())
        self._rows = np.zeros(int(recorded.sum()), self._store.record)
        self._ids, self._gates = self._rows["ids"], self._rows["gates"]
        self._ids[:] = NO_EXPERT
        self._rows["position"] = step.position[recorded]
        self._rows["step"], self._rows["phase"] = self._next_step, int(step.phase)

    def add(self, moe_layer: int, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> None:
        """One MoE layer of the present call chose ``ids_TK`` with gate weights ``weights_TK``."""
        step = self._step
        if step is None:
            return
        expected = len(step.document), self.header.top_k
        if tuple(ids_TK.shape) != expected:
            self._misfit = f"MoE layer {moe_layer} was called with {tuple(ids_TK.shape)}, the model with {expected}"
            return
        rows = slice(None) if self._all else step.recorded
        self._ids[:, moe_layer] = ids_TK.numpy()[rows]
        self._gates[:, moe_layer] = weights_TK.detach().to(torch.float32).numpy()[rows]
        if self._tap is not None:
            self._rows["scores"][:, moe_layer] = self._tap.scores(moe_layer, ids_TK, self.header.num_experts)[rows]

    def end(self) -> None:
        """The forward call is complete."""
        step, self._step = self._step, None
        if step is None:
            return
        self._next_step += 1
        if len(self._rows) == 0:
            return
        ids, gates = self._ids, self._gates
        unused = (ids < 0) | (ids >= self.header.num_experts)
        if unused.any():
            ids[unused] = NO_EXPERT
            gates[unused] = 0
        _merge_repeats(ids, gates)
        recorded, parent = step.recorded, step.parent
        if parent is None:
            same = np.diff(step.document[recorded], prepend=step.document[recorded][:1] - 1) == 0
            parent = np.where(same, self.texts.next_row + np.arange(len(same)) - 1, NO_ROW)
        self.texts.append(parent, None if step.token_id is None else step.token_id[recorded], step.phase)
        self._store.append(self._rows)
        if self._store.first > self.texts.base:
            self._dropped += self._store.first - self.texts.base
            self.texts.forget_before(self._store.first)

    def suspend(self) -> Step | None:
        """Set a forward call aside while another, which is not recorded, runs in the middle of it."""
        step, self._step = self._step, None
        return step

    def resume(self, step: Step | None) -> None:
        """Go on with the call that :meth:`suspend` returned."""
        self._step = step

    def begin_child(self) -> None:
        """The process was forked: the rows of this one, the child, lie in a file of its own from now on."""
        self._store.begin_child()

    def abandon(self) -> None:
        """The forward call failed: its rows are no routing."""
        self._step = None

    def trace(self) -> Trace:
        """The texts that were run, each a document, with the rows of every complete step that belong to one.

        Padding is left out, and so are drafts that were not accepted and beams that were given up. A prefix that was read once
        and continued more than once stands in each of its documents, with the same step. ``notes`` say what was left out,
        what is missing, and what had to be assumed.

        Raises
        ------
        TraceValueError
            Nothing was recorded yet, or a MoE layer ran on other rows than the model (no rectangular trace exists then).
        """
        if self._misfit:
            raise TraceValueError(message("This model's routing does not fit the trace format.", got=self._misfit))
        paths = self.texts.paths()
        if not paths:
            raise TraceValueError(message("There is no routing yet.", step="Run the model first."))
        repeat = sum(len(path.rows) for path in paths) <= self._bounds[0]
        rows_of = [path.rows if repeat else path.rows[path.shared :] for path in paths]
        rows = np.concatenate(rows_of)
        document = np.repeat(np.arange(len(paths), dtype=np.int32), [len(part) for part in rows_of])
        order = np.argsort(rows, kind="stable")  # as they were run: within a step by document
        rows, document = rows[order], document[order]
        records = self._store.take(rows)
        token_id = self.texts.tokens(rows)
        return Trace.from_arrays(
            replace(self.header, notes=self._notes(paths, rows, repeat=repeat)),
            expert_ids=records["ids"],
            gate_weights=records["gates"],
            router_scores=records["scores"] if self._tap else None,
            document=document,
            position=records["position"],
            phase=records["phase"],
            token_id=token_id if (token_id >= 0).any() else None,
            step=records["step"],
        )

    def _notes(self, paths: Sequence[Path], rows: np.ndarray, *, repeat: bool) -> str | None:
        undecided = max(0, self.texts.undecided)
        left_out = self._store.stop - self._store.first - len(np.unique(rows)) - undecided
        cut_short = sum(not path.whole for path in paths)
        shared = sum(path.shared > 0 for path in paths)
        where = "stands in each of them" if repeat else "stands in the first of them alone"
        notes = [
            (self._dropped, "the first {} rows were dropped to keep memory bounded"),
            (left_out, "rows that belong to no text are left out (drafts not accepted, beams given up, padding): {}"),
            (undecided, "drafts of which nobody said whether they were accepted are left out: {}"),
            (cut_short, "documents that begin after tokens whose rows are not here: {}"),
            (shared, f"documents that share a beginning with an earlier one, which {where}: {{}}"),
            *((count, f"{note}: {{}}") for note, count in self.texts.notes.items()),
        ]
        return "; ".join(note.format(count) for count, note in notes if count) or None


def _merge_repeats(ids_TLK: np.ndarray, gates_TLK: np.ndarray) -> None:
    # Hash routers may name an expert twice for one token: it is one request, with both weights.
    in_order = np.sort(ids_TLK, axis=2)
    if not ((in_order[:, :, 1:] == in_order[:, :, :-1]) & (in_order[:, :, 1:] != NO_EXPERT)).any():
        return
    top_k = ids_TLK.shape[2]
    for first in range(top_k):
        for later in range(first + 1, top_k):
            repeat = (ids_TLK[:, :, later] == ids_TLK[:, :, first]) & (ids_TLK[:, :, later] != NO_EXPERT)
            if repeat.any():
                gates_TLK[:, :, first][repeat] += gates_TLK[:, :, later][repeat]
                gates_TLK[:, :, later][repeat] = 0
                ids_TLK[:, :, later][repeat] = NO_EXPERT
