"""A packed store: one page-aligned block an expert, in the form that the kernels consume, and the manifest that says so.

The folder is self-contained: configuration, tokenizer and non-expert weights lie in it as in a checkpoint, each
``experts-*.safetensors`` holds the blocks of one MoE layer, and ``swapless.json``, the manifest, is written last: a folder
without it is not whole. A block goes from the file straight into a slot, without a copy in between. Byte by byte:
``docs/formats/packed.md``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from swapless.atomic import write_json
from swapless.errors import CheckpointCorruptError, PackMismatchError, ReadError, message
from swapless.store.checkpoint import Extent
from swapless.store.headers import find_shards
from swapless.store.matrix import MatrixLayout
from swapless.store.read import BLOCK_BYTES, FileReader
from swapless.store.write import write_error

MANIFEST = "swapless.json"
JOURNAL = ".swapless-pack.json"
DENSE = "model.safetensors"
FORMAT_VERSION = 2

_PART_BYTES = 3 << 20
_SAMPLES = 64
_SAMPLE_BYTES = 4096
_AGAIN = "Pack the checkpoint again."


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One run of bytes of a block: (a part of) a parameter ``name`` at ``offset``.

    With ``bits`` 16 it is an array of ``dtype`` (torch's name of it) and ``shape``. With 8 or 4 it is a quantised matrix, whose
    ``shape`` is (rows, columns) = (outputs, inputs); pieces of one name are its rows, one after the other.
    """

    name: str
    bits: int
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLayer:
    """The experts of one MoE layer: module path, ``block`` of the model, file, and what each of its blocks is made of.

    ``checksums`` are SHA-256 of the blocks, by expert; the first block begins at ``data_offset`` of the file.
    """

    path: str
    block: int
    file: str
    data_offset: int
    block_bytes: int
    pieces: tuple[Piece, ...]
    checksums: tuple[str, ...]

    @property
    def num_experts(self) -> int:
        """Blocks of the file."""
        return len(self.checksums)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a packed store holds: precision, source, layers, and checksums of all files that are no experts.

    ``source`` has the source's ``name`` and ``identity`` (:func:`checkpoint_identity`); ``files`` map a name to its ``bytes``
    and ``sha256``; ``dtype`` is the type that the checkpoint computes in. ``dense`` names the tensors of ``model.safetensors``
    that are quantised matrices in ``dense_bits``, each with the ``module`` that it is the weight of and its ``shape``.
    ``perplexity`` is what the bits cost, where it was measured: ``original`` and ``packed``, over ``tokens`` of the text with
    ``text_sha256``.
    """

    bits: int
    group: int
    dense_bits: int
    dtype: str
    source: Mapping[str, str]
    moe_layers: tuple[PackedLayer, ...]
    files: Mapping[str, Mapping[str, Any]]
    dense: Mapping[str, Mapping[str, Any]]
    perplexity: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the version of the format first; what was not measured is left out."""
        document = {"format_version": FORMAT_VERSION} | asdict(self)
        return {key: value for key, value in document.items() if value is not None}

    def layout(self, piece: Piece) -> MatrixLayout:
        """How a quantised piece lies in memory."""
        return self._matrix(piece.shape, piece.bits)

    def dense_layout(self, key: str) -> MatrixLayout:
        """How a quantised tensor that is no expert lies in memory."""
        return self._matrix(self.dense[key]["shape"], self.dense_bits)

    @property
    def linear_layouts(self) -> dict[str, MatrixLayout]:
        """How the weights of quantised linear layers lie in memory, by the layers' paths."""
        return {entry["module"]: self.dense_layout(key) for key, entry in self.dense.items()}

    def _matrix(self, shape: Sequence[int], bits: int) -> MatrixLayout:
        rows, columns = shape
        return MatrixLayout(rows=rows, columns=columns, bits=bits, group=self.group)


def is_packed(folder: Path) -> bool:
    """Whether ``folder`` is a packed store, finished or not."""
    return (folder / MANIFEST).is_file() or (folder / JOURNAL).is_file()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a packed store, whose files are all there, of their size, and of the same packing.

    Checksums of files and blocks are not looked at: see :func:`~swapless.store.verify.verify_packed`.

    Raises
    ------
    CheckpointCorruptError
        The store is unfinished, its manifest malformed, or a file is missing or of another size.
    PackMismatchError
        A file of another packed store, or another version of the format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointCorruptError(
            message("The packed store is not finished.", where=folder, got=f"no {MANIFEST}", step="Run the same pack again.")
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        version = document.pop("format_version")
        if version != FORMAT_VERSION:
            raise PackMismatchError(
                message(
                    "The packed store is of another version of the format.",
                    where=path,
                    got=version,
                    allowed=FORMAT_VERSION,
                    step=_AGAIN,
                )
            )
        layers = tuple(
            PackedLayer(
                **layer
                | {
                    "pieces": tuple(Piece(**piece | {"shape": tuple(piece["shape"])}) for piece in layer["pieces"]),
                    "checksums": tuple(layer["checksums"]),
                }
            )
            for layer in document.pop("moe_layers")
        )
        manifest = Manifest(**document, moe_layers=layers)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, PackMismatchError):
            raise
        raise CheckpointCorruptError(
            message("The manifest of a packed store is malformed.", where=path, got=repr(error), step=_AGAIN)
        ) from error
    _check_files(folder, manifest)
    return manifest


