"""A checkpoint folder before a weight is read: its configuration, which files hold its weights, and which tensor lies where.

All that can be wrong with a folder before the first weight is read is found here. Which of several files counts is decided as
transformers decides it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from swapless.content import content_of
from swapless.errors import (
    CheckpointCorruptError,
    CheckpointMissingError,
    UnsupportedCheckpointError,
    message,
)
from swapless.store.shard import TensorRef, read_header
from swapless.untrusted import Table, read_json, shown

__all__ = [
    "CONFIG_NAME",
    "INDEX_NAME",
    "SINGLE_NAME",
    "TensorRef",
    "find_shards",
    "first_shard",
    "local_folder",
    "names_of_shards",
    "read_config",
    "read_header",
    "read_headers",
]

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

MAX_CONFIG_BYTES = 16 * 2**20
MAX_INDEX_BYTES = 64 * 2**20
"""Of 400,000 tensors with long names."""

_ADAPTER = "adapter_config.json"
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_LONE_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_VARIANT = re.compile(r"model\.[\w-]+(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.[\w-]+\.json")
_OTHER_FORMATS = (".gguf", ".bin", ".pt", ".pth")


def local_folder(path: Path) -> Path:
    """The checkpoint folder that ``path`` means: of a repository in the hub's cache (``models--owner--name``) its snapshot.

    Raises
    ------
    CheckpointMissingError
        The cache holds several snapshots, or none, and does not say which is the one.
    """
    snapshots = path / "snapshots"
    if (path / CONFIG_NAME).exists() or not path.name.startswith("models--") or not snapshots.is_dir():
        return path
    try:
        main = (path / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        main = ""
    found = sorted(entry for entry in snapshots.iterdir() if entry.is_dir())
    chosen = [entry for entry in found if entry.name == main] or found
    if len(chosen) != 1:
        raise CheckpointMissingError(
            message(
                "This is a repository in the hub's cache, and it does not say which of its snapshots is the one.",
                where=path,
                got=", ".join(entry.name for entry in found[:4]) or "no snapshot",
                step=f"Give the folder of a snapshot in {snapshots}, or the hub id.",
            )
        )
    return chosen[0]


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed ``config.json`` of a checkpoint folder.

    Raises
    ------
    CheckpointMissingError
        No such folder, not a folder, or no ``config.json``.
    CheckpointCorruptError
        ``config.json`` is no JSON object.
    UnsupportedCheckpointError
        A folder with an adapter and no model.
    """
    try:
        entries = sorted(entry.name for entry in folder.iterdir())
    except NotADirectoryError as error:
        suffix = folder.suffix.lower()
        if suffix in _OTHER_FORMATS:
            raise UnsupportedCheckpointError(_wrong_format(suffix, folder)) from error
        raise CheckpointMissingError(
            message("A checkpoint is a folder with config.json and safetensors shards.", where=folder, got=content_of(folder))
        ) from error
    except (OSError, ValueError) as error:  # a path with a zero byte
        raise CheckpointMissingError(
            message(
                "The checkpoint folder cannot be read.",
                where=folder,
                got=getattr(error, "strerror", None) or str(error),
                step="Check the path and its permissions, or give a hub id such as allenai/OLMoE-1B-7B-0125.",
            )
        ) from error
    if CONFIG_NAME in entries:
        return _read(folder / CONFIG_NAME, MAX_CONFIG_BYTES, special_floats=True).value
    if _ADAPTER in entries:
        raise UnsupportedCheckpointError(_adapter_alone(folder))
    raise CheckpointMissingError(
        message(
            "The checkpoint folder has no config.json.",
            where=folder,
            got=", ".join(shown(name)[1:-1] for name in entries[:8]) or "an empty folder",
        )
    )


