"""Weights in FP8 (and FP4 beside them) made whole by the block size that the configuration states, tail blocks included.

transformers' own operation divides a weight by the number of its scales and takes the quotient for the block, so a weight
whose rows or columns are no multiple of the block is refused, or gets the scales of other blocks without a word. This one
differs in nothing else: a float32 product rounded once to the type of the model. It comes in as a quantiser of its own, by the
registry that transformers has for them, and changes no module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.utils.quantization_config import FineGrainedFP8Config

FP8 = "swapless_fp8"
"""The quantisation method that a configuration names, so that transformers asks for the quantiser below."""

_FP4_COLUMNS = 32
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
FLOAT8 = ("F8_E4M3", "F8_E5M2")
"""Types of which a stored weight says nothing without a scale."""
_SCALES = ("F32", "F16", "BF16", "F64", "F8_E8M0", "U8")


def grid(rows: int, columns: int, block: Sequence[int] | None) -> tuple[int, int]:
    """Scales down and across a weight of ``rows`` x ``columns``: one a block, the last of each row and column perhaps smaller.

    Examples
    --------
    >>> grid(576, 7168, (128, 128))
    (5, 56)
    """
    return (1, 1) if block is None else (-(-rows // block[0]), -(-columns // block[1]))


def wrong_scales(
    weight: tuple[str, Sequence[int]], scales: tuple[str, Sequence[int]], block: Sequence[int] | None
) -> str | None:
    """What scales of a stored type and shape should be to fit a weight's, where they do not; None where they do."""
    (dtype, shape), (scale_dtype, scale_shape) = weight, scales
    if scale_dtype not in _SCALES:
        return f"scales in {', '.join(_SCALES)}"
    if len(shape) < 2:
        return f"a weight of two axes or more, and not {list(shape)}"
    rows, columns = shape[-2:]
    if dtype == "I8":
        down, across = grid(rows, 2 * columns, (1, _FP4_COLUMNS))
    else:
        down, across = grid(rows, columns, block)
    if (down, across) == (1, 1) and all(size == 1 for size in scale_shape):
        return None
    if tuple(scale_shape) == (*shape[:-2], down, across):
        return None
    return f"{[*shape[:-2], down, across]} for a weight of {list(shape)}"


def widen(stored: torch.Tensor, scales: torch.Tensor, block: Sequence[int] | None, dtype: torch.dtype) -> torch.Tensor:
    """Weights (..., rows, columns) of ``stored`` FP8 values, or of FP4 values two a byte, times the scale of their block.

    Raises
    ------
    ValueError
        The scales are not those of such a weight.
    """
    if stored.dtype == torch.int8:
        values, block = _unpacked(stored), (1, _FP4_COLUMNS)
    else:
        values = stored.to(torch.float32, copy=True)
    factors = (scales.to(torch.float32) - 127).exp2() if scales.dtype == torch.uint8 else scales.to(torch.float32)
    rows, columns = values.shape[-2:]
    if factors.numel() == 1:
        factors = factors.reshape(1, 1)
    if factors.shape[-2:] != grid(rows, columns, block):
        raise ValueError(f"Scales {list(scales.shape)} do not fit a weight of {list(stored.shape)} in blocks of {block}.")
    down, across = (rows, columns) if block is None else block
    for first, last, high in _parts(rows, down):
        for left, right, wide in _parts(columns, across):
            part = values[..., first:last, left:right].unflatten(-1, (-1, wide)).unflatten(-3, (-1, high))
            part *= factors[..., first // down : -(-last // down), None, left // across : -(-right // across), None]
    return values.to(dtype)


def _parts(size: int, block: int) -> list[tuple[int, int, int]]:
    """First, last and length of a block: of the whole blocks, then of the one that is left over."""
    whole = size // block * block
    parts = [(0, whole, block)] if whole else []
    return [*parts, (whole, size, size - whole)] if whole < size else parts


def _unpacked(stored: torch.Tensor) -> torch.Tensor:
    codes = stored.contiguous().view(torch.uint8)
    values = torch.tensor(_FP4_VALUES, device=stored.device)
    return torch.stack([values[(codes & 15).long()], values[(codes >> 4).long()]], -1).flatten(-2)


class BlockDequantize(Fp8Dequantize):
    """transformers' operation with the configured block in place of a quotient."""

    def _dequantize_one(
        self, quantized: torch.Tensor, scales: torch.Tensor, output_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        return widen(quantized, scales, self.hf_quantizer.quantization_config.weight_block_size, output_dtype or torch.bfloat16)


@register_quantization_config(FP8)
class BlockConfig(FineGrainedFP8Config):
    """transformers' configuration of block-wise FP8, for the quantiser below."""


@register_quantizer(FP8)
class BlockQuantizer(FineGrainedFP8HfQuantizer):
    """transformers' quantiser for block-wise FP8, which only ever makes weights whole and so needs nothing beside torch."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is needed."""

    def get_load_operations(self) -> dict[str, type]:
        """The operation on a weight and its scales."""
        return {"dequantize": BlockDequantize}

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Every module stays as it is."""

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        return model
