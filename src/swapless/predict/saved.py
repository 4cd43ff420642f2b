"""Predictors as files: safetensors with a header that says whose they are. No pickle; see ``docs/formats/predict.md``."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from swapless.atomic import write_whole
from swapless.errors import PredictorError, message
from swapless.predict import PREDICTORS
from swapless.predict.predictor import Fitted, Predictor

HEADER_KEY = "swapless.predictor"
FORMAT_VERSION = 1


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
    write_whole(path, lambda part: save_file(packed, part, {HEADER_KEY: json.dumps(header)}))


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The header of a predictor's file.

    Raises
    ------
    PredictorError
        No such file, no safetensors file, no header, or an unknown version.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise PredictorError(message("No such predictor.", where=path, step="Make one: swapless predict train."))
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise PredictorError(message("Not a predictor's file, or a truncated one.", where=path, got=str(error))) from error
    if HEADER_KEY not in metadata:
        raise PredictorError(message(f"The file has no predictor's header (metadata key {HEADER_KEY}).", where=path))
    try:
        header = json.loads(metadata[HEADER_KEY])
        version = header["format_version"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise PredictorError(message("The predictor's header is malformed.", where=path, got=str(error))) from error
    if version != FORMAT_VERSION:
        what = "Unknown format_version of a predictor."
        raise PredictorError(message(what, where=path, got=repr(version), allowed=FORMAT_VERSION, step="Update swapless."))
    return dict(header)


def load_predictor(path: str | os.PathLike[str]) -> Predictor:
    """Read a predictor; it gives the same bits as the one that was saved.

    Raises
    ------
    PredictorError
        As :func:`read_header`, or tensors that do not fit the header.
    UnknownNameError
        A kind of predictor that is not installed.
    """
    from safetensors.numpy import load_file

    header = read_header(path)
    kind = PREDICTORS.get(str(header.get("predictor")))
    try:
        fitted = Fitted(
            model_id=header["model_id"],
            num_experts=header["num_experts"],
            top_k=header["top_k"],
            num_moe_layers=header["num_moe_layers"],
            vocabulary=header["vocabulary"],
            leads=tuple(header["leads"]),
        )
        restored: Predictor = kind.restore(fitted, load_file(path), header["settings"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        what = "The predictor's tensors do not fit its header."
        raise PredictorError(message(what, where=path, got=f"{type(error).__name__}: {error}")) from error
    return restored
