"""The regressions of the linear predictor, asked and trained by loops of one order: the same bits on every machine."""

from __future__ import annotations

from typing import Any

import numpy as np

from swapless.compiled import kernel
from swapless.portable import log
from swapless.predict._network_kernels import add_product, sigmoid, sigmoid_all

_compiled: Any = kernel(error_model="numpy")

FED_BLOCKS = (0, 3, 5)
"""Of the shared features: the token's own prior, the choices of the token before, the fading sum at 0.85."""
OWN_LAYERS = 2
"""Latest known MoE layers of the current token that are read."""
_KEPT = (np.float32(0.9), np.float32(0.99))
"""What Adam keeps of the mean of gradients and of that of their squares."""


@_compiled
def _add_blocks(blocks: Any, t: int, layer: int, weight: Any, out: Any) -> None:
    """Add to ``out`` (E,) what the feature blocks (BLOCKS, T, L, E) of a row say: ``weight`` (5E, E)."""
    experts = len(out)
    for number in range(len(FED_BLOCKS)):
        add_product(blocks[FED_BLOCKS[number], t, layer], weight[number * experts : (number + 1) * experts], out)


@_compiled
def add_linear(blocks: Any, t: int, layer: int, ids: Any, known: int, weight: Any, out: Any) -> None:
    """Add to ``out`` (E,) the logits of one MoE layer of row ``t``, of which ``known`` layers of ``ids`` (L, K) are known."""
    experts = len(out)
    _add_blocks(blocks, t, layer, weight, out)
    for back in range(min(OWN_LAYERS, known)):
        for place in range(ids.shape[1]):
            chosen = ids[known - 1 - back, place]
            if chosen >= 0:
                row = weight[(len(FED_BLOCKS) + back) * experts + chosen]
                for expert in range(experts):
                    out[expert] += row[expert]


@_compiled
def linear_scores(blocks: Any, ids: Any, known: Any, weight: Any, bias: Any, out: Any) -> None:
    """Likelihoods ``out`` (T, L, E) of a document: ``blocks`` (BLOCKS, T, L, E), ``ids`` (T, L, K), ``known`` int64 (L,),
    ``weight`` (L, 5E, E), ``bias`` (L, E)."""
    for layer in range(out.shape[1]):
        for t in range(len(out)):
            row = out[t, layer]
            row[:] = bias[layer]
            add_linear(blocks, t, layer, ids[t], known[layer], weight[layer], row)
            sigmoid_all(row)


@_compiled
def train_layer(
    blocks: Any, chosen: Any, layer: int, known: int, parameters: Any, mean: Any, square: Any, rate: float, kept: Any
) -> None:
    """One step of Adam for one MoE layer: ``parameters`` (5E + 1, E), the bias last, and their moments alike, in place.

    ``chosen`` uint8 (N, L, E); ``kept`` float32 (2,) the powers of Adam's constants up to this step.
    """
    rows, experts = len(chosen), parameters.shape[1]
    last, first = len(parameters) - 1, len(FED_BLOCKS) * experts
    gradient, error = np.zeros(parameters.shape, np.float32), np.empty(experts, np.float32)
    for t in range(rows):
        error[:] = parameters[last]
        _add_blocks(blocks, t, layer, parameters, error)
        for back in range(min(OWN_LAYERS, known)):
            for other in range(experts):
                if chosen[t, known - 1 - back, other]:
                    row = parameters[first + back * experts + other]
                    for expert in range(experts):
                        error[expert] += row[expert]
        for expert in range(experts):
            error[expert] = (sigmoid(error[expert]) - np.float32(chosen[t, layer, expert])) / np.float32(rows)
        for number in range(len(FED_BLOCKS)):
            fed = blocks[FED_BLOCKS[number], t, layer]
            for place in range(experts):
                if fed[place] != 0:
                    row = gradient[number * experts + place]
                    for expert in range(experts):
                        row[expert] += fed[place] * error[expert]
        for back in range(min(OWN_LAYERS, known)):
            for other in range(experts):
                if chosen[t, known - 1 - back, other]:
                    row = gradient[first + back * experts + other]
                    for expert in range(experts):
                        row[expert] += error[expert]
        row = gradient[last]
        for expert in range(experts):
            row[expert] += error[expert]
    one, tiny = np.float32(1), np.float32(1e-8)
    scale, root = np.float32(rate) / (one - kept[0]), np.sqrt(one - kept[1])
    for place in range(len(parameters)):
        for expert in range(experts):
            value = gradient[place, expert]
            mean[place, expert] = _KEPT[0] * mean[place, expert] + (one - _KEPT[0]) * value
            square[place, expert] = _KEPT[1] * square[place, expert] + (one - _KEPT[1]) * value * value
            denominator = np.sqrt(square[place, expert]) / root + tiny
            parameters[place, expert] -= scale * mean[place, expert] / denominator


@_compiled
def logits_of(share: Any, out: Any) -> None:
    """``log(p / (1 - p))`` of ``share`` (L, E), held within [1e-4, 1 - 1e-4]."""
    for layer in range(share.shape[0]):
        for expert in range(share.shape[1]):
            p = min(max(np.float64(share[layer, expert]), 1e-4), 1 - 1e-4)
            out[layer, expert] = np.float32(log(p / (1 - p)))
