"""The model class users get: transformers' own, whose experts are elsewhere and which says so when asked for the impossible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from swapless.errors import UnsupportedOperationError, message
from swapless.runtime.door import is_experts, strip_experts
from swapless.runtime.engine import Engine
from swapless.runtime.plain import check_untraced


def offloaded_class(
    cls: type[PreTrainedModel], prepare: Callable[[PreTrainedModel], None] | None = None
) -> type[PreTrainedModel]:
    """A subclass of ``cls`` whose expert parameters are gone before anything is loaded.

    ``prepare`` changes what else is to be changed in a model before it is loaded.

    Name and module stay those of ``cls``: transformers' conversion table, its check of the experts implementation and the
    generation mappings go by them.
    """

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        strip_experts(self)
        if prepare is not None:
            prepare(self)
        for module in self.modules():
            # Some families let a block initialise its experts' parameters, which are gone. A block that owns no tensor has
            # nothing else to initialise that its children, or the checkpoint, do not.
            if not (module._parameters or module._buffers) and any(is_experts(child) for child in module.children()):
                module._is_hf_initialized = True

    body = {"__init__": __init__, "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (_Offloaded, cls), body)


class _Offloaded:
    """What an offloaded model does differently from its class. Mixed in before it."""

    swapless: Engine

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As its class, unless torch looks on."""
        check_untraced()
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def __copy__(self) -> Any:
        """Another object for the same model, engine included."""
        twin = self.__class__.__new__(self.__class__)
        twin.__dict__.update(self.__dict__)
        return twin

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.swapless.close()

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Only a move to where the model is already: the CPU, in its own type."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if (device is not None and device.type != "cpu") or (dtype is not None and dtype != self.dtype):  # type: ignore[attr-defined]
            raise _impossible("to", f"to({device or dtype})", "Experts are read into CPU memory in the type given to load().")
        return self

    def train(self, mode: bool = True) -> Any:
        """Only ``train(False)``, which is ``eval()``."""
        if mode:
            raise _impossible("train", "train()", "Experts are read-only; train with transformers and load the result here.")
        return super().train(False)  # type: ignore[misc]


def _impossible(name: str, got: str, step: str) -> UnsupportedOperationError:
    return UnsupportedOperationError(message(f"An offloaded model has no {name}: its experts are on disk.", got=got, step=step))


def _refusal(name: str, step: str) -> Any:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise _impossible(name, name if " " in name or "." in name else f"{name}()", step)

    refuse.__name__ = name
    refuse.__doc__ = f"Raises UnsupportedOperationError. {step}"
    return refuse


for _name, _step in {
    "save_pretrained": "Copy the checkpoint folder instead.",
    "push_to_hub": "Push the checkpoint folder instead.",
    "cuda": "The engine computes on the CPU.",
    "half": "Give dtype='float16' to load().",
    "bfloat16": "Give dtype='bfloat16' to load().",
    "float": "Give dtype='float32' to load().",
    "double": "Give dtype='float64' to load().",
    "compile": "Leave compile out: experts are read while the model runs.",
    "gradient_checkpointing_enable": "Train with transformers and load the result here.",
    "resize_token_embeddings": "Resize with transformers, save, and load the result here.",
    "set_experts_implementation": "Experts of an offloaded model run through swapless alone.",
}.items():
    setattr(_Offloaded, _name, _refusal(_name, _step))
for _method, _name, _step in (
    ("__prepare_scriptable__", "torch.jit.script", "Leave it out: experts are read while the model runs."),
    ("__deepcopy__", "deep copy", "Load the checkpoint once more."),
    ("__reduce_ex__", "pickled form", "Load the checkpoint in the process that needs it."),
):
    setattr(_Offloaded, _method, _refusal(_name, _step))
