"""Predictors as files: safetensors with a header that says whose they are. No pickle; see ``docs/formats/predict.md``."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from swapless.atomic import write_whole
from swapless.errors import PredictorError, UsageError, message
from swapless.predict import PREDICTORS
from swapless.predict.predictor import Predictor
from swapless.untrusted import Table, parse_json, shown

HEADER_KEY = "swapless.predictor"
FORMAT_VERSION = 2
_KEYS = ("format_version", "predictor", "model_id", "num_experts", "top_k", "num_moe_layers", "vocabulary", "leads", "settings")


def save_predictor(path: str | os.PathLike[str], predictor: Predictor) -> None:
    """Write a fitted predictor, whole or not at all.

    Raises
    ------
    NotFittedError
        Before ``fit``.
    """
    from safetensors.numpy import save_file

    fitted = predictor.require_fitted()
    arrays, settings = predictor.state()
    header = {"format_version": FORMAT_VERSION, "predictor": predictor.name, **asdict(fitted), "settings": settings}
    packed = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    header["checksum"] = _checksum(header, packed)
    write_whole(path, lambda part: save_file(packed, part, {HEADER_KEY: json.dumps(header)}))


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The header of a predictor's file.

    Raises
    ------
    PredictorError
        No such file, no safetensors file, no header, an unknown version, or a key that cannot be.
    """
    return _header(path).value


def _header(path: str | os.PathLike[str]) -> Table:
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise PredictorError(message("No such predictor.", where=path, step="Make one: swapless predict train."))
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise PredictorError(message("Not a predictor's file, or a truncated one.", where=path, got=shown(error))) from error
    if HEADER_KEY not in metadata:
        raise PredictorError(message(f"The file has no predictor's header (metadata key {HEADER_KEY}).", where=path))
    value = parse_json(metadata[HEADER_KEY], where=path, error=PredictorError, what="predictor's header")
    header = Table(value, where=path, error=PredictorError)
    version = header.raw("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        what = "Unknown format_version of a predictor."
        allowed = f"1 to {FORMAT_VERSION}"
        raise PredictorError(message(what, where=path, got=shown(version), allowed=allowed, step="Update swapless."))
    header.only(*_KEYS, *(["checksum"] if version > 1 else []))
    header.text("predictor")
    header.table("settings")
    return header


def load_predictor(path: str | os.PathLike[str]) -> Predictor:
    """Read a predictor; it gives the same bits as the one that was saved.

    Raises
    ------
    PredictorError
        As :func:`read_header`; bytes that changed since it was written; tensors that do not fit the header.
    UnknownNameError
        A kind of predictor that is not installed.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    from swapless.predict.schema import check_file, fitted_of

    header = _header(path)
    name = header.text("predictor")
    kind = PREDICTORS.get(name)
    fitted, settings = fitted_of(header), header.table("settings")
    try:
        arrays = load_file(path)
    except (SafetensorError, OSError, KeyError, ValueError, MemoryError) as error:
        raise PredictorError(message("The predictor's tensors cannot be read.", where=path, got=shown(error))) from error
    if header.integer("format_version") > 1:
        said = header.text("checksum", pattern="[0-9a-f]{64}")
        if said != _checksum({key: header.value[key] for key in _KEYS if key in header}, arrays):
            what = "The predictor's file is not as it was written: its checksum differs."
            raise PredictorError(message(what, where=path, step="Fetch it again, or train it again."))
    check_file(name, fitted, arrays, settings, where=path)
    try:
        restored: Predictor = kind.restore(fitted, arrays, settings.value)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, UsageError) as error:
        what = "The predictor's tensors do not fit its header."
        raise PredictorError(message(what, where=path, got=f"{type(error).__name__}: {shown(error)}")) from error
    return restored


def _checksum(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of the header without its checksum, and of each tensor's name, type, shape and bytes."""
    found = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(arrays):
        array = arrays[name]
        found.update(f"\n{name} {array.dtype.str} {array.shape}\n".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()
