"""A packed store: one page-aligned block an expert, in the form that the kernels consume, and the manifest that says so.

The folder is self-contained: configuration, tokenizer and non-expert weights lie in it as in a checkpoint, each
``experts-*.safetensors`` holds the blocks of one MoE layer, and ``swapless.json``, the manifest, is written last: a folder
without it is not whole. A block goes from the file straight into a slot, without a copy in between. Byte by byte:
``docs/formats/packed.md``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from swapless.atomic import write_whole
from swapless.errors import CheckpointCorruptError, CheckpointMissingError, PackMismatchError, ReadError, UsageError, message
from swapless.locks import Lock
from swapless.store.checkpoint import Extent
from swapless.store.checksum import checksum, file_checksum, quick_checksum
from swapless.store.headers import TensorRef, find_shards
from swapless.store.manifest import (
    AGAIN,
    CONFIG,
    DENSE,
    FORMAT_VERSION,
    JOURNAL,
    LOCK,
    MANIFEST,
    MOST_BYTES,
    Manifest,
    PackedLayer,
    Piece,
    block_file_header,
    block_parts,
    manifest_bytes,
    parse_manifest,
    part_ranges,
)
from swapless.store.read import FileReader
from swapless.store.write import saying_that_it_goes_on
from swapless.untrusted import read_regular

__all__ = [
    "DENSE",
    "FORMAT_VERSION",
    "JOURNAL",
    "MANIFEST",
    "Check",
    "Manifest",
    "PackedLayer",
    "PackedStore",
    "Piece",
    "block_parts",
    "check_dense",
    "check_dense_file",
    "checkpoint_identity",
    "is_packed",
    "note_perplexity",
    "read_manifest",
]

_SAMPLES = 64
_SAMPLE_BYTES = 4096
_DAMAGED = "Run swapless verify on the folder, and pack the checkpoint again."


class Check(StrEnum):
    """When what is read of a packed store is held against its checksum."""

    FIRST = "first"
    """A block when it is read for the first time, all other weights when they are loaded."""
    ALWAYS = "always"
    """A block whenever it is read, too."""
    NONE = "none"
    """Never: what lies on the disk is computed with."""

    @classmethod
    def of(cls, value: Check | str | bool | None) -> Check:
        """The member that ``value`` names; True is ``always``, False ``none``, and None the default.

        Raises
        ------
        UsageError
            There is no such member.
        """
        if value is None:
            return cls.FIRST
        if isinstance(value, bool):
            return cls.ALWAYS if value else cls.NONE
        try:
            return cls(value)
        except ValueError:
            raise UsageError(message("Unknown check.", got=repr(value), allowed=", ".join(cls))) from None


def is_packed(folder: Path) -> bool:
    """Whether ``folder`` is a packed store, finished or not."""
    return (folder / MANIFEST).is_file() or (folder / JOURNAL).is_file()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a packed store, whose files are all there, of their size, and of the same packing.

    Checksums of blocks and of the other weights are not looked at, those of all small files are.

    Raises
    ------
    CheckpointCorruptError
        The store is unfinished, its manifest malformed, or a file is missing, damaged or of another size.
    PackMismatchError
        A file of another packed store, or another version of the format.
    """
    manifest = parse_manifest(read_manifest_bytes(folder), folder / MANIFEST)
    _check_files(folder, manifest)
    return manifest


