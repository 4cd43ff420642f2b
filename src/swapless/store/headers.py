"""Safetensors headers of a checkpoint folder: which tensor lies where, read without touching a weight.

A shard is 8 bytes (little-endian length), a JSON header, then the data; offsets in the header count from the end of it. All
that can be wrong with a folder before the first weight is read is found here.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

from swapless.errors import (
    CheckpointCorruptError,
    CheckpointMissingError,
    UnsupportedCheckpointError,
    message,
)

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DTYPE_BYTES = (
    {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
    | {f"{letter}{bits}": bits // 8 for letter in "IU" for bits in (8, 16, 32, 64)}
    | {"BOOL": 1}
)
_MAX_HEADER_BYTES = 100_000_000


class TensorRef(NamedTuple):
    """Where tensor ``key`` lies: absolute byte ``offset`` in ``file``, its ``nbytes``, safetensors ``dtype`` and ``shape``."""

    key: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed ``config.json`` of a checkpoint folder.

    Raises
    ------
    CheckpointMissingError
        No such folder, not a folder, or no ``config.json``.
    CheckpointCorruptError
        ``config.json`` is no JSON object.
    """
    try:
        entries = sorted(entry.name for entry in folder.iterdir())
    except NotADirectoryError as error:
        suffix = folder.suffix.lower()
        if suffix in (".gguf", ".bin", ".pt", ".pth"):
            raise UnsupportedCheckpointError(_wrong_format(suffix, folder)) from error
        raise CheckpointMissingError(
            message("A checkpoint is a folder with config.json and safetensors shards.", got=f"the file {folder}")
        ) from error
    except OSError as error:
        raise CheckpointMissingError(
            message(
                "The checkpoint folder cannot be read.",
                where=folder,
                got=error.strerror or str(error),
                step="Check the path and its permissions, or give a hub id such as allenai/OLMoE-1B-7B-0125.",
            )
        ) from error
    if "config.json" not in entries:
        raise CheckpointMissingError(
            message("The checkpoint folder has no config.json.", where=folder, got=", ".join(entries[:8]) or "an empty folder")
        )
    return _read_json_object(folder / "config.json")


def find_shards(folder: Path) -> list[Path]:
    """The safetensors shards that make up the checkpoint, each checked to exist.

    Raises
    ------
    CheckpointMissingError
        The index names a file that is not there, or there are no weights at all.
    CheckpointCorruptError
        The index is malformed.
    UnsupportedCheckpointError
        Weights in another format only (``.bin``, ``.gguf``, ``.pt``).
    """
    index = folder / INDEX_NAME
    if index.exists():
        weight_map = _read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(n, str) for n in weight_map.values()):
            raise CheckpointCorruptError(message("The index has no weight_map.", where=index, step="Download the index again."))
        shards = [folder / name for name in sorted(set(weight_map.values()))]
        for shard in shards:
            if not shard.is_file():
                named = [key for key, name in weight_map.items() if name == shard.name]
                raise CheckpointMissingError(
                    message(
                        "The index names a shard that is not there.",
                        where=index,
                        got=f"{shard.name}, which should hold {named[0]} and {len(named) - 1} more",
                        allowed=", ".join(sorted(path.name for path in folder.glob("*.safetensors"))) or "no safetensors file",
                        step="Download the missing shard.",
                    )
                )
        return shards
    if (folder / SINGLE_NAME).is_file():
        return [folder / SINGLE_NAME]
    for suffix in (".gguf", ".bin", ".pt", ".pth"):
        if next(folder.glob(f"*{suffix}"), None):
            raise UnsupportedCheckpointError(_wrong_format(suffix, folder))
    raise CheckpointMissingError(
        message("No weights found.", where=folder, allowed=f"{SINGLE_NAME}, or {INDEX_NAME} with its shards")
    )


