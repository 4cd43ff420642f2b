"""What our experts are held against: built by transformers' own loader from tensors that safetensors reads.

Nothing here is shared with the read path. Which tensor belongs to which expert is told by the numbers in its name, quantised
weights are made whole by code of this file alone, and merging, transposing and casting is transformers' loader at work, not its
operations called by us. So a mistake in finding, cutting or widening experts shows as a difference.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from swapless.errors import VerifyError, message

_NUMBER = re.compile(r"\d+")
_SCALE_NAMES = ("_scale_inv", ".scale", ".qscale_weight")


class Reference:
    """Experts of a checkpoint as transformers loads them.

    Parameters
    ----------
    meta : PreTrainedModel
        A skeleton of the model, the reference's own: it is changed.
    folder : Path
        The checkpoint.
    files : sequence of Path
        Its shards.
    dtype : torch.dtype
        The type that the model computes in.
    """

    def __init__(self, meta: PreTrainedModel, folder: Path, files: Sequence[Path], dtype: torch.dtype) -> None:
        self._meta = meta
        self._dtype = dtype
        self._file_of = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                self._file_of.update(dict.fromkeys(opened.keys(), file))
        stated = json.loads((folder / "config.json").read_text())
        given = stated.get("quantization_config") or (stated.get("text_config") or {}).get("quantization_config") or {}
        self._method = given.get("quant_method")
        self._block = given.get("weight_block_size", [128, 128])
        self._transforms: list[Any] = get_model_conversion_mapping(meta)

    def experts(self, module: torch.nn.Module, path: str, experts: Sequence[int]) -> torch.nn.Module:
        """A copy of the experts module at ``path`` that holds ``experts`` alone and runs as transformers' eager does.

        Ids of its input count places in ``experts``.

        Raises
        ------
        VerifyError
            transformers did not load them.
        """
        holder: Any = self._meta.get_submodule(path)
        whole, everyone = dict(holder._parameters), int(holder.num_experts)
        stacked = [name for name, parameter in whole.items() if parameter is not None and parameter.shape[:1] == (everyone,)]
        for name in stacked:
            few = torch.empty((len(experts), *whole[name].shape[1:]), dtype=whole[name].dtype, device="meta")
            holder._parameters[name] = torch.nn.Parameter(few, requires_grad=False)
        holder.num_experts = len(experts)
        try:
            self._load(self._state([f"{path}.{name}" for name in stacked], experts, everyone))
            loaded = {name: holder._parameters[name] for name in stacked}
        finally:
            holder._parameters.update(whole)
            holder.num_experts = everyone
        reference: Any = copy.copy(module)
        reference._parameters = dict(module._parameters)
        for name, parameter in loaded.items():
            if parameter.is_meta:
                raise VerifyError(message("transformers does not load these experts.", where=f"{path}.{name}"))
            aligned = parameter.detach().clone(memory_format=torch.contiguous_format)
            reference._parameters[name] = torch.nn.Parameter(aligned, requires_grad=False)
        reference.config = copy.copy(module.config)
        reference.config._experts_implementation = "eager"
        reference.num_experts = len(experts)
        return reference

    def _load(self, state: dict[str, torch.Tensor]) -> None:
        plan = self._meta._get_dtype_plan(self._dtype)
        settings = LoadStateDictConfig(dtype=self._dtype, dtype_plan=plan, weight_mapping=self._transforms)
        bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            convert_and_load_state_dict_in_model(self._meta, state, settings)
        finally:
            if bars:
                transformers_logging.enable_progress_bar()

    def _state(self, targets: Sequence[str], experts: Sequence[int], everyone: int) -> dict[str, torch.Tensor]:
        """The tensors of these experts by name, renumbered from 0, quantised ones made whole."""
        state = {}
        for keys in (keys for target in targets for keys in self._keys[target].values()):
            if len(keys) == 1 and everyone > 1:
                state[keys[0].removesuffix("_blocks")] = self._whole(keys[0], experts)
                continue
            by_number = {_expert(keys, key): key for key in keys}
            for place, expert in enumerate(experts):
                state[_renumbered(keys, by_number[expert], place)] = self._whole(by_number[expert], None)
        return state

    @cached_property
    def _keys(self) -> dict[str, dict[str | None, list[str]]]:
        """Keys of weights (not of scales) by the parameter that transformers loads them into, and by its pattern for them."""
        names = self._meta.state_dict()
        renamings = [transform for transform in self._transforms if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in self._transforms if isinstance(transform, WeightConverter)]
        found: dict[str, dict[str | None, list[str]]] = {}
        for key in self._file_of:
            if self._is_scale(key):
                continue
            stem = key.removesuffix("_blocks") if self._method == "mxfp4" else key
            target, pattern = rename_source_key(stem, renamings, converters, self._meta.base_model_prefix, names)
            if target not in names and stem in names:
                target, pattern = stem, None
            found.setdefault(target, {}).setdefault(pattern, []).append(key)
        return found

    def _is_scale(self, key: str) -> bool:
        if self._method == "mxfp4":
            return key.endswith("_scales")
        return self._method is not None and key.endswith((*_SCALE_NAMES, "activation_scale"))

    def _whole(self, key: str, experts: Sequence[int] | None) -> torch.Tensor:
        stored = self._read(key, experts)
        if self._method == "mxfp4" and key.endswith("_blocks"):
            return self._from_mxfp4(stored, self._read(f"{key.removesuffix('_blocks')}_scales", experts))
        if self._method is None:
            return stored
        stem = key.removesuffix(".weight")
        names = [f"{key}_scale_inv", *(stem + name for name in _SCALE_NAMES if name != "_scale_inv")]
        scale = next((name for name in names if name in self._file_of), None)
        return stored if scale is None else self._from_fp8(stored, self._read(scale, experts))

    def _read(self, key: str, experts: Sequence[int] | None) -> torch.Tensor:
        with safe_open(self._file_of[key], framework="pt") as file:
            if experts is None:
                return file.get_tensor(key)
            return torch.stack([file.get_slice(key)[expert] for expert in experts])

    def _from_fp8(self, stored: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """A number by its own row and column: the scale is that of row // height and column // width."""
        if stored.dtype == torch.int8:
            values, (height, width) = _fp4(stored.view(torch.uint8)), (1, 32)
        else:
            values = stored.float()
            height, width = self._block or values.shape[-2:]
        factors = torch.exp2(scales.float() - 127) if scales.dtype == torch.uint8 else scales.float()
        if factors.numel() == 1:
            return (values * factors.item()).to(self._dtype)
        of_row = torch.arange(values.shape[-2]) // height
        of_column = torch.arange(values.shape[-1]) // width
        return (values * factors[..., of_row, :][..., of_column]).to(self._dtype)

    def _from_mxfp4(self, blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """(E, columns, rows) out of blocks (E, rows, groups, 16) of two values a byte and scales (E, rows, groups)."""
        values = _fp4(blocks) * torch.exp2(scales.float() - 127)[..., None]
        return values.flatten(-2).to(self._dtype).transpose(1, 2).contiguous()


def _fp4(codes: torch.Tensor) -> torch.Tensor:
    """Values, two for each byte: a sign, two bits of exponent and one of mantissa, the low half first."""
    halves = torch.stack([codes % 16, codes // 16], -1).flatten(-2).int()
    exponent, mantissa = halves // 2 % 4, halves % 2
    size = torch.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * torch.exp2(exponent.float() - 1))
    return torch.where(halves >= 8, -size, size)


def _expert(keys: Sequence[str], key: str) -> int:
    """The number in ``key`` that differs between ``keys``, which is the expert's."""
    return int(_NUMBER.findall(key)[_place(keys)]) if len(keys) > 1 else 0


def _place(keys: Sequence[str]) -> int:
    numbers = list(zip(*(_NUMBER.findall(key) for key in keys), strict=True))
    return max(range(len(numbers)), key=lambda at: len(set(numbers[at])))


def _renumbered(keys: Sequence[str], key: str, number: int) -> str:
    if len(keys) == 1:
        return key
    span = list(_NUMBER.finditer(key))[_place(keys)]
    return f"{key[: span.start()]}{number}{key[span.end() :]}"
