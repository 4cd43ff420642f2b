"""What a path holds, told by its content, for messages that refuse it."""

from __future__ import annotations

import csv
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from swapless.errors import SwaplessError
from swapless.untrusted import parse_json, shown

__all__ = ["content_of"]

_LOOKED_AT = 1 << 16
_SHOWN_NAMES = 6
_NAME = re.compile(r"[\w.#%()/-][\w .#%()/-]{0,40}")
_MAGIC = (
    (b"PAR1", "a Parquet table"),
    (b"GGUF", "a GGUF file"),
    (b"\x93NUMPY", "one NumPy array (.npy)"),
    (b"PK\x03\x04", "a zip archive, as NumPy and torch write"),
    (b"\x89HDF", "an HDF5 file"),
    (b"ARROW1", "an Arrow file"),
    (b"SQLite format 3", "an SQLite database"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"%PDF", "a PDF"),
    (b"\x80\x02", "a Python pickle"),
    (b"\x80\x03", "a Python pickle"),
    (b"\x80\x04", "a Python pickle"),
    (b"\x80\x05", "a Python pickle"),
)


def content_of(path: str | os.PathLike[str]) -> str:
    """What ``path`` holds, in a few words; only its first bytes are read.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "x"
    >>> _ = file.write_text('{"layers": [], "model": "m"}')
    >>> content_of(file)
    "a JSON object with the keys 'layers', 'model'"
    """
    place = Path(path)
    try:
        if place.is_dir():
            return _folder(place)
        descriptor = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                return "no regular file"
            start = file.read(_LOOKED_AT)
    except FileNotFoundError:
        return "nothing of that name"
    except (OSError, ValueError) as error:  # a path with a zero byte
        return f"what cannot be read ({getattr(error, 'strerror', None) or error})"
    if not start:
        return "an empty file"
    named = next((name for magic, name in _MAGIC if start.startswith(magic)), None)
    return named or _safetensors(start, status.st_size) or _text(start, whole=len(start) == status.st_size)


def _folder(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    if "config.json" in names:
        return "a checkpoint folder"
    return f"a folder with {_listed(names)}" if names else "an empty folder"


def _safetensors(start: bytes, size: int) -> str | None:
    length = int.from_bytes(start[:8], "little")
    if start[8:9] != b"{" or not 2 <= length <= size - 8:
        return None
    return "a saved predictor" if b'"swapless.predictor"' in start[8 : 8 + length] else "a safetensors file"


def _text(start: bytes, *, whole: bool) -> str:
    try:
        text = start.decode("utf-8")
    except UnicodeDecodeError as error:
        if whole or error.start < len(start) - 3 or b"\0" in start:  # else a letter that the end of what was read cuts
            return "bytes of no form that is known here"
        text = start[: error.start].decode("utf-8")
    if "\0" in text:
        return "bytes of no form that is known here"
    text = text.removeprefix("\ufeff").strip()
    if not text:
        return "an empty text"
    first, _, rest = text.partition("\n")
    if text[0] in "{[":
        return _json(text, first, bool(rest), whole)
    columns = next(csv.reader([first]), [])
    if len(columns) > 1 and all(_NAME.fullmatch(name) for name in columns) and rest.count(",") >= rest.count("\n"):
        return f"lines with commas (CSV), the first {_listed(columns)}"
    return f"a text that begins {shown(first[:40])}"


def _json(text: str, first: str, more: bool, whole: bool) -> str:
    value = _parsed(text) if whole else None
    if value is not None:
        return f"a JSON {_kind(value)}"
    line = _parsed(first)
    if line is not None and more:
        return f"lines of JSON, the first {'an' if isinstance(line, dict) else 'a'} {_kind(line)}"
    return f"a text that begins {shown(first[:40])} and is no JSON" if whole else "a large JSON document"


def _parsed(text: str) -> Any:
    try:
        return parse_json(text, where="", special_floats=True)
    except SwaplessError:
        return None


def _kind(value: Any) -> str:
    if not isinstance(value, dict):
        return f"list of {len(value)} entries" if isinstance(value, list) else f"value {shown(json.dumps(value))}"
    return f"object with the keys {_listed(list(value))}" if value else "object without keys"


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN_NAMES
    return ", ".join(shown(name) for name in names[:_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
