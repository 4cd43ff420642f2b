"""The routing of a live model, kept as it happens and handed out as a trace."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from swapless.errors import TraceValueError, message
from swapless.notation import NO_EXPERT, Phase
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


class RoutingLog:
    """Collects the chosen experts of every step.

    Parameters
    ----------
    header : TraceHeader
        Shape of the model; rows must fit it.
    max_tokens : int
        Rows kept. Beyond it the oldest steps are dropped and the trace's ``notes`` say so: a log without end would break
        the memory cap.
    """

    def __init__(self, header: TraceHeader, max_tokens: int = 100_000) -> None:
        self.header = header
        self._max_tokens = max_tokens
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._steps: list[tuple[int, Step, np.ndarray, np.ndarray]] = []
        self._next_step = 0
        self._kept = 0
        self._dropped = 0
        self._current: tuple[Step, np.ndarray, np.ndarray] | None = None
        self._misfit: str | None = None

    def begin(self, step: Step) -> None:
        """A forward call begins."""
        shape = (len(step.document), self.header.num_moe_layers, self.header.top_k)
        self._current = (step, np.full(shape, NO_EXPERT, np.int16), np.zeros(shape, np.float16))

    def add(self, moe_layer: int, expert_ids: np.ndarray, gate_weights: torch.Tensor) -> None:
        """One MoE layer of the present call chose ``expert_ids`` (T, K) with ``gate_weights`` (T, K)."""
        if self._current is None:
            return
        _, ids, gates = self._current
        if expert_ids.shape != (ids.shape[0], ids.shape[2]):
            self._misfit = f"MoE layer {moe_layer} was called with {expert_ids.shape}, the model with {ids.shape[::2]}"
            return
        ids[:, moe_layer] = expert_ids
        gates[:, moe_layer] = gate_weights.detach().to(torch.float32).numpy()

    def end(self) -> None:
        """The forward call is complete."""
        if self._current is None:
            return
        step, ids, gates = self._current
        self._current = None
        unused = (ids < 0) | (ids >= self.header.num_experts)
        ids[unused] = NO_EXPERT
        gates[unused] = 0
        _merge_repeats(ids, gates)
        self._steps.append((self._next_step, step, ids, gates))
        self._next_step += 1
        self._kept += len(step.document)
        while self._kept > self._max_tokens and len(self._steps) > 1:
            dropped = len(self._steps.pop(0)[1].document)
            self._kept -= dropped
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
        if not any(step.valid.any() for _, step, _, _ in self._steps):
            raise TraceValueError(message("There is no routing yet.", step="Run the model first."))
        valid = np.concatenate([step.valid for _, step, _, _ in self._steps])

        def rows(parts: list[np.ndarray]) -> np.ndarray:
            return np.concatenate(parts)[valid]

        with_ids = all(step.token_id is not None for _, step, _, _ in self._steps)
        notes = f"the first {self._dropped} rows were dropped to keep memory bounded" if self._dropped else None
        header = TraceHeader(
            **{
                name: getattr(self.header, name)
                for name in ("model_id", "num_experts", "top_k", "moe_blocks", "model_type", "expert_order", "source")
            },
            notes=notes,
        )
        return Trace.from_arrays(
            header,
            expert_ids=rows([ids for _, _, ids, _ in self._steps]),
            gate_weights=rows([gates for _, _, _, gates in self._steps]),
            document=rows([step.document for _, step, _, _ in self._steps]),
            position=rows([step.position for _, step, _, _ in self._steps]),
            phase=rows([np.full(len(step.document), int(step.phase), np.int8) for _, step, _, _ in self._steps]),
            token_id=rows([step.token_id for _, step, _, _ in self._steps if step.token_id is not None]) if with_ids else None,
            step=rows([np.full(len(step.document), number, np.int32) for number, step, _, _ in self._steps]),
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
