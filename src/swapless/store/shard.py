"""One safetensors file: its tensors, told by the safetensors library, and where their bytes lie.

A shard is 8 bytes (little-endian length), a JSON header, then the data, which the tensors cover without gap or overlap. What
is a header and what is none is decided by the library alone, so exactly its files are served. It tells the tensors in the
order of their bytes, and from that the places follow. Where it refuses a file, the tensor to blame is looked for here.
"""

from __future__ import annotations

import os
import stat
import struct
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from swapless.errors import CheckpointCorruptError, CheckpointMissingError, SwaplessError, UnsupportedCheckpointError, message
from swapless.untrusted import parse_json, shown

DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
"""Bits of a value of each type that a safetensors file may hold."""

MAX_HEADER_BYTES = 100_000_000
"""What the safetensors library reads at most."""
_MAX_COMMAS = 5_000_000
"""More values than any header has: of 400,000 tensors. The library would turn each into some hundred bytes."""
_AGAIN = "Download the shard again."


class TensorRef(NamedTuple):
    """Where tensor ``key`` lies: absolute byte ``offset`` in ``file``, its ``nbytes``, safetensors ``dtype`` and ``shape``."""

    key: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(shard: Path) -> dict[str, TensorRef]:
    """Every tensor of one shard, in the order of its bytes.

    Raises
    ------
    CheckpointMissingError
        The shard cannot be opened.
    CheckpointCorruptError
        No regular file, or one that the safetensors library refuses: truncated, with a malformed header, with gaps, overlaps or
        bytes that belong to no tensor.
    UnsupportedCheckpointError
        A tensor of a type that is not known here.
    """
    try:
        length, raw = _header(shard)
        with safe_open(shard, framework="np") as file:
            ordered = [(key, (tensor := file.get_slice(key)).get_dtype(), tensor.get_shape()) for key in file.offset_keys()]
    except OSError as error:
        raise CheckpointMissingError(
            message("A shard cannot be opened.", where=shard, got=error.strerror or str(error))
        ) from error
    except SafetensorError as error:
        raise _refusal(shard, raw, length, str(error)) from error
    refs: dict[str, TensorRef] = {}
    at = 8 + length
    for key, dtype, shape in ordered:
        if dtype not in DTYPE_BITS:
            raise _unknown(shard, key, dtype)
        nbytes = prod(shape) * DTYPE_BITS[dtype] // 8
        refs[key] = TensorRef(key, shard, dtype, tuple(shape), at, nbytes)
        at += nbytes
    return refs


def _header(shard: Path) -> tuple[int, bytes]:
    """Length and bytes of the header, after the checks that keep the library from reading without end."""
    with open(os.open(shard, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointCorruptError(message("A shard is not a regular file.", where=shard))
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else None
        if length is None or length > min(status.st_size - 8, MAX_HEADER_BYTES):
            got = f"{status.st_size} bytes"
            raise CheckpointCorruptError(
                message("The shard is shorter than its own header says.", where=shard, got=got, step=_AGAIN)
            )
        raw = file.read(length)
    if raw.count(b",") > _MAX_COMMAS:
        raise CheckpointCorruptError(message("The shard's header holds too many values.", where=shard, got=f"{length} bytes"))
    return length, raw


def _refusal(shard: Path, raw: bytes, length: int, words: str) -> SwaplessError:
    """The error for a shard that the library refused with these words, naming the tensor where one is to blame."""
    words = words.removeprefix("Error while deserializing header: ")
    try:
        entries = parse_json(raw, where=shard, what="header of the shard")
    except CheckpointCorruptError as error:
        return CheckpointCorruptError(f"{error} {_AGAIN}")
    if not isinstance(entries, dict):
        what = "The header of the shard must be a JSON object."
        return CheckpointCorruptError(message(what, where=shard, got=type(entries).__name__, step=_AGAIN))
    data_bytes = shard.stat().st_size - 8 - length
    end = 0
    for key, entry in entries.items():
        if key == "__metadata__":
            continue
        where = f"{shown(key)[1:-1]} in {shard}"
        if not _well_formed(entry):
            return CheckpointCorruptError(message("A tensor's header entry is malformed.", where=where, got=shown(entry)))
        if entry["dtype"] not in DTYPE_BITS:
            return _unknown(shard, key, entry["dtype"])
        (first, last), bits = entry["data_offsets"], prod(entry["shape"]) * DTYPE_BITS[entry["dtype"]]
        if (last - first) * 8 != bits:
            what = "A tensor's byte range does not fit its shape and type."
            allowed = f"{bits / 8:g} bytes for {entry['dtype']} {entry['shape']}"
            return CheckpointCorruptError(message(what, where=where, got=f"{last - first} bytes", allowed=allowed))
        end = max(end, last)
    if end > data_bytes:
        allowed = f"at least {8 + length + end} bytes"
        what = "The shard is truncated."
        got = f"{8 + length + data_bytes} bytes"
        return CheckpointCorruptError(message(what, where=shard, got=got, allowed=allowed, step=_AGAIN))
    what = (
        "The tensors of the shard do not cover its bytes, each once."
        if "JSON" not in words
        else "The shard's header is malformed."
    )
    return CheckpointCorruptError(message(what, where=shard, got=shown(words)[1:-1], step=_AGAIN))


def _well_formed(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        return False
    return all(type(size) is int and size >= 0 for size in (*shape, *offsets)) and offsets[0] <= offsets[1]


def _unknown(shard: Path, key: str, dtype: str) -> UnsupportedCheckpointError:
    where = f"{shown(key)[1:-1]} in {shard}"
    return UnsupportedCheckpointError(
        message("Unknown tensor type.", where=where, got=shown(dtype)[1:-1], allowed=", ".join(DTYPE_BITS))
    )
