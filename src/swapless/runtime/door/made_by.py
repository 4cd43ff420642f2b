"""Checkpoints in the form of another tool: told by the names of their tensors, so that an error can say whose they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from swapless.errors import SwaplessError, UnsupportedCheckpointError, message
from swapless.untrusted import read_json, shown

TOOLS = {
    "MLX": (".switch_mlp.",),
    "bitsandbytes": (".absmax", ".quant_map", ".nested_absmax", ".quant_state.bitsandbytes__nf4", ".SCB", "__fp4"),
    "GPTQ or AWQ (AutoGPTQ, GPTQModel, AutoAWQ, auto-round)": (".qweight", ".qzeros", ".g_idx"),
    "NVFP4 (NVIDIA ModelOpt)": (".weight_scale_2", "_weight_scale_2"),
    "compressed-tensors (llm-compressor)": (".weight_packed", ".weight_shape", ".weight_global_scale", ".weight_zero_point"),
    "HQQ": (".W_q",),
    "AQLM or VPTQ": (".codes", ".codebooks", ".centroids", ".indices"),
    "FP8 with a scale a row or a weight (compressed-tensors, fbgemm, ModelOpt)": (".weight_scale", ".input_scale"),
    "MLX, or another tool for groups of weights": (".scales", ".biases"),
    "quanto or torchao": ("._data", "._scale", ":qdata", ".weight:_data"),
}
"""Which tool writes tensors of such names, in the order in which they are looked for."""

METHODS = {
    "awq": "AutoAWQ or llm-awq",
    "gptq": "AutoGPTQ or GPTQModel",
    "auto-round": "Intel's auto-round",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "llm-compressor",
    "modelopt": "NVIDIA ModelOpt",
    "nvfp4": "NVIDIA ModelOpt",
    "quark": "AMD Quark",
    "torchao": "torchao",
    "hqq": "HQQ",
    "fbgemm_fp8": "fbgemm",
    "aqlm": "AQLM",
    "vptq": "VPTQ",
    "eetq": "EETQ",
    "quanto": "quanto",
    "mxfp8": "a tool for MXFP8",
}
"""Which tool a quantisation method of a configuration belongs to."""

_SETTINGS = ("quantization", "compression_config", "quantization_config")
_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
_MAX_BYTES = 2**20


def foreign(folder: Path, raw: Mapping[str, Any], keys: Iterable[str]) -> UnsupportedCheckpointError | None:
    """The error for a checkpoint whose ``keys`` (those that the model has no place for) are in the form of another tool.

    None where neither their names nor a file beside them tell of one.
    """
    tool, telling = _by_keys(keys)
    settings = {name: raw[name] for name in _SETTINGS if raw.get(name)}
    files = {name: _producer(folder / name) for name in _FILES if (folder / name).exists()}
    if tool is None and not settings and not files:
        return None
    method = next((found for part in settings.values() if (found := _method(part)) is not None), None)
    known = METHODS.get(str(method))
    makers = [known] if known else list(dict.fromkeys(filter(None, (*files.values(), tool))))
    if method is not None:
        what = f"The checkpoint is quantised with {method!r}" + (f" ({', '.join(makers)})" if makers else "")
    else:
        what = f"The checkpoint is in the form of {', '.join(makers) or 'another tool'}"
    signs = [*telling, *(f"{name!r} in config.json" for name in settings), *files]
    return UnsupportedCheckpointError(
        message(
            f"{what}, which is not served.",
            where=folder,
            got=", ".join(signs),
            allowed="safetensors of bf16, f16 and f32 under the names of transformers, or quantised with mxfp4 or fp8",
            step="Take an unquantised revision of the model.",
        )
    )


def _by_keys(keys: Iterable[str]) -> tuple[str | None, list[str]]:
    """The tool whose names these are, and one key for each mark of it."""
    keys = sorted(keys)
    for tool, marks in TOOLS.items():
        telling = [next((key for key in keys if _marked(key, mark)), None) for mark in marks]
        if any(telling):
            return tool, [shown(key)[1:-1] for key in telling if key is not None]
    return None, []


def _marked(key: str, mark: str) -> bool:
    return mark in key if mark.endswith(".") else key.endswith(mark)


def _method(settings: Any) -> str | None:
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    return shown(method)[1:-1] if isinstance(method, str) else None


def _producer(file: Path) -> str | None:
    """Who a file of quantisation settings says that it is by."""
    try:
        settings = read_json(file, max_bytes=_MAX_BYTES, special_floats=True).value
    except (SwaplessError, OSError):
        return None  # it is only named then
    producer, algorithm = settings.get("producer"), settings.get("quantization")
    name = producer.get("name") if isinstance(producer, Mapping) else None
    kind = algorithm.get("quant_algo") if isinstance(algorithm, Mapping) else settings.get("quant_method")
    return " ".join(shown(part)[1:-1] for part in (name, kind) if isinstance(part, str)) or None
