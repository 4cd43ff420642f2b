"""From checkpoint tensors to one expert, by transformers' declarative conversions applied to a stack of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from swapless.runtime.door.dequantize import DEQUANTIZE
from swapless.runtime.door.layout import ExpertParameter
from swapless.store.checkpoint import Extent, ParameterSource
from swapless.store.headers import TensorRef

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types that experts may be stored in."""

ALL_DTYPES = DTYPES | {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
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
"""Types that any tensor may be stored in, blocks and scales of quantised experts among them."""


@dataclass(frozen=True, slots=True)
class CheckpointOrigin:
    """How transformers makes one stacked expert parameter of one MoE layer out of checkpoint tensors."""

    full_name: str
    skeleton: PreTrainedModel
    converter: WeightConverter | None
    refs: dict[str | None, list[TensorRef]] = field(default_factory=dict)

    def merges(self) -> bool:
        """Whether the checkpoint holds a tensor an expert (and not one for all)."""
        return self.converter is not None and any(isinstance(op, MergeModulelist) for op in self.converter.operations)

    def dequantizes(self) -> bool:
        """Whether the checkpoint holds blocks and scales in place of weights."""
        return self.converter is not None and any(isinstance(op, DEQUANTIZE) for op in self.converter.operations)

    def without_scales(self) -> TensorRef | None:
        """A tensor of quantised weights whose scales the checkpoint does not hold, if there is one."""
        scales = {str(pattern) for pattern in self.refs if "scale" in str(pattern)}
        for pattern, refs in self.refs.items():
            stem = str(pattern).removesuffix("_blocks")
            if str(pattern) not in scales and refs[0].dtype not in DTYPES and not any(name.startswith(stem) for name in scales):
                return refs[0]
        return None

    def source(self, parameter: ExpertParameter, expert: int) -> ParameterSource:
        """Where the bytes of one expert are, and how they become the parameter."""
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
            types.append(ALL_DTYPES[ref.dtype])
        convert = None
        if not self._plain() or any(dtype != parameter.dtype for dtype in types):
            convert = self._conversion(parameter, patterns, shapes, types, merges)
        return ParameterSource(tuple(extents), parameter.slot_offset, parameter.nbytes, convert)

    @torch.no_grad()
    def _convert(self, converter: WeightConverter, collected: Any, experts: int, dtype: torch.dtype) -> torch.Tensor:
        for op in converter.operations:  # transformers' own operations, on a stack of a few experts
            collected = op.convert(
                collected,
                source_patterns=converter.source_patterns,
                target_patterns=converter.target_patterns,
                full_layer_name=self.full_name,
                model=_FewExperts(self.skeleton, experts, dtype),
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
            pattern: [
                torch.empty(
                    refs[0].shape if merges else (1, *refs[0].shape[1:]), dtype=ALL_DTYPES[refs[0].dtype], device="meta"
                )
            ]
            for pattern, refs in self.refs.items()
        }
        try:
            return tuple(self._convert(self.converter, stacks, 1, torch.bfloat16).shape[1:])
        except Exception:  # an operation that meets shapes it was not made for may end in anything
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
                result = self._convert(self.converter, stacks, 1, parameter.dtype)
            torch.from_numpy(out).view(parameter.dtype).view(1, *parameter.shape).copy_(result)

        return convert


class _FewExperts:
    """Answers what conversion operations ask of the model, as if it had only so many experts, of ``dtype``."""

    def __init__(self, skeleton: PreTrainedModel, experts: int, dtype: torch.dtype) -> None:
        self._skeleton = skeleton
        self._experts = experts
        self._dtype = dtype

    def get_parameter(self, name: str) -> torch.Tensor:
        shape = (self._experts, *self._skeleton.get_parameter(name).shape[1:])
        return torch.empty(shape, dtype=self._dtype, device="meta")

    def get_submodule(self, path: str) -> Any:
        return _FewExpertsModule(self, path)


class _FewExpertsModule:
    """An experts module whose attributes are its parameters."""

    def __init__(self, model: _FewExperts, path: str) -> None:
        self._model = model
        self._path = path

    def __getattr__(self, name: str) -> torch.Tensor:
        return self._model.get_parameter(f"{self._path}.{name}")