def note_perplexity(folder: Path, perplexity: Mapping[str, Any]) -> Manifest:
    """Put measured ``perplexity`` (see :class:`Manifest`) into the manifest of a finished store, in place of an older one.

    Raises
    ------
    CheckpointCorruptError, PackMismatchError
        See :func:`read_manifest`.
    WriteError
        No room, or no permission; the manifest is as it was.
    """
    manifest = replace(read_manifest(folder), perplexity=dict(perplexity))
    try:
        write_json(folder / MANIFEST, manifest.to_dict())
    except OSError as error:
        raise write_error(error, folder / MANIFEST, 0) from error
    return manifest


def _check_files(folder: Path, manifest: Manifest) -> None:
    sizes = {name: int(entry["bytes"]) for name, entry in manifest.files.items()}
    sizes |= {layer.file: layer.data_offset + layer.num_experts * layer.block_bytes for layer in manifest.moe_layers}
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            raise CheckpointCorruptError(
                message(
                    "A file of the packed store is missing or of another size.",
                    where=file,
                    got=f"{file.stat().st_size} bytes" if file.is_file() else "no such file",
                    allowed=f"{size} bytes",
                    step=_AGAIN,
                )
            )
    config = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    if config != manifest.files["config.json"]["sha256"]:
        raise PackMismatchError(
            message("config.json is not the one that was packed.", where=folder / "config.json", step=_AGAIN)
        )
    for number, layer in enumerate(manifest.moe_layers):
        with open(folder / layer.file, "rb") as opened:
            header = opened.read(layer.data_offset)
        expected = block_file_header(manifest.source["identity"], number, layer.num_experts, layer.block_bytes)
        if header != expected:
            raise PackMismatchError(
                message("A file of another packed store lies in this one.", where=folder / layer.file, step=_AGAIN)
            )


def block_file_header(identity: str, moe_layer: int, num_experts: int, block_bytes: int) -> bytes:
    """The head of a file of blocks: a safetensors header, padded with spaces so that the data begins at a whole page."""
    entries: dict[str, Any] = {"__metadata__": {"format": "swapless", "source": identity, "moe_layer": str(moe_layer)}}
    for expert in range(num_experts):
        first = expert * block_bytes
        offsets = [first, first + block_bytes]
        entries[f"experts.{expert}"] = {"dtype": "U8", "shape": [block_bytes], "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":")).encode()
    length = -(-(8 + len(text)) // BLOCK_BYTES) * BLOCK_BYTES - 8
    return length.to_bytes(8, "little") + text.ljust(length)


def checkpoint_identity(folder: Path) -> str:
    """What tells a checkpoint from another: SHA-256 over its configuration and, of each shard, name, size and 64 spread pages.

    The first of them holds the header. Cheap for a checkpoint of any size, and a fine-tuned sister of it, with the same header,
    differs in nearly every page.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for shard in find_shards(folder):
        size = shard.stat().st_size
        digest.update(f"{shard.name} {size}\n".encode())
        with open(shard, "rb") as file:
            for place in range(_SAMPLES):
                file.seek(size * place // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def block_parts(block_bytes: int) -> int:
    """Into how many reads a block of this size is cut."""
    return max(1, min(4, round(block_bytes / _PART_BYTES)))


class PackedStore:
    """Experts of a packed store by (moe_layer, expert), read into slots. The same calls as the checkpoint store's.

    Parameters
    ----------
    folder : Path
        The store.
    layers : sequence of PackedLayer
        From its manifest.
    check : bool
        Hold every block against its checksum when it is read.

    Raises
    ------
    CheckpointMissingError
        A file cannot be opened.
    """

    bounce_bytes = 0
    """Blocks need no bounce buffer."""

    def __init__(self, folder: Path, layers: Sequence[PackedLayer], *, check: bool = False) -> None:
        self._folder = folder
        self._layers = list(layers)
        self._check = check
        self.reader = FileReader(sorted({folder / layer.file for layer in layers}))

    def bounce_buffer(self) -> np.ndarray:
        """Nothing: an empty array."""
        return np.empty(0, np.uint8)

    def extents(self, moe_layer: int, expert: int) -> list[Extent]:
        """The ranges that are fetched for one expert, one read each."""
        layer = self._layers[moe_layer]
        count = self.parts(moe_layer, expert)
        pages = layer.block_bytes // BLOCK_BYTES
        cuts = [pages * part // count * BLOCK_BYTES for part in range(count + 1)]
        first = layer.data_offset + expert * layer.block_bytes
        return [Extent(self._folder / layer.file, first + a, b - a) for a, b in pairwise(cuts)]

    def parts(self, moe_layer: int, expert: int) -> int:
        """Into how many parts, read independently of each other, the expert is cut; one where blocks are checked."""
        return 1 if self._check else block_parts(self._layers[moe_layer].block_bytes)

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
        if self._check and hashlib.sha256(slot[:nbytes].data).hexdigest() != layer.checksums[expert]:
            raise ReadError(
                message(
                    "A block of the packed store is not what was packed.",
                    where=f"{file}, expert {expert}",
                    step="Run swapless verify on the folder, and pack the checkpoint again.",
                )
            )
        return nbytes

    def close(self) -> None:
        """Close the files."""
        self.reader.close()
