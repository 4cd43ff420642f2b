"""Checkpoints whose weights are quantised already: made whole again, an expert at a time.

How such a checkpoint names its blocks and scales, and what they stand for, is told by transformers' quantisers through the
same conversion table as everything else. A quantiser that only dequantises changes no module and needs no accelerator.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import Mxfp4Dequantize
from transformers.quantizers.auto import AutoHfQuantizer

from swapless.errors import CheckpointCorruptError, message
from swapless.runtime.door.fp8 import FLOAT8, FP8, wrong_scales
from swapless.store.headers import TensorRef
from swapless.untrusted import shown

DEQUANTIZE = (Mxfp4Dequantize, Fp8Dequantize)
"""Operations that turn blocks and scales of an expert into its weights."""

METHODS = {"mxfp4": "mxfp4", "fp8": FP8}
"""Quantisation methods that are served, each with the name of the quantiser that makes weights of it."""


def is_served(quantization: Any) -> bool:
    """Whether a ``quantization_config`` is of a method that is undone an expert at a time."""
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return isinstance(method, str) and method in METHODS


def check_block_size(quantization: Mapping[str, Any], where: object) -> None:
    """Refuse a block size in a ``quantization_config`` that cannot be.

    Raises
    ------
    CheckpointCorruptError
        It is not two whole numbers from 1.
    """
    block = quantization.get("weight_block_size")
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    ):
        raise CheckpointCorruptError(
            message(
                "The block size of the quantised weights cannot be.",
                where=f"quantization_config.weight_block_size in {where}",
                got=shown(block),
                allowed="two whole numbers from 1, rows and columns, or null",
            )
        )


def dequantize_on_load(config: Any) -> None:
    """Let ``config`` say that its quantised weights, if it has any, are made whole when they are loaded. Changes it."""
    for part in (config, config.get_text_config()):
        given = getattr(part, "quantization_config", None)
        if given is not None:
            given = given if isinstance(given, dict) else given.to_dict()
            method = given.get("quant_method")
            part.quantization_config = given | {"dequantize": True, "quant_method": METHODS.get(str(method), method)}


def dequantizer(config: Any) -> Any:
    """The quantiser for a configuration that :func:`dequantize_on_load` has seen, None for a plain one.

    Raises
    ------
    CheckpointCorruptError
        Its settings make no sense to transformers.
    """
    parts = (config, config.get_text_config())
    given = next((found for part in parts if (found := getattr(part, "quantization_config", None))), None)
    if given is None:
        return None
    try:
        return AutoHfQuantizer.from_config(given, pre_quantized=True)
    except Exception as error:  # every quantisation method checks its settings in its own way
        raise CheckpointCorruptError(
            message("transformers cannot make sense of the quantisation.", where="quantization_config", got=shown(error))
        ) from error


def check_scales(quantizer: Any, weights: Mapping[str | None, list[TensorRef]]) -> None:
    """Hold the scales of one parameter's FP8 weights, tensors by the pattern that they came by, against their shapes.

    Raises
    ------
    CheckpointCorruptError
        Scales are missing or of a shape that does not fit the block size: names the tensor.
    """
    if quantizer is None or quantizer.quantization_config.quant_method != FP8:
        return
    block = quantizer.quantization_config.weight_block_size
    for pattern, refs in weights.items():
        name = str(pattern)
        if name.endswith(("_scale_inv", "activation_scale")):
            continue
        scales = weights.get(f"{name}_scale_inv", [])
        if len(scales) != len(refs) and (scales or any(ref.dtype in (*FLOAT8, "I8") for ref in refs)):
            what = "Weights and scales differ in number." if scales else "Quantised weights have no scales beside them."
            got = f"{len(refs)} weights and {len(scales)} scales" if scales else refs[0].dtype
            raise CheckpointCorruptError(
                message(what, where=f"{refs[0].key} in {refs[0].file}", got=got, step="Download the checkpoint again.")
            )
        for ref, scale in zip(refs, scales, strict=False):
            wrong = wrong_scales((ref.dtype, ref.shape), (scale.dtype, scale.shape), block)
            if wrong is not None:
                raise CheckpointCorruptError(
                    message(
                        "The scales of a quantised weight do not fit it.",
                        where=f"{scale.key} in {scale.file}",
                        got=f"{scale.dtype} {list(scale.shape)}",
                        allowed=f"{wrong}, in blocks of {block}",
                    )
                )
