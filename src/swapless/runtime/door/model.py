"""Model classes at the door: build one without its experts, load the rest of it, and answer when its experts are called."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from typing import Any, final

import torch
import transformers
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from swapless.errors import UnsupportedFamilyError, message
from swapless.runtime.door.layout import Layout
from swapless.runtime.door.match import expert_parameters, is_experts
from swapless.runtime.door.origin import ALL_DTYPES
from swapless.store.headers import TensorRef
from swapless.store.tensors import TensorReader

IMPLEMENTATION = "swapless"
"""Our name in transformers' registry of experts functions."""


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


def skeleton(cls: type[PreTrainedModel], config: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The whole model on the meta device, as if it were to be loaded in ``dtype``: shapes and names, no memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return cls(config)
    finally:
        torch.set_default_dtype(before)


def float32_tensors(model: PreTrainedModel, dtype: torch.dtype) -> set[str]:
    """Parameters and buffers of ``model`` that transformers keeps in float32 where the model is loaded in ``dtype``."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return set()
    asked, _, _ = build_glob_alternation(list(plan))
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    return {name for name, tensor in tensors if tensor.is_floating_point() and asked.search(name)}


@final
class _LazyTensor:
    """What transformers takes for an open safetensors slice: read when it is indexed with ``[...]``."""

    def __init__(self, ref: TensorRef, reader: TensorReader) -> None:
        self._ref = ref
        self._reader = reader

    def get_dtype(self) -> str:
        return self._ref.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        flat = torch.from_numpy(self._reader.read(self._ref)).view(ALL_DTYPES[self._ref.dtype])
        return flat.view(self._ref.shape)[index]


def load_non_experts(
    cls: type[PreTrainedModel],
    config: Any,
    layout: Layout,
    refs: Mapping[str, TensorRef],
    reader: TensorReader,
    attn_implementation: str | None,
    apart: Collection[str] = (),
) -> tuple[PreTrainedModel, list[str]]:
    """Build ``cls`` (whose experts are stripped) with all its other weights, read by us and placed by transformers.

    Tensors of the keys ``apart`` are left to the caller.

    Returns the model and the names of weights that the checkpoint lacks or has in a wrong shape.
    """
    lazy = {key: _LazyTensor(ref, reader) for key, ref in refs.items() if key not in layout.expert_keys and key not in apart}
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
            for name in list(expert_parameters(module)):
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