def read_headers(folder: Path) -> dict[str, TensorRef]:
    """Every tensor of the checkpoint by its key.

    Raises
    ------
    CheckpointMissingError, CheckpointCorruptError, UnsupportedCheckpointError
        See :func:`find_shards` and :func:`read_header`; also a key that the index names and no shard holds.
    """
    refs: dict[str, TensorRef] = {}
    for shard in find_shards(folder):
        refs.update(read_header(shard))
    index = folder / INDEX_NAME
    if index.exists():
        for key, name in _read_json_object(index)["weight_map"].items():
            if key not in refs:
                raise CheckpointCorruptError(
                    message("The index names a tensor that its shard does not hold.", where=index, got=f"{key} in {name}")
                )
    return refs


def read_header(shard: Path) -> dict[str, TensorRef]:
    """Every tensor of one shard, its ranges checked against the file's size.

    Raises
    ------
    CheckpointMissingError
        The shard cannot be opened.
    CheckpointCorruptError
        Truncated file, malformed header, or a tensor whose range, shape and type disagree.
    """
    try:
        with open(shard, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else None
            if length is None or length > min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointCorruptError(
                    message("The shard is shorter than its own header says.", where=shard, got=f"{size} bytes", step=_AGAIN)
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointMissingError(
            message("A shard cannot be opened.", where=shard, got=error.strerror or str(error))
        ) from error
    try:
        header = json.loads(raw)
    except ValueError as error:
        raise CheckpointCorruptError(message("The shard's header is not JSON.", where=shard, step=_AGAIN)) from error
    if not isinstance(header, dict):
        raise CheckpointCorruptError(
            message("The shard's header must be a JSON object.", where=shard, got=type(header).__name__, step=_AGAIN)
        )
    refs = {}
    for key, entry in header.items():
        if key != "__metadata__":
            refs[key] = _checked_ref(shard, key, entry, 8 + length, size)
    return refs


_AGAIN = "Download the shard again."


def _checked_ref(shard: Path, key: str, entry: Any, data_start: int, size: int) -> TensorRef:
    try:
        dtype, shape = entry["dtype"], tuple(int(n) for n in entry["shape"])
        begin, end = (int(n) for n in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointCorruptError(
            message("A tensor's header entry is malformed.", where=f"{key} in {shard}", got=entry)
        ) from error
    if dtype not in DTYPE_BYTES:
        raise UnsupportedCheckpointError(
            message("Unknown tensor type.", where=f"{key} in {shard}", got=dtype, allowed=", ".join(DTYPE_BYTES))
        )
    expected = DTYPE_BYTES[dtype]
    for n in shape:
        expected *= n
    if begin < 0 or min(shape, default=0) < 0 or end - begin != expected:
        raise CheckpointCorruptError(
            message(
                "A tensor's byte range does not fit its shape and type.",
                where=f"{key} in {shard}",
                got=f"{end - begin} bytes",
                allowed=f"{expected} bytes for {dtype} {list(shape)}",
            )
        )
    if data_start + end > size:
        raise CheckpointCorruptError(
            message(
                "The shard is truncated.",
                where=f"{key} in {shard}",
                got=f"{size} bytes",
                allowed=f"at least {data_start + end} bytes",
                step=_AGAIN,
            )
        )
    return TensorRef(key, shard, dtype, shape, data_start + begin, expected)


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointMissingError(message("A file cannot be read.", where=path, got=error.strerror)) from error
    except ValueError as error:
        raise CheckpointCorruptError(message("The file is not JSON.", where=path, got=str(error))) from error
    if not isinstance(document, dict):
        raise CheckpointCorruptError(message("The file must hold a JSON object.", where=path, got=type(document).__name__))
    return document


def _wrong_format(suffix: str, where: Path) -> str:
    return message(
        f"Weights in {suffix} form are not served: their experts cannot be read by byte range.",
        where=where,
        allowed="safetensors",
        step="Convert the checkpoint with transformers' save_pretrained, or take a safetensors revision of it.",
    )