def read_manifest_bytes(folder: Path) -> bytes:
    """The bytes of the manifest in ``folder``.

    Raises
    ------
    CheckpointCorruptError
        There is none, or what is there is far too large.
    CheckpointMissingError
        It cannot be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointCorruptError(
            message("The packed store is not finished.", where=folder, got=f"no {MANIFEST}", step="Run the same pack again.")
        )
    try:
        return read_regular(path, error=CheckpointCorruptError, what="manifest of a packed store", max_bytes=MOST_BYTES)
    except OSError as error:
        raise _unreadable(path, error) from error


def note_perplexity(folder: Path, perplexity: Mapping[str, Any]) -> Manifest:
    """Put measured ``perplexity`` (see :class:`Manifest`) into the manifest of a finished store, in place of an older one.

    Raises
    ------
    CheckpointCorruptError, PackMismatchError
        See :func:`read_manifest`.
    LockedError
        Somebody packs into the folder just now.
    WriteError
        No room, or no permission; the manifest is as it was.
    """
    with saying_that_it_goes_on(), Lock(folder / LOCK, "noting a perplexity"):
        manifest = replace(read_manifest(folder), perplexity=dict(perplexity))
        write_manifest(folder, manifest)
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put ``manifest`` into the folder, whole or not at all.

    Raises
    ------
    CheckpointCorruptError
        A value of it cannot be.
    WriteError
        No room, or no permission.
    """
    raw = manifest_bytes(manifest)
    parse_manifest(raw, folder / MANIFEST)  # what a reader would refuse is never written
    write_whole(folder / MANIFEST, lambda part: part.write_bytes(raw))


def _check_files(folder: Path, manifest: Manifest) -> None:
    sizes = {name: int(entry["bytes"]) for name, entry in manifest.files.items()}
    sizes |= {layer.file: layer.data_offset + layer.num_experts * layer.block_bytes for layer in manifest.moe_layers}
    for name, size in sizes.items():
        file = folder / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            raise CheckpointCorruptError(
                message(
                    "A file of the packed store is missing or of another size.",
                    where=file,
                    got="no such file" if found is None else f"{found} bytes",
                    allowed=f"{size} bytes",
                    step=AGAIN,
                )
            )
    for name in sorted(set(manifest.files) - {DENSE}, key=lambda name: name != CONFIG):
        try:
            held = file_checksum(folder / name)
        except CheckpointMissingError as error:
            raise CheckpointCorruptError(str(error)) from error
        if held != manifest.files[name]["sha256"]:
            raise PackMismatchError(message(f"{name} is not the one that was packed.", where=folder / name, step=AGAIN))
    for number, layer in enumerate(manifest.moe_layers):
        try:
            with open(folder / layer.file, "rb") as opened:
                header = opened.read(layer.data_offset)
        except OSError as error:
            raise _unreadable(folder / layer.file, error) from error
        if header != block_file_header(manifest.source["identity"], number, layer.num_experts, layer.block_bytes):
            raise PackMismatchError(
                message("A file of another packed store lies in this one.", where=folder / layer.file, step=AGAIN)
            )


def _unreadable(path: Path, error: OSError) -> CheckpointMissingError:
    return CheckpointMissingError(message("A file of the packed store cannot be read.", where=path, got=error.strerror))


def check_dense(folder: Path, manifest: Manifest, refs: Mapping[str, TensorRef]) -> None:
    """Refuse tensors of ``model.safetensors``, as its header gives them, that are not those of the manifest.

    Raises
    ------
    PackMismatchError
        Other tensors, or a quantised one of another size.
    """
    where = folder / DENSE
    if manifest.tensors and set(manifest.tensors) != set(refs):
        odd = sorted(set(manifest.tensors) ^ set(refs))
        raise PackMismatchError(
            message("The packed store holds other weights than its manifest says.", where=where, got=odd[0], step=AGAIN)
        )
    bare = [key for key, ref in refs.items() if ref.dtype == "U8" and len(ref.shape) == 1 and key not in manifest.dense]
    if manifest.dense and bare:
        what = "A rounded weight is not in the manifest, which says how to read it."
        raise PackMismatchError(message(what, where=f"{bare[0]} in {where}", step=AGAIN))
    for key in manifest.dense:
        wanted = ("U8", (manifest.dense_layout(key).nbytes,))
        found = (refs[key].dtype, refs[key].shape) if key in refs else None
        if found != wanted:
            raise PackMismatchError(
                message("A rounded weight is not as the manifest says.", where=f"{key} in {where}", got=found, allowed=wanted)
            )


