"""From the parsed ``config.json`` to transformers' configuration of the language model, as its Auto classes would make it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from swapless.errors import CheckpointCorruptError, UnsupportedCheckpointError, UnsupportedFamilyError, message
from swapless.runtime.door.foreign import foreign_errors
from swapless.runtime.door.sizes import check_counts
from swapless.store.headers import CONFIG_NAME
from swapless.untrusted import shown


def refuse_unknown(folder: Path, raw: Mapping[str, Any]) -> None:
    """Refuse a configuration that the installed transformers has no class for.

    Raises
    ------
    UnsupportedFamilyError
        An unknown ``model_type``, with code of its own or without.
    UnsupportedCheckpointError
        A configuration that hands on to another file.
    """
    model_type = raw.get("model_type")
    if isinstance(model_type, str):
        for point in entry_points(group="swapless.models", name=model_type):
            point.load()()  # a family from outside transformers registers itself with the Auto classes
    if raw.get("configuration_files"):
        raise UnsupportedCheckpointError(
            message(
                "The configuration hands on to another file for each version of transformers, which is not followed.",
                where=f"configuration_files in {folder / CONFIG_NAME}",
                step=f"Copy the file for the installed version over {CONFIG_NAME}.",
            )
        )
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        return
    if raw.get("auto_map"):
        raise UnsupportedFamilyError(
            message(
                f"The checkpoint brings its own code for {shown(model_type)}, and remote code is not run.",
                where=folder,
                step="Swapless serves the families that transformers itself ships; a newer transformers may have this one.",
            )
        )
    raise UnsupportedFamilyError(
        message("The installed transformers does not know this model type.", where=folder, got=shown(model_type))
    )


def model_config(folder: Path, raw: Mapping[str, Any]) -> Any:
    """transformers' configuration of the values ``raw``.

    Raises
    ------
    CheckpointCorruptError
        Values that the family's configuration refuses, or that no model has.
    """
    check_counts(raw, folder / CONFIG_NAME)
    with foreign_errors("transformers cannot make sense of config.json.", folder):
        # JSON has no infinity, and transformers writes one as an object.
        values = PreTrainedConfig._decode_special_floats(copy.deepcopy(dict(raw)))
        config = CONFIG_MAPPING[raw["model_type"]].from_dict(values)
        config.get_text_config()
    return config


def own_config(config: Any, cls: type[PreTrainedModel]) -> Any:
    """The part of a configuration that ``cls`` is built from: that of the text, where it is a class for the text alone."""
    text = config.sub_configs.get("text_config")
    if text is None or getattr(cls, "config_class", None) is not text:
        return config
    part, quantization = config.get_text_config(), getattr(config, "quantization_config", None)
    if quantization is not None:
        part.quantization_config = quantization
    return part


def stated_dtype(config: Any, where: object) -> torch.dtype | None:
    """The type that a configuration says to compute in, if it says one.

    Raises
    ------
    CheckpointCorruptError
        No type that a model can be computed in.
    """
    stated = getattr(config, "dtype", None)
    if stated is None or (isinstance(stated, torch.dtype) and computable(stated)):
        return stated
    raise CheckpointCorruptError(
        message("The configuration states a type that no model is computed in.", where=where, got=shown(stated))
    )


def computable(dtype: torch.dtype) -> bool:
    """Whether torch computes a whole model in this type."""
    return dtype.is_floating_point and dtype.itemsize >= 2
