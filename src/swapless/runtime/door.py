"""The door into transformers: every use of its private interface is in this file, and the project has no second one.

transformers builds every Mixture-of-Experts family around experts modules marked by one decorator, which looks their forward
function up in a registry. We register ours, and load models through a subclass whose experts hold no parameters, so that
``from_pretrained`` does all else by itself and never reads an expert. Which bytes of the checkpoint make up an expert is asked
of transformers' declarative conversion table, in its own words, so that no family is named here.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch
import transformers
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from swapless.errors import CheckpointCorruptError, UnsupportedFamilyError, message
from swapless.runtime.families import unsupported_family
from swapless.store.checkpoint import SLOT_ALIGNMENT, Extent, ParameterSource
from swapless.store.headers import TensorRef
from swapless.store.tensors import TensorReader

IMPLEMENTATION = "swapless"
"""Our name in transformers' registry of experts functions."""

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ALL_DTYPES = _DTYPES | {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}
_SLICEABLE = (MergeModulelist, Concatenate, Transpose, Interleave)
_TOP_K_NAMES = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_token", "moe_top_k")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertParameter:
    """One parameter of one expert: its shape without the leading expert axis, and its place in the slot."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    slot_offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the parameter."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeLayer:
    """One experts module: its path in the model, its ``block`` index, and what one of its experts is made of."""

    path: str
    block: int
    num_experts: int
    parameters: tuple[ExpertParameter, ...]
    origins: Mapping[str, _Origin]

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's parameters, without padding."""
        return sum(parameter.nbytes for parameter in self.parameters)

    @property
    def slot_bytes(self) -> int:
        """Bytes one expert takes in a slot, every parameter aligned."""
        last = self.parameters[-1]
        return _aligned(last.slot_offset + last.nbytes)

    def sources(self, expert: int) -> list[ParameterSource]:
        """Where the parameters of one expert come from."""
        return [self.origins[parameter.name].source(parameter, expert) for parameter in self.parameters]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A checkpoint as the model sees it: its MoE layers, and the keys and bytes that are not experts."""

    moe_layers: tuple[MoeLayer, ...]
    top_k: int | None
    dtype: torch.dtype
    expert_keys: frozenset[str]
    non_expert_bytes: int
    per_expert: bool


@dataclass(frozen=True, slots=True)
class _Origin:
    """How transformers makes one stacked expert parameter of one MoE layer out of checkpoint tensors."""

    full_name: str
    skeleton: PreTrainedModel
    converter: WeightConverter | None
    refs: dict[str | None, list[TensorRef]] = field(default_factory=dict)

    def merges(self) -> bool:
        """Whether the checkpoint holds a tensor an expert (and not one for all)."""
        return self.converter is not None and any(isinstance(op, MergeModulelist) for op in self.converter.operations)

    def source(self, parameter: ExpertParameter, expert: int) -> ParameterSource:
        merges = self.merges()
        patterns = list(self.refs) if self.converter is None else [p for p in self.converter.source_patterns if p in self.refs]
        extents: list[Extent] = []
        shapes: list[tuple[int, ...]] = []
        types: list[torch.dtype] = []
        for pattern in patterns:
            refs = self.refs[pattern]
            ref = refs[expert] if merges else refs[0]
            nbytes = ref.nbytes if merges else ref.nbytes // ref.shape[0]
            extents.append(Extent(ref.file, ref.offset + (0 if merges else expert * nbytes), nbytes))
            shapes.append(ref.shape if merges else ref.shape[1:])
            types.append(_DTYPES[ref.dtype])
        convert = None
        if not self._plain() or any(dtype != parameter.dtype for dtype in types):
            convert = self._conversion(parameter, patterns, shapes, types, merges)
        return ParameterSource(tuple(extents), parameter.slot_offset, parameter.nbytes, convert)

    def reference(self, experts: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The stacked parameter of ``experts``, read by safetensors and built by transformers alone."""
        merges = self.merges()
        collected: Any = {}
        for pattern, refs in self.refs.items():
            if merges:
                collected[pattern] = [_read_reference(refs[expert]) for expert in experts]
            else:
                collected[pattern] = [torch.stack([_read_reference(refs[0], expert) for expert in experts])]
        if self.converter is None:
            stacked = next(iter(collected.values()))[0]
        else:
            stacked = self._convert(self.converter, collected, len(experts))
        return stacked.to(dtype).clone(memory_format=torch.contiguous_format)

    def _convert(self, converter: WeightConverter, collected: Any, experts: int) -> torch.Tensor:
        for op in converter.operations:  # transformers' own operations, on a stack of a few experts
            collected = op.convert(
                collected,
                source_patterns=converter.source_patterns,
                target_patterns=converter.target_patterns,
                full_layer_name=self.full_name,
                model=_FewExperts(self.skeleton, experts),
                config=self.skeleton.config,
                missing_keys=None,
            )
        result = next(iter(collected.values()))
        return result[0] if isinstance(result, list) else result

    def shape(self) -> tuple[int, ...] | None:
        """Shape that transformers makes of one expert, found by its own operations on no data; None where they fail."""
        merges = self.merges()
        if self.converter is None:
            return next(iter(self.refs.values()))[0].shape[1:]
        stacks = {
            pattern: [torch.empty(refs[0].shape if merges else (1, *refs[0].shape[1:]), device="meta")]
            for pattern, refs in self.refs.items()
        }
        try:
            return tuple(self._convert(self.converter, stacks, 1).shape[1:])
        except (RuntimeError, ValueError, IndexError):
            return None

    def _plain(self) -> bool:
        # Merging experts and concatenating along the first axis of each leave every source tensor's bytes in one piece.
        if self.converter is None:
            return True
        return all(
            (isinstance(op, MergeModulelist) and op.dim == 0) or (isinstance(op, Concatenate) and op.dim == 1)
            for op in self.converter.operations
        )

    def _conversion(
        self,
        parameter: ExpertParameter,
        patterns: Sequence[str | None],
        shapes: Sequence[tuple[int, ...]],
        types: Sequence[torch.dtype],
        merges: bool,
    ) -> Callable[[list[np.ndarray], np.ndarray], None]:
        def convert(parts: list[np.ndarray], out: np.ndarray) -> None:
            tensors = [
                torch.from_numpy(part).view(dtype).view(shape) for part, dtype, shape in zip(parts, types, shapes, strict=True)
            ]
            if self.converter is None:
                result = tensors[0][None]
            else:
                stacks = {p: [t if merges else t[None]] for p, t in zip(patterns, tensors, strict=True)}
                result = self._convert(self.converter, stacks, 1)
            torch.from_numpy(out).view(parameter.dtype).view(1, *parameter.shape).copy_(result)

        return convert