def check_dense_file(folder: Path, manifest: Manifest) -> None:
    """Refuse ``model.safetensors`` if it is not what was packed, by the checksum of the whole file.

    Raises
    ------
    CheckpointCorruptError
        It is not.
    """
    if file_checksum(folder / DENSE) != manifest.files[DENSE]["sha256"]:
        raise CheckpointCorruptError(
            message("Weights of the packed store are not what was packed.", where=folder / DENSE, step=_DAMAGED)
        )


def checkpoint_identity(folder: Path) -> str:
    """What tells a checkpoint from another: SHA-256 over its configuration and, of each shard, name, size and 64 spread pages.

    The first of them holds the header. Cheap for a checkpoint of any size, and a fine-tuned sister of it, with the same header,
    differs in nearly every page.
    """
    digest = hashlib.sha256(read_regular(folder / CONFIG, error=CheckpointCorruptError, what="configuration"))
    for shard in find_shards(folder):
        size = shard.stat().st_size
        digest.update(f"{shard.name} {size}\n".encode())
        with open(shard, "rb") as file:
            for place in range(_SAMPLES):
                file.seek(size * place // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


class PackedStore:
    """Experts of a packed store by (moe_layer, expert), read into slots. The same calls as the checkpoint store's.

    Parameters
    ----------
    folder : Path
        The store.
    layers : sequence of PackedLayer
        From its manifest.
    check : Check or str
        When a block is held against its checksum.

    Raises
    ------
    CheckpointMissingError
        A file cannot be opened.
    """

    bounce_bytes = 0
    """Blocks need no bounce buffer."""

    def __init__(self, folder: Path, layers: Sequence[PackedLayer], *, check: Check | str | bool = Check.NONE) -> None:
        self._folder = folder
        self._layers = list(layers)
        self._check = Check.of(check)
        # Without checksums of parts a block can only be checked as a whole, and so is read as a whole.
        self._parts = [1 if self._check != Check.NONE and not layer.part_checksums else layer.parts for layer in layers]
        self._held = [np.zeros((layer.num_experts, parts), bool) for layer, parts in zip(layers, self._parts, strict=True)]
        self.reader = FileReader(sorted({folder / layer.file for layer in layers}))

    def bounce_buffer(self) -> np.ndarray:
        """Nothing: an empty array."""
        return np.empty(0, np.uint8)

    def extents(self, moe_layer: int, expert: int) -> list[Extent]:
        """The ranges that are fetched for one expert, one read each."""
        layer = self._layers[moe_layer]
        first = layer.data_offset + expert * layer.block_bytes
        ranges = part_ranges(layer.block_bytes, self._parts[moe_layer])
        return [Extent(self._folder / layer.file, first + begin, end - begin) for begin, end in ranges]

    def parts(self, moe_layer: int, expert: int) -> int:
        """Into how many parts, read independently of each other, the expert is cut."""
        return self._parts[moe_layer]

    def read_part(self, moe_layer: int, expert: int, part: int, slot: np.ndarray, bounce: np.ndarray) -> int:
        """Read one part of a block to its place in ``slot`` (uint8, page-aligned); returns the bytes fetched.

        Raises
        ------
        ReadError
            A file changed under us, a read failed, or the block is not what was packed; the slot is then undefined.
        """
        layer = self._layers[moe_layer]
        file, offset, nbytes = self.extents(moe_layer, expert)[part]
        first = offset - layer.data_offset - expert * layer.block_bytes
        self.reader.read(file, offset, nbytes, slot[first : first + nbytes])
        held = self._held[moe_layer]
        if self._check == Check.ALWAYS or (self._check == Check.FIRST and not held[expert, part]):
            self._hold(layer, expert, part, slot[first : first + nbytes])
            held[expert, part] = True
        return nbytes

    def _hold(self, layer: PackedLayer, expert: int, part: int, data: np.ndarray) -> None:
        quick = layer.part_checksum(expert, part)
        if (quick_checksum(data) == quick) if quick is not None else (checksum(data) == layer.checksums[expert]):
            return
        raise ReadError(
            message(
                "A block of the packed store is not what was packed.",
                where=f"{self._folder / layer.file}, expert {expert}",
                step=_DAMAGED,
            )
        )

    def close(self) -> None:
        """Close the files."""
        self.reader.close()
