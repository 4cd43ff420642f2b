"""Checkpoints whose weights are quantised already: transformers' own operations make them whole again, an expert at a time.

How such a checkpoint names its blocks and scales, and what they stand for, is told by transformers' quantisers through the
same conversion table as everything else. A quantiser that only dequantises changes no module and needs no accelerator.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import Mxfp4Dequantize
from transformers.quantizers.auto import AutoHfQuantizer

from swapless.errors import UnsupportedCheckpointError, message

DEQUANTIZE = (Mxfp4Dequantize, Fp8Dequantize)
"""Operations that turn blocks and scales of an expert into its weights."""

METHODS = {"mxfp4": (), "fp8": ("accelerate",)}
"""Quantisation methods that are served, each with the packages that transformers asks for, though it would not need them."""


def check_quantization(quantization: Any, where: object) -> None:
    """Refuse a checkpoint's ``quantization_config`` that cannot be undone an expert at a time.

    Raises
    ------
    UnsupportedCheckpointError
        Another method, or a package that it needs is not installed.
    """
    method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
    if method not in METHODS:
        raise UnsupportedCheckpointError(
            message(
                f"The checkpoint is quantised with {method!r}, which is not served.",
                where=where,
                allowed=f"safetensors of bf16, f16 and f32, or quantised with {' or '.join(METHODS)}",
                step="Take an unquantised revision of the model.",
            )
        )
    missing = [name for name in METHODS[method] if find_spec(name) is None]
    if missing:
        raise UnsupportedCheckpointError(
            message(
                f"transformers reads {method!r} only with another package installed.",
                where=where,
                got=f"no {', '.join(missing)}",
                step=f"pip install {' '.join(missing)}",
            )
        )


def dequantize_on_load(config: Any) -> None:
    """Let ``config`` say that its quantised weights, if it has any, are made whole when they are loaded. Changes it."""
    for part in (config, config.get_text_config()):
        given = getattr(part, "quantization_config", None)
        if given is not None:
            part.quantization_config = (given if isinstance(given, dict) else given.to_dict()) | {"dequantize": True}


def dequantizer(config: Any) -> Any:
    """transformers' quantiser for a configuration that :func:`dequantize_on_load` has seen, None for a plain one."""
    parts = (config, config.get_text_config())
    given = next((found for part in parts if (found := getattr(part, "quantization_config", None))), None)
    return None if given is None else AutoHfQuantizer.from_config(given, pre_quantized=True)
