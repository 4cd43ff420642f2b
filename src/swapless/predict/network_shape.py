"""Sizes of the learned predictor's network, and its weights as compiled loops take them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from swapless.predict._network_kernels import add_product, half_bits
from swapless.predict.features import BLOCKS, SCALARS

ATTENTION = ("qkv.weight", "out.weight", "up.weight", "up.bias", "down.weight", "down.bias", "distance")
BASE = ("base_bias", "base", "base_hidden", "base_in", "base_context", "base_out")
STEP = ("step_state", "step_bias", "step_choice", "step_direct", "step_out")
_STACKS = ("base", "base_in", "base_context", "base_out", "step_state", "step_out", "read")
"""Matrices (L, inputs, outputs)."""
_LINEAR = ("prior", "before", "faded", "scalars")


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkShape:
    """Sizes of the network; all go into its file."""

    num_moe_layers: int
    num_experts: int
    top_k: int
    words: int
    buckets: int = 4096
    width: int = 256
    heads: int = 4
    attention_layers: int = 2
    window: int = 64
    hidden: int = 128
    step_hidden: int = 192
    near: int = 3

    def settings(self) -> dict[str, Any]:
        """The sizes by name."""
        return asdict(self)


class Weights:
    """The network's weights, each matrix input by input.

    Parameters
    ----------
    shape : NetworkShape
        Sizes.
    arrays : mapping of str to ndarray
        By the names that the network has for them.
    narrow : bool
        Keep large matrices in half precision and widen them as they are read: for one token at a time, where reading them
        from memory is what takes the time. The values are the same.
    """

    def __init__(self, shape: NetworkShape, arrays: Mapping[str, np.ndarray], *, narrow: bool) -> None:
        self.shape = shape

        def single(name: str) -> np.ndarray:
            return np.ascontiguousarray(arrays[name], np.float32)

        def matrix(value: np.ndarray) -> np.ndarray:
            return half_bits(value) if narrow else np.ascontiguousarray(value, np.float32)

        self.bias = single("scalars.bias")
        self.word, self.letters = single("word"), single("letters")
        self.linear = {name: matrix(arrays[f"{name}.weight"].T) for name in _LINEAR}
        self.attention = [
            tuple(
                matrix(arrays[name].T) if name.endswith(".weight") else single(name)
                for name in (f"attention.{number}.{part}" for part in ATTENTION)
            )
            for number in range(shape.attention_layers)
        ]
        kept: dict[str, Any] = {
            name: matrix(arrays[name]) if name in _STACKS else single(name) for name in (*BASE, *STEP, "gain", "read", "near")
        }
        kept["step_bias"] = np.ascontiguousarray(kept["step_bias"][:, 0])
        self.base, self.step = tuple(kept[name] for name in BASE), tuple(kept[name] for name in STEP)
        self.read = (kept["gain"], shifts(single("shift"), single("read")), kept["read"], kept["near"])


def sizes_of(shape: NetworkShape) -> dict[str, tuple[int, ...]]:
    """Lengths of the axes of each of the network's arrays."""
    layers, experts, width, step = shape.num_moe_layers, shape.num_experts, shape.width, shape.step_hidden
    fed, flat, hidden, near = BLOCKS * experts, layers * experts, shape.hidden, shape.near
    found: dict[str, tuple[int, ...]] = {
        "word": (shape.words, width),
        "letters": (shape.buckets + 1, width),
        **{f"{name}.weight": (width, flat) for name in ("prior", "before", "faded")},
        "scalars.weight": (width, SCALARS),
        "scalars.bias": (width,),
        "base_bias": (layers, experts),
        "base": (layers, fed, experts),
        "base_in": (layers, fed, hidden),
        "base_context": (layers, width, hidden),
        "base_hidden": (layers, 1, hidden),
        "base_out": (layers, hidden, experts),
        "step_state": (layers, width, step),
        "step_choice": (layers, experts, step),
        "step_bias": (layers, 1, step),
        "step_out": (layers, step, width),
        "step_direct": (layers, experts, width),
        "gain": (layers, width),
        "shift": (layers, width),
        "read": (layers, width, experts),
        "near": (near, layers, near * experts, experts),
    }
    of_attention = ((3 * width, width), (width, width), (2 * width, width), (2 * width,), (width, 2 * width), (width,))
    for number in range(shape.attention_layers):
        for name, sizes in zip(ATTENTION, (*of_attention, (shape.heads, shape.window))):
            found[f"attention.{number}.{name}"] = sizes
    return found


def shifts(shift: np.ndarray, read: np.ndarray) -> np.ndarray:
    """What each distance (G, D) adds to the logits that each layer reads (L, D, E): float32 (G, L, E)."""
    found = np.zeros((len(shift), len(read), read.shape[2]), np.float32)
    for gap, row in enumerate(shift):
        for layer, weight in enumerate(read):
            add_product(row, weight, found[gap, layer])
    return found
