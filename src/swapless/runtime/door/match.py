"""Match a checkpoint's tensors with the experts of a model that exists only as shapes, and refuse what does not fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from swapless.errors import UnsupportedCheckpointError, message
from swapless.runtime.door.checks import checked_origin
from swapless.runtime.door.dequantize import DEQUANTIZE, check_scales, dequantizer
from swapless.runtime.door.layout import ExpertParameter, Layout, MoeLayer, aligned
from swapless.runtime.door.origin import ALL_DTYPES, DTYPES, CheckpointOrigin
from swapless.runtime.families import unsupported_family
from swapless.store.headers import TensorRef
from swapless.store.matrix import ROW_BLOCK

_TOP_K_NAMES = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_token", "moe_top_k")


def is_experts(module: torch.nn.Module) -> bool:
    """Whether the decorator of transformers' experts registry has marked this module."""
    return all(hasattr(module, flag) for flag in ("is_transposed", "has_bias", "_apply_gate", "num_experts"))


def expert_parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The stacked parameters of an experts module, whose first axis counts experts."""
    stacked = {}
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.shape[:1] == (module.num_experts,):
            stacked[name] = parameter
    return stacked


def checkpoint_layout(meta: PreTrainedModel, refs: Mapping[str, TensorRef], dtype: torch.dtype) -> Layout:
    """Match a checkpoint's tensors with the model's experts.

    Parameters
    ----------
    meta : PreTrainedModel
        From :func:`skeleton`.
    refs : mapping of str to TensorRef
        From :func:`~swapless.store.headers.read_headers`.
    dtype : torch.dtype
        The type that the model computes in, and its experts are kept in.

    Raises
    ------
    UnsupportedFamilyError
        No experts module at the door, or a conversion that cannot be done an expert at a time.
    CheckpointCorruptError
        Tensors of an expert are missing, too many, or of a wrong shape or type.
    """
    modules = {path: module for path, module in meta.named_modules() if is_experts(module)}
    if not modules:
        raise unsupported_family(meta.config)
    targets = {f"{path}.{name}": (path, name) for path, module in modules.items() for name in expert_parameters(module)}
    names = meta.state_dict()
    quantizer = dequantizer(meta.config)
    transforms = get_model_conversion_mapping(meta, hf_quantizer=quantizer)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    origins: dict[str, CheckpointOrigin] = {}
    stored: dict[str, dict[str | None, list[TensorRef]]] = {}
    expert_keys = set()
    linear_keys = {}
    unused = []
    routed = {int(module.num_experts) for module in modules.values()}
    non_expert_bytes = 0
    for key in sorted(refs, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, meta.base_model_prefix, names)
        if target not in targets and key in targets:
            target, pattern = key, None  # saved in the fused layout that the model itself uses
        if target in targets:
            converter = by_pattern.get(pattern) if pattern is not None else None
            origin = origins.setdefault(target, CheckpointOrigin(target, meta, converter))
            origin.refs.setdefault(pattern, []).append(refs[key])
            expert_keys.add(key)
        elif target in names:
            ref = refs[key]
            if ref.dtype not in ALL_DTYPES:
                raise _not_computable(ref)
            stored.setdefault(target, {}).setdefault(pattern, []).append(ref)
            path = target.removesuffix(".weight")
            if _kept_as_it_is(by_pattern.get(pattern or "")) and path != target and _is_linear(meta, path, ref, routed):
                linear_keys[key] = path
            non_expert_bytes += int(np.prod(ref.shape)) * dtype.itemsize
        else:
            unused.append(key)
    for weights in (*stored.values(), *(origin.refs for origin in origins.values())):
        check_scales(quantizer, weights)
    layers = tuple(_moe_layer(path, module, origins, dtype) for path, module in modules.items())
    return Layout(
        moe_layers=layers,
        top_k=top_k(meta.config),
        dtype=dtype,
        expert_keys=frozenset(expert_keys),
        linear_keys=linear_keys,
        non_expert_bytes=non_expert_bytes,
        per_expert=any(origin.merges() for origin in origins.values()),
        unused_keys=tuple(unused),
    )


def block_of(path: str) -> int:
    """Index of the block that an experts module at ``path`` belongs to."""
    block = re.search(r"\.(\d+)\.", f"{path}.")
    return int(block[1]) if block else 0


def linear_paths(meta: PreTrainedModel, refs: Mapping[str, TensorRef]) -> dict[str, str]:
    """Those of ``refs`` that are the weight of a linear layer of its own just as they are, with the layer's path."""
    names = meta.state_dict()
    transforms = get_model_conversion_mapping(meta, hf_quantizer=dequantizer(meta.config))
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    experts: list[Any] = [module for module in meta.modules() if is_experts(module)]
    routed = {int(module.num_experts) for module in experts}
    found = {}
    for key, ref in refs.items():
        target, pattern = rename_source_key(key, renamings, converters, meta.base_model_prefix, names)
        path = target.removesuffix(".weight")
        whole = target in names and path != target and _kept_as_it_is(by_pattern.get(pattern or ""))
        if whole and _is_linear(meta, path, ref, routed):
            found[key] = path
    return found


def _kept_as_it_is(converter: WeightConverter | None) -> bool:
    # What only dequantises leaves alone what has no scales beside it, and that is what the types of linear weights tell.
    return converter is None or all(isinstance(op, DEQUANTIZE) for op in converter.operations)


def _is_linear(meta: PreTrainedModel, path: str, ref: TensorRef, routed: set[int]) -> bool:
    """Whether ``ref`` is the weight of a linear layer of its own: no router, and tied to no embedding."""
    module = meta.get_submodule(path)
    if type(module) is not torch.nn.Linear or tuple(ref.shape) != tuple(module.weight.shape) or ref.dtype not in DTYPES:
        return False
    tied = getattr(meta.config.get_text_config(), "tie_word_embeddings", False) and module is meta.get_output_embeddings()
    return not tied and module.out_features not in routed and module.out_features >= ROW_BLOCK


def _moe_layer(path: str, module: Any, origins: Mapping[str, CheckpointOrigin], dtype: torch.dtype) -> MoeLayer:
    parameters = []
    offset = 0
    mine = {}
    for name, stacked in expert_parameters(module).items():
        origin = origins.get(f"{path}.{name}")
        parameter = ExpertParameter(name=name, shape=tuple(stacked.shape[1:]), dtype=dtype, slot_offset=offset)
        origin = checked_origin(origin, f"{path}.{name}", parameter, int(module.num_experts))
        mine[name] = origin
        parameters.append(parameter)
        offset = aligned(offset + parameter.nbytes)
    return MoeLayer(
        path=path,
        block=block_of(path),
        num_experts=int(module.num_experts),
        parameters=tuple(parameters),
        origins=mine,
    )


def _not_computable(ref: TensorRef) -> UnsupportedCheckpointError:
    where, allowed = f"{ref.key} in {ref.file}", ", ".join(ALL_DTYPES)
    return UnsupportedCheckpointError(
        message("A weight is of a type without arithmetic.", where=where, got=ref.dtype, allowed=allowed)
    )


def top_k(config: Any) -> int | None:
    """Experts a token by the configuration, under any of the names that families give it."""
    text = config.get_text_config()
    for name in _TOP_K_NAMES:
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