def find_shards(folder: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint, each checked to exist: those that transformers takes.

    ``model.safetensors`` comes before an index, which may be left over from an older save.

    Raises
    ------
    CheckpointMissingError
        The index names a file that is not there, or there are no weights at all.
    CheckpointCorruptError
        The index is malformed, or names files outside the folder.
    UnsupportedCheckpointError
        Weights in another format only (``.bin``, ``.gguf``, ``.pt``), or an adapter or a distributed checkpoint beside them.
    """
    return _find(folder)[0]


def _find(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The shards, and the index' weight map where an index names them."""
    names = sorted(entry.name for entry in folder.iterdir())
    _refuse_others(folder, names)
    if (folder / SINGLE_NAME).is_file():
        return [folder / SINGLE_NAME], {}
    index = folder / INDEX_NAME
    if index.exists():
        weight_map = _weight_map(index)
        shards = _names(weight_map, index)
        for name in shards:
            if not (folder / name).is_file():
                raise CheckpointMissingError(_missing(name, weight_map, index))
        return [folder / name for name in shards], weight_map
    raise _no_weights(folder, names)


def names_of_shards(index: Path) -> list[str]:
    """Names of the shards in an index, sorted; they need not be there.

    Raises
    ------
    CheckpointMissingError
        The index cannot be read.
    CheckpointCorruptError
        It is malformed, or a name leads out of its folder.
    """
    return _names(_weight_map(index), index)


def read_headers(folder: Path) -> dict[str, TensorRef]:
    """Every tensor of the checkpoint by its key; of one that two shards hold, that of the last, as in transformers.

    Raises
    ------
    CheckpointMissingError, CheckpointCorruptError, UnsupportedCheckpointError
        See :func:`find_shards` and :func:`read_header`; also a key that the index names and no shard holds.
    """
    refs: dict[str, TensorRef] = {}
    shards, weight_map = _find(folder)
    for shard in shards:
        refs.update(read_header(shard))
    if not refs:
        raise CheckpointCorruptError(message("The checkpoint holds no tensors.", where=shards[0]))
    for key, name in weight_map.items():
        if key not in refs:
            what, got = "The index names a tensor that its shard does not hold.", f"{shown(key)[1:-1]} in {shown(name)[1:-1]}"
            raise CheckpointCorruptError(message(what, where=folder / INDEX_NAME, got=got))
    return refs


def first_shard(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The shard that transformers looks at first, and the index' metadata, empty without an index; raises as `find_shards`."""
    shards, weight_map = _find(folder)
    if not weight_map:
        return shards[0], {}
    metadata = _read(folder / INDEX_NAME, MAX_INDEX_BYTES).raw("metadata", None)
    return shards[0], metadata if isinstance(metadata, dict) else {}


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = _read(index, MAX_INDEX_BYTES).raw("weight_map", None)
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointCorruptError(message("The index has no weight_map.", where=index, step="Download the index again."))
    return weight_map


def _names(weight_map: dict[str, str], index: Path) -> list[str]:
    names = sorted(set(weight_map.values()))
    for name in names:
        path = PurePosixPath(name)
        if not name.endswith(".safetensors") or path.is_absolute() or ".." in path.parts or "\0" in name or "\\" in name:
            raise CheckpointCorruptError(
                message("The index names a shard outside its folder, or none.", where=index, got=shown(name))
            )
    return names


def _read(path: Path, max_bytes: int, *, special_floats: bool = False) -> Table:
    try:
        return read_json(path, what=path.name, max_bytes=max_bytes, special_floats=special_floats)
    except OSError as error:
        raise CheckpointMissingError(message("A file cannot be read.", where=path, got=error.strerror or str(error))) from error


def _missing(name: str, weight_map: dict[str, str], index: Path) -> str:
    held = [key for key, shard in weight_map.items() if shard == name]
    there = sorted(path.relative_to(index.parent).as_posix() for path in index.parent.glob("**/*.safetensors"))
    named = ", ".join(shown(name)[1:-1] for name in there[:8]) + (" and more" if len(there) > 8 else "")
    return message(
        "The index names a shard that is not there.",
        where=index,
        got=f"{shown(name)[1:-1]}, which should hold {shown(held[0])[1:-1]} and {len(held) - 1} more",
        allowed=named or "no safetensors file",
        step="Download the missing shard.",
    )


def _refuse_others(folder: Path, names: Sequence[str]) -> None:
    """What transformers would load instead of, or on top of, the checkpoint's own weights."""
    if _ADAPTER in names:
        raise UnsupportedCheckpointError(
            message(
                "An adapter lies beside the model: transformers puts it on the weights where peft is installed.",
                where=folder / _ADAPTER,
                step="Merge it into the weights, or move its files out of the folder to run the model without it.",
            )
        )
    distributed = next((name for name in names if _DISTRIBUTED.fullmatch(name)), None)
    if distributed is not None:
        raise UnsupportedCheckpointError(
            message(
                "The folder holds a distributed checkpoint, which transformers would load in place of all others.",
                where=folder / distributed,
                step="Load it with transformers and save it with save_pretrained.",
            )
        )


def _no_weights(folder: Path, names: Sequence[str]) -> CheckpointMissingError | UnsupportedCheckpointError:
    allowed = f"{SINGLE_NAME}, or {INDEX_NAME} with its shards"
    if SINGLE_NAME in names:
        where, got = folder / SINGLE_NAME, "a link to a file that is not there, or no file"
        return CheckpointMissingError(message("The weights are not there.", where=where, got=got, step="Download them again."))
    lone = [name for name in names if _LONE_SHARD.fullmatch(name)]
    if lone:
        got = f"{len(lone)} shards, {lone[0]} and so on, without {INDEX_NAME}"
        return CheckpointMissingError(
            message("The index of the shards is missing.", where=folder, got=got, allowed=allowed, step="Download the index.")
        )
    variants = [name for name in names if _VARIANT.fullmatch(name)]
    if variants:
        step = "Rename them without the variant, or take the main files."
        return CheckpointMissingError(
            message(
                "The folder holds a variant of the weights only.", where=folder, got=variants[0], allowed=allowed, step=step
            )
        )
    for suffix in _OTHER_FORMATS:
        if any(name.endswith(suffix) for name in names):
            return UnsupportedCheckpointError(_wrong_format(suffix, folder))
    return CheckpointMissingError(message("No weights found.", where=folder, allowed=allowed))


def _adapter_alone(folder: Path) -> str:
    try:
        settings = _read(folder / _ADAPTER, MAX_CONFIG_BYTES, special_floats=True)
        kind, base = (settings.raw(key, None) for key in ("peft_type", "base_model_name_or_path"))
    except (CheckpointMissingError, CheckpointCorruptError):
        kind = base = None
    kind = shown(kind)[1:-1] if isinstance(kind, str) else "of peft"
    return message(
        f"This is an adapter ({kind}), not a model: it changes the weights of one.",
        where=folder,
        got=f"an adapter of {shown(base)[1:-1]}" if isinstance(base, str) else None,
        step="Merge it into its model with peft's merge_and_unload and save that, or load the model without it.",
    )


def _wrong_format(suffix: str, where: Path) -> str:
    return message(
        f"Weights in {suffix} form are not served: their experts cannot be read by byte range.",
        where=where,
        allowed="safetensors",
        step="Convert the checkpoint with transformers' save_pretrained, or take a safetensors revision of it.",
    )
