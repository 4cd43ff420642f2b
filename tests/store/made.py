"""Packed stores changed in ways that a store itself would not be: an older version of the format, a manifest sealed anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from swapless.store.manifest import MANIFEST, sealed


def document(folder: Path) -> dict[str, Any]:
    """The manifest without its checksum."""
    found: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    found.pop("checksum", None)
    return found


def reseal(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest and give it the checksum that it has then."""
    found = document(folder)
    change(found)
    (folder / MANIFEST).write_bytes(sealed(found))


def as_version_2(folder: Path) -> Path:
    """The same store as an earlier commit wrote it: no checksum of the manifest, of parts, or of tensors."""
    found = document(folder) | {"format_version": 2}
    del found["tensors"]
    for layer in found["moe_layers"]:
        del layer["part_checksums"]
    (folder / MANIFEST).write_text(json.dumps(found, indent=2) + "\n")
    return folder


def flip(file: Path, place: int, bit: int = 0) -> None:
    """One bit of a file the other way round."""
    raw = bytearray(file.read_bytes())
    raw[place] ^= 1 << bit
    file.write_bytes(raw)