class _FewExperts:
    """Answers the shape questions of conversion operations as if the model had only so many experts."""

    def __init__(self, skeleton: PreTrainedModel, experts: int) -> None:
        self._skeleton = skeleton
        self._experts = experts

    def get_parameter(self, name: str) -> torch.Tensor:
        return torch.empty((self._experts, *self._skeleton.get_parameter(name).shape[1:]), device="meta")


def _read_reference(ref: TensorRef, expert: int | None = None) -> torch.Tensor:
    with safe_open(ref.file, framework="pt") as file:
        return file.get_tensor(ref.key) if expert is None else file.get_slice(ref.key)[expert]


def reference_experts(module: torch.nn.Module, layer: MoeLayer, experts: Sequence[int], dtype: torch.dtype) -> torch.nn.Module:
    """A copy of an experts module that holds ``experts`` alone and runs as transformers' eager does.

    Ids of its input count places in ``experts``. Nothing of our read path is used: it is what ours is held against.
    """
    reference: Any = copy.copy(module)
    reference._parameters = dict(module._parameters)
    for name, origin in layer.origins.items():
        reference._parameters[name] = torch.nn.Parameter(origin.reference(experts, dtype), requires_grad=False)
    reference.config = copy.copy(module.config)
    reference.config._experts_implementation = "eager"
    reference.num_experts = len(experts)
    return reference


def is_experts(module: torch.nn.Module) -> bool:
    """Whether the decorator of transformers' experts registry has marked this module."""
    return all(hasattr(module, flag) for flag in ("is_transposed", "has_bias", "_apply_gate", "num_experts"))


def _expert_parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    stacked = {}
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.shape[:1] == (module.num_experts,):
            stacked[name] = parameter
    return stacked


