"""What a budget is divided into, told from an opened checkpoint: for ``load``, and for a plan that loads nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np

from swapless.cache.policy import Policy, state_bytes
from swapless.errors import UsageError, message
from swapless.runtime.compute import Experts, PlainExperts
from swapless.runtime.door import MoeLayer
from swapless.runtime.forecast import Forecast
from swapless.runtime.open import OpenCheckpoint
from swapless.runtime.pool import SlotPool, slot_bytes
from swapless.runtime.row_store import MEMORY_BYTES
from swapless.runtime.store import Store
from swapless.store.checkpoint import CheckpointStore, Extent
from swapless.store.packed import Check, PackedStore
from swapless.store.read import FileReader

DEFAULT_CONTEXT_TOKENS = 4096


AUTO_PREFETCH = "auto"
"""Reads ahead by the next MoE layer's router where that is worth the slots it takes."""


class BudgetShape(TypedDict):
    """What of :func:`~swapless.runtime.budget.plan_budget`'s arguments the checkpoint and the look-ahead decide."""

    slot_bytes: int
    expert_bytes: int
    num_experts_total: int
    experts_a_token: int
    context_tokens: int
    ahead_slots: int
    ahead_if_worth: bool


def budget_shape(
    opened: OpenCheckpoint, context_tokens: int, leads: Sequence[int], *, ahead_if_worth: bool = False
) -> BudgetShape:
    """The arguments for a checkpoint that may be read so many MoE layers ahead, each once."""
    layers = opened.layout.moe_layers
    return {
        "slot_bytes": slot_bytes(layers),
        "expert_bytes": max(layer.expert_bytes for layer in layers),
        "num_experts_total": sum(layer.num_experts for layer in layers),
        "experts_a_token": opened.experts_a_token,
        "context_tokens": context_tokens,
        "ahead_slots": len(leads) * opened.experts_a_token // len(layers),
        "ahead_if_worth": ahead_if_worth,
    }


_ROUTING_BYTES = MEMORY_BYTES + (2 << 20)
"""Rows of the recording in memory, and which texts they belong to."""


def parts_to_come(
    opened: OpenCheckpoint, policy: Policy, found: Forecast, context_tokens: int, io_bytes: int
) -> dict[str, int]:
    """Bytes of what is not there yet when the other weights are loaded: all but slots, by name."""
    layers = opened.layout.moe_layers
    parts = {
        "kv_cache": found.needs.cache.of(context_tokens),
        "activations": found.needs.step_bytes,
        "products": found.code_bytes,
        "io_buffers": io_bytes,
        "policy": state_bytes(policy, len(layers), max(layer.num_experts for layer in layers)),
        "routing": _ROUTING_BYTES,
    }
    scratch = computation(opened).scratch_bytes
    return parts | ({"scratch": scratch} if scratch else {})


def gate_leads(prefetch: str | None) -> list[int]:
    """How many MoE layers ahead to ask, each once: ``"gate:2"`` gives [1, 2], None nothing.

    Raises
    ------
    UsageError
        Another word.
    """
    if prefetch is None:
        return []
    kind, _, farthest = prefetch.partition(":")
    if kind != "gate" or (farthest and not farthest.isdecimal()) or farthest == "0":
        raise UsageError(message("Unknown prefetch.", got=prefetch, allowed='"gate", or "gate:N" for N MoE layers ahead'))
    return list(range(1, int(farthest or 1) + 1))


def context_of(context: int | None, config: Any) -> int:
    """The context to set memory aside for: as asked, else 4096 tokens, or the model's own limit if that is less.

    Raises
    ------
    UsageError
        More than the model can do.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    limit = limit if isinstance(limit, int) and limit > 0 else None
    if context is None:
        return min(DEFAULT_CONTEXT_TOKENS, limit or DEFAULT_CONTEXT_TOKENS)
    if context < 1 or (limit is not None and context > limit):
        raise UsageError(
            message("The context does not fit the model.", got=f"{context} tokens", allowed=f"1 to {limit or 'any number of'}")
        )
    return context


class Computation(NamedTuple):
    """How experts are computed once there are slots, and what that holds beside them, in bytes."""

    of: Callable[[SlotPool], Experts]
    scratch_bytes: int


def computation(opened: OpenCheckpoint) -> Computation:
    """How the experts of ``opened`` are computed."""
    manifest = opened.manifest
    if manifest is None or not opened.rounded:
        return Computation(PlainExperts, 0)
    from swapless.runtime.linear import SCRATCH_BYTES  # kernels are compiled when they are imported
    from swapless.runtime.quantized import QuantizedExperts, scratch_bytes

    linear = SCRATCH_BYTES if manifest.dense else 0
    if manifest.bits == 16:
        return Computation(PlainExperts, linear)
    return Computation(lambda pool: QuantizedExperts(pool, manifest), max(linear, scratch_bytes(manifest)))


def _all_experts(layers: Sequence[MoeLayer]) -> list[tuple[int, int]]:
    return [(moe_layer, expert) for moe_layer, layer in enumerate(layers) for expert in range(layer.num_experts)]


def open_store(opened: OpenCheckpoint, check: Check) -> Store:
    """The experts of ``opened``, ready to be read; ``check`` says when blocks of a packed store are held against checksums."""
    if opened.manifest is not None:
        return PackedStore(opened.folder, opened.manifest.moe_layers, check=check)
    layers = opened.layout.moe_layers
    everyone = _all_experts(layers)
    files = {extent.file for i, e in everyone for source in layers[i].sources(e) for extent in source.extents}
    return CheckpointStore(lambda moe_layer, expert: layers[moe_layer].sources(expert), FileReader(sorted(files)), everyone)


def sample_extents(store: Store, layers: Sequence[MoeLayer], most: int = 256) -> list[Extent]:
    """The reads of some experts, for the probe."""
    everyone = _all_experts(layers)
    chosen = np.random.default_rng(0).permutation(len(everyone))[:most]
    return [extent for index in chosen for extent in store.extents(*everyone[index])]
