"""What a trace's header says of the model whose routing it holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from swapless.trace import TraceHeader

if TYPE_CHECKING:
    from swapless.runtime.open import OpenCheckpoint
    from swapless.runtime.store import Store

_SHARED_EXPERTS = ("n_shared_experts", "num_shared_experts")


def trace_header(opened: OpenCheckpoint, store: Store, model_id: str, top_k: int) -> TraceHeader:
    """Header of a trace of ``opened``, with the bytes that one expert has in ``store``, as they are read."""
    layers = opened.layout.moe_layers
    text = opened.config.get_text_config()
    hidden_size = _count(text, "hidden_size")
    return TraceHeader(
        model_id=model_id,
        num_experts=max(layer.num_experts for layer in layers),
        top_k=top_k,
        moe_blocks=tuple(layer.block for layer in layers),
        model_type=opened.config.model_type,
        num_shared_experts=next((found for name in _SHARED_EXPERTS if (found := _count(text, name)) is not None), None),
        hidden_size=hidden_size,
        moe_intermediate_size=_inner_size(_matrices(opened), hidden_size),
        expert_bytes=max(sum(extent.nbytes for extent in store.extents(number, 0)) for number in range(len(layers))),
        expert_order="as the router returned them",
        source="recorded by swapless while the model ran",
    )


def _matrices(opened: OpenCheckpoint) -> Iterable[tuple[str, Sequence[int]]]:
    """Names and shapes of what an expert is made of."""
    if opened.manifest is not None:
        return ((piece.name, piece.shape) for piece in opened.manifest.moe_layers[0].pieces)
    return ((parameter.name, parameter.shape) for parameter in opened.layout.moe_layers[0].parameters)


def _inner_size(matrices: Iterable[tuple[str, Sequence[int]]], hidden_size: int | None) -> int | None:
    """F, by the matrix that leads back to the model's width; None where an expert is made in another way.

    Examples
    --------
    >>> _inner_size([("gate_up_proj", (48, 64)), ("down_proj", (64, 24)), ("down_proj_bias", (64,))], 64)
    24
    """
    for name, shape in matrices:
        if hidden_size and "down" in name and len(shape) == 2 and hidden_size in shape:
            return math.prod(shape) // hidden_size
    return None


def _count(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
