"""Hold our experts against transformers' eager ones, layer by layer, every expert, inside the budget.

The reference reads the checkpoint by safetensors, makes weights in FP8 and MXFP4 whole by code of its own, is loaded by
transformers' own loader and computes with transformers' eager experts; ours goes through direct reads, slots and the block
loop. Both get the same inputs, as prefill and as decode, at one thread, and must agree in every bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from swapless.cache import DEFAULT_POLICY
from swapless.errors import BudgetError, message
from swapless.notation import Phase
from swapless.runtime.door import MoeLayer, Reference, experts_of, skeleton
from swapless.runtime.model import load
from swapless.runtime.open import open_checkpoint
from swapless.runtime.routing import Step
from swapless.runtime.source import checkpoint_folder
from swapless.units import format_size, parse_size

_TOKENS = 8
_MOST_AT_ONCE = 8
"""Experts of the reference held at once, where the budget allows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerResult:
    """One MoE layer held against the reference: whether all outputs agree in every bit, and the largest difference."""

    moe_layer: int
    block: int
    experts_compared: int
    identical: bool
    max_abs_difference: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@torch.no_grad()
def verify(
    checkpoint: str | Path,
    memory: str | int | None = None,
    *,
    policy: str = DEFAULT_POLICY,
    seed: int = 0,
    progress: Callable[[str, float], None] | None = None,
) -> Iterator[LayerResult]:
    """Yield a result a MoE layer of ``checkpoint``, a local folder or hub id.

    Parameters
    ----------
    memory : str or int, optional
        Budget of the whole process, the reference's experts included; all that is available by default.
    seed : int
        Of the random inputs.
    progress : callable of (str, float), optional
        Told what is going on and the share done.

    Raises
    ------
    BudgetError
        The budget holds no model beside one reference expert.
    CheckpointError, UnsupportedFamilyError
        As :func:`swapless.load`.
    """
    folder = checkpoint_folder(checkpoint)
    opened = open_checkpoint(folder)
    layers = opened.layout.moe_layers
    expert_bytes = max(layer.expert_bytes for layer in layers)
    at_once, budget = _MOST_AT_ONCE, None if memory is None or memory == "auto" else parse_size(memory)
    model: Any = None
    while model is None:
        # Twice: while an expert of the reference is built, its parts exist beside the whole.
        reserve = 2 * at_once * expert_bytes
        try:
            if budget is not None and budget <= reserve:
                raise BudgetError(message("The budget does not hold the reference.", got=format_size(budget)))
            model = load(
                folder, None if budget is None else budget - reserve, policy=policy, context=_TOKENS * 2, progress=progress
            )
        except BudgetError:
            if at_once == 1:
                raise
            at_once //= 2
    with model:
        reference = Reference(skeleton(opened.cls, opened.config, model.dtype), folder, opened.files, model.dtype)
        top_k = opened.experts_a_token // len(layers)
        for moe_layer, (_, module) in enumerate(experts_of(model)):
            if progress is not None:
                progress(f"MoE layer {moe_layer + 1} of {len(layers)}", moe_layer / len(layers))
            with _one_thread():  # and not over the yield: it is a switch of the whole process
                result = _compare(model, module, reference, layers[moe_layer], moe_layer, at_once, top_k, seed)
            yield result


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


def _compare(
    model: Any, module: Any, reference: Reference, layer: MoeLayer, moe_layer: int, at_once: int, top_k: int, seed: int
) -> LayerResult:
    generator = torch.Generator().manual_seed(seed + moe_layer)
    width = _input_width(model, module, layer)
    largest, identical = 0.0, True
    for first in range(0, layer.num_experts, at_once):
        experts = range(first, min(first + at_once, layer.num_experts))
        expected_of = reference.experts(module, layer.path, experts)
        hidden_TD = torch.randn(_TOKENS, width, generator=generator).to(model.dtype)
        places_TK = _routing(len(experts), min(top_k, len(experts)), generator)
        weights_TK = torch.rand(places_TK.shape, generator=generator).to(model.dtype)
        expected = expected_of(hidden_TD, places_TK, weights_TK)
        for phase in (Phase.PREFILL, Phase.DECODE):
            model.swapless.begin_step(_step(phase))
            got = module(hidden_TD, places_TK + first, weights_TK)
            model.swapless.abandon_step()
            difference = (got.float() - expected.float()).abs().max().item()
            largest = max(largest, difference)
            identical &= torch.equal(got, expected)
    return LayerResult(
        moe_layer=moe_layer,
        block=layer.block,
        experts_compared=layer.num_experts,
        identical=identical,
        max_abs_difference=largest,
    )


def _input_width(model: Any, module: Any, layer: MoeLayer) -> int:
    """Values a token that go into an expert: some families hand theirs less than the hidden state."""
    for parameter in layer.parameters:
        if parameter.name in ("gate_up_proj", "up_proj") and len(parameter.shape) == 2:
            return parameter.shape[0 if module.is_transposed else 1]
    return int(model.config.get_text_config().hidden_size)


def _routing(experts: int, top_k: int, generator: torch.Generator) -> torch.Tensor:
    # Every expert at least once, then at random, never one twice for a token.
    rows = [torch.randperm(experts, generator=generator)[:top_k] for _ in range(_TOKENS)]
    for expert in range(experts):
        row = rows[expert % _TOKENS]
        if expert not in row:
            row[expert // _TOKENS % top_k] = expert
    return torch.stack(rows)


def _step(phase: Phase) -> Step:
    rows = np.arange(_TOKENS, dtype=np.int32)
    return Step(phase, np.zeros(_TOKENS, np.int32), rows, np.ones(_TOKENS, bool), None)


def all_identical(results: Sequence[LayerResult]) -> bool:
    """Whether every layer agrees in every bit."""
    return all(result.identical for result in results)
