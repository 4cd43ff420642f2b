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
from swapless.trace import Trace, TraceHeader


class Step(NamedTuple):
    """One forward call of the whole model.

    ``document`` and ``position`` int32 (T,) of every row, rows being B sequences of S tokens, sequence-major; ``valid``
    bool (T,), False for padding; ``token_id`` int32 (T,) or None.
    """

    phase: Phase
    document: np.ndarray
    position: np.ndarray
    valid: np.ndarray
    token_id: np.ndarray | None


class _Kept(NamedTuple):
    number: int
    step: Step
    ids: np.ndarray
    gates: np.ndarray
    scores: np.ndarray | None


class RoutingLog:
    """Collects the chosen experts of every step.

    Parameters
    ----------
    header : TraceHeader
        Shape of the model; rows must fit it.
    max_tokens : int
        Rows kept. Beyond it the oldest steps are dropped and the trace's ``notes`` say so: a log without end would break
        the memory cap.

    Attributes
    ----------
    tap : RouterTap or None
        Set it to keep the router's output for every expert as well.
    """

    def __init__(self, header: TraceHeader, max_tokens: int = 100_000) -> None:
        self.header = header
        self.tap: RouterTap | None = None
        self._max_tokens = max_tokens
        self._next_step = 0
        self.clear()

    def clear(self) -> None:
        """Forget the rows; steps are numbered on, so that pieces of one recording can be put together."""
        self._steps: list[_Kept] = []
        self._rows = 0
        self._dropped = 0
        self._current: _Kept | None = None
        self._misfit: str | None = None

    def begin(self, step: Step) -> None:
        """A forward call begins."""
        tokens, layers = len(step.document), self.header.num_moe_layers
        shape = (tokens, layers, self.header.top_k)
        scores = np.zeros((tokens, layers, self.header.num_experts), np.float16) if self.tap else None
        self._current = _Kept(self._next_step, step, np.full(shape, NO_EXPERT, np.int16), np.zeros(shape, np.float16), scores)

    def add(self, moe_layer: int, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> None:
        """One MoE layer of the present call chose ``ids_TK`` with gate weights ``weights_TK``."""
        kept = self._current
        if kept is None:
            return
        if tuple(ids_TK.shape) != kept.ids.shape[::2]:
            self._misfit = f"MoE layer {moe_layer} was called with {tuple(ids_TK.shape)}, the model with {kept.ids.shape[::2]}"
            return
        kept.ids[:, moe_layer] = ids_TK.numpy()
        kept.gates[:, moe_layer] = weights_TK.detach().to(torch.float32).numpy()
        if kept.scores is not None and self.tap is not None:
            kept.scores[:, moe_layer] = self.tap.scores(moe_layer, ids_TK, self.header.num_experts)

    def end(self) -> None:
        """The forward call is complete."""
        kept, self._current = self._current, None
        if kept is None:
            return
        unused = (kept.ids < 0) | (kept.ids >= self.header.num_experts)
        kept.ids[unused] = NO_EXPERT
        kept.gates[unused] = 0
        _merge_repeats(kept.ids, kept.gates)
        self._steps.append(kept)
        self._next_step += 1
        self._rows += len(kept.step.document)
        while self._rows > self._max_tokens and len(self._steps) > 1:
            dropped = len(self._steps.pop(0).step.document)
            self._rows -= dropped
            self._dropped += dropped

    def abandon(self) -> None:
        """The forward call failed: its rows are no routing."""
        self._current = None

    def trace(self) -> Trace:
        """All complete steps, padding left out.

        Raises
        ------
        TraceValueError
            Nothing was recorded yet, or a MoE layer ran on other rows than the model (no rectangular trace exists then).
        """
        if self._misfit:
            raise TraceValueError(message("This model's routing does not fit the trace format.", got=self._misfit))
        if not any(kept.step.valid.any() for kept in self._steps):
            raise TraceValueError(message("There is no routing yet.", step="Run the model first."))
        steps = [kept.step for kept in self._steps]
        valid = np.concatenate([step.valid for step in steps])

        def rows(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
            present = [part for part in parts if part is not None]
            return np.concatenate(present)[valid] if len(present) == len(parts) else None

        notes = f"the first {self._dropped} rows were dropped to keep memory bounded" if self._dropped else None
        return Trace.from_arrays(
            replace(self.header, notes=notes),
            expert_ids=rows([kept.ids for kept in self._steps]),
            gate_weights=rows([kept.gates for kept in self._steps]),
            router_scores=rows([kept.scores for kept in self._steps]),
            document=rows([step.document for step in steps]),
            position=rows([step.position for step in steps]),
            phase=rows([np.full(len(step.document), int(step.phase), np.int8) for step in steps]),
            token_id=rows([step.token_id for step in steps]),
            step=rows([np.full(len(kept.step.document), kept.number, np.int32) for kept in self._steps]),
        )


def _merge_repeats(ids_TLK: np.ndarray, gates_TLK: np.ndarray) -> None:
    # Hash routers may name an expert twice for one token: it is one request, with both weights.
    top_k = ids_TLK.shape[2]
    for first in range(top_k):
        for later in range(first + 1, top_k):
            repeat = (ids_TLK[:, :, later] == ids_TLK[:, :, first]) & (ids_TLK[:, :, later] != NO_EXPERT)
            if repeat.any():
                gates_TLK[:, :, first][repeat] += gates_TLK[:, :, later][repeat]
                gates_TLK[:, :, later][repeat] = 0
                ids_TLK[:, :, later][repeat] = NO_EXPERT