def model_class(config: Any) -> type[PreTrainedModel]:
    """The transformers class that loads this configuration as a language model.

    Raises
    ------
    UnsupportedFamilyError
        transformers has no such class (remote code only, or no language model).
    """
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    candidates: list[Any] = list(found) if isinstance(found, (list, tuple)) else [found] if found else []
    architectures = list(getattr(config, "architectures", None) or [])
    for name in architectures:
        for candidate in candidates:
            if candidate.__name__ == name:
                return candidate
    if candidates:
        return candidates[0]
    for name in architectures:
        cls = getattr(transformers, name, None) or _beside_config(config, name)
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel):
            return cls
    raise UnsupportedFamilyError(
        message(
            f"transformers {transformers.__version__} has no language model class for {config.model_type!r}.",
            got=f"architectures {architectures}",
            step="Swapless runs models that transformers itself ships, without remote code; a newer transformers may have it.",
        )
    )


def _beside_config(config: Any, name: str) -> Any:
    from importlib import import_module

    module = type(config).__module__
    if "configuration_" not in module:
        return None
    try:
        return getattr(import_module(module.replace("configuration_", "modeling_")), name, None)
    except ModuleNotFoundError:
        return None


def skeleton(cls: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """The whole model on the meta device: shapes and names, no memory."""
    with torch.device("meta"):
        return cls(config)


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
    targets = {f"{path}.{name}": (path, name) for path, module in modules.items() for name in _expert_parameters(module)}
    names = meta.state_dict()
    transforms = get_model_conversion_mapping(meta)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    origins: dict[str, _Origin] = {}
    expert_keys = set()
    non_expert_bytes = 0
    for key in sorted(refs, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, meta.base_model_prefix, names)
        if target not in targets and key in targets:
            target, pattern = key, None  # saved in the fused layout that the model itself uses
        if target in targets:
            converter = by_pattern.get(pattern) if pattern is not None else None
            origin = origins.setdefault(target, _Origin(target, meta, converter))
            origin.refs.setdefault(pattern, []).append(refs[key])
            expert_keys.add(key)
        elif target in names:
            ref = refs[key]
            non_expert_bytes += int(np.prod(ref.shape)) * dtype.itemsize
    layers = tuple(_moe_layer(path, module, origins, dtype) for path, module in modules.items())
    return Layout(
        moe_layers=layers,
        top_k=_top_k(meta.config),
        dtype=dtype,
        expert_keys=frozenset(expert_keys),
        non_expert_bytes=non_expert_bytes,
        per_expert=any(origin.merges() for origin in origins.values()),
    )


def _moe_layer(path: str, module: Any, origins: Mapping[str, _Origin], dtype: torch.dtype) -> MoeLayer:
    parameters = []
    offset = 0
    mine = {}
    for name, stacked in _expert_parameters(module).items():
        origin = origins.get(f"{path}.{name}")
        parameter = ExpertParameter(name=name, shape=tuple(stacked.shape[1:]), dtype=dtype, slot_offset=offset)
        _check_origin(origin, f"{path}.{name}", parameter, int(module.num_experts))
        assert origin is not None
        mine[name] = origin
        parameters.append(parameter)
        offset = _aligned(offset + parameter.nbytes)
    block = re.search(r"\.(\d+)\.", f"{path}.")
    return MoeLayer(
        path=path,
        block=int(block[1]) if block else 0,
        num_experts=int(module.num_experts),
        parameters=tuple(parameters),
        origins=mine,
    )


def _check_origin(origin: _Origin | None, full_name: str, parameter: ExpertParameter, num_experts: int) -> None:
    if origin is None:
        raise CheckpointCorruptError(
            message("The checkpoint holds no weights for an expert parameter.", where=full_name, step="Download it again.")
        )
    converter = origin.converter
    for op in converter.operations if converter is not None else ():
        if not isinstance(op, _SLICEABLE):
            raise UnsupportedFamilyError(
                message(
                    "The experts of this family cannot be cut out of the checkpoint one by one.",
                    where=full_name,
                    got=f"the conversion {type(op).__name__}",
                    allowed=", ".join(kind.__name__ for kind in _SLICEABLE),
                )
            )
    merges = origin.merges()
    for pattern, refs in origin.refs.items():
        count = len(refs) if merges else refs[0].shape[0] if refs[0].shape else 0
        if count != num_experts or (not merges and len(refs) != 1):
            raise CheckpointCorruptError(
                message(
                    "The checkpoint does not hold every expert exactly once.",
                    where=f"{full_name} from {pattern or 'one fused tensor'}",
                    got=f"{count} experts",
                    allowed=f"{num_experts} experts",
                )
            )
        for ref in refs:
            if ref.dtype not in _DTYPES:
                raise CheckpointCorruptError(
                    message(
                        "Expert weights of a type that cannot be computed with.",
                        where=full_name,
                        got=ref.dtype,
                        allowed=", ".join(_DTYPES),
                    )
                )
        odd = next((ref for ref in refs if ref.shape != refs[0].shape), None)
        if odd is not None:
            raise CheckpointCorruptError(
                message(
                    "Experts of one kind have different shapes.",
                    where=f"{odd.key} in {odd.file}",
                    got=list(odd.shape),
                    allowed=f"{list(refs[0].shape)}, as {refs[0].key}",
                )
            )
    shape = origin.shape()
    if shape != parameter.shape:
        raise CheckpointCorruptError(
            message(
                "An expert's weights have the wrong shape for this model.",
                where=full_name,
                got=" and ".join(str(list(refs[0].shape)) for refs in origin.refs.values()) + " in the checkpoint",
                allowed=f"what makes {list(parameter.shape)}",
            )
        )


def _top_k(config: Any) -> int | None:
    text = config.get_text_config()
    for name in _TOP_K_NAMES:
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _aligned(offset: int) -> int:
    return -(-offset // SLOT_ALIGNMENT) * SLOT_ALIGNMENT


@final
class _LazyTensor:
    """What transformers takes for an open safetensors slice: read when it is indexed with ``[...]``."""

    def __init__(self, ref: TensorRef, reader: TensorReader) -> None:
        self._ref = ref
        self._reader = reader

    def __getitem__(self, index: Any) -> torch.Tensor:
        flat = torch.from_numpy(self._reader.read(self._ref)).view(_ALL_DTYPES[self._ref.dtype])
        return flat.view(self._ref.shape)[index]


def load_non_experts(
    cls: type[PreTrainedModel],
    config: Any,
    layout: Layout,
    refs: Mapping[str, TensorRef],
    reader: TensorReader,
    attn_implementation: str | None,
) -> tuple[PreTrainedModel, list[str]]:
    """Build ``cls`` (whose experts are stripped) with all its other weights, read by us and placed by transformers.

    Returns the model and the names of weights that the checkpoint lacks or has in a wrong shape.
    """
    lazy = {key: _LazyTensor(ref, reader) for key, ref in refs.items() if key not in layout.expert_keys}
    loaded: Any = cls.from_pretrained(
        None,
        config=config,
        state_dict=lazy,
        dtype=layout.dtype,
        experts_implementation=IMPLEMENTATION,
        attn_implementation=attn_implementation,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # else an error that names no weight; the caller refuses them by name
    )
    model, info = loaded  # a pair, since the loading info was asked for
    return model, [*sorted(info["missing_keys"]), *sorted(map(str, info.get("mismatched_keys", ())))]


def strip_experts(model: PreTrainedModel) -> None:
    """Take the expert parameters out of a model that is being built, so that nobody allocates or loads them."""
    for module in model.modules():
        if is_experts(module):
            for name in list(_expert_parameters(module)):
                module._parameters[name] = None
            module._is_hf_initialized = True  # type: ignore[assignment]  # else weight initialisation would touch the parameters that are gone


def experts_of(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Module]]:
    """The experts modules of a loaded model in forward order, with their paths."""
    return ((path, module) for path, module in model.named_modules() if is_experts(module))


def _experts_forward(
    self: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    engine = getattr(self, "swapless_engine", None)
    if engine is None:
        raise UnsupportedFamilyError(
            message(
                "An experts module was asked to run by swapless but belongs to no loaded model.",
                step="Load the model with swapless.load, not with experts_implementation='swapless'.",
            )
        )
    return engine.forward(self, hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)
