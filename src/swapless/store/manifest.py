"""The manifest of a packed store, ``swapless.json``: what it says, and the schema it must pass before a byte is addressed.

What follows from something else is computed and compared, never taken: where a piece lies in its block, how large a block is,
where the data of a file begin. So a manifest that passes cannot name a byte outside its block, nor the same byte twice.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from swapless.errors import CheckpointCorruptError, PackMismatchError, message
from swapless.store.checkpoint import SLOT_ALIGNMENT
from swapless.store.checksum import QUICK_DIGITS
from swapless.store.matrix import BITS, GROUPS, MatrixLayout
from swapless.store.read import BLOCK_BYTES
from swapless.untrusted import Table, parse_json, shown

MANIFEST = "swapless.json"
JOURNAL = ".swapless-pack.json"
LOCK = ".swapless-pack.lock"
DENSE = "model.safetensors"
CONFIG = "config.json"
FORMAT_VERSION = 3
READABLE_VERSIONS = (2, 3)

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Types that pieces of 16 bits may have, by torch's names."""

MOST_BYTES = 32 << 20
"""The largest manifest that is read; 23,000 experts take 5 MB."""

AGAIN = "Pack the checkpoint again."
_PART_BYTES = 3 << 20
_MOST_PARTS = 16
_MOST_SIDE = 1 << 31
_SHA256 = r"[0-9a-f]{64}"
_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
_PATH = r"[A-Za-z0-9_.]+"
_SEAL = re.compile(rb'"checksum": "([0-9a-f]{64})"')


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
    ``part_checksums`` are, by expert, quick checksums of the parts that a block is read in, one after the other in one text;
    stores of version 2 have none.
    """

    path: str
    block: int
    file: str
    data_offset: int
    block_bytes: int
    pieces: tuple[Piece, ...]
    checksums: tuple[str, ...]
    part_checksums: tuple[str, ...] = ()

    @property
    def num_experts(self) -> int:
        """Blocks of the file."""
        return len(self.checksums)

    @property
    def parts(self) -> int:
        """Into how many parts, each with a checksum, a block is cut; without such checksums, into how many reads."""
        return len(self.part_checksums[0]) // QUICK_DIGITS if self.part_checksums else block_parts(self.block_bytes)

    def part_checksum(self, expert: int, part: int) -> str | None:
        """The quick checksum of a part of a block; None where there is none."""
        if not self.part_checksums:
            return None
        return self.part_checksums[expert][part * QUICK_DIGITS : (part + 1) * QUICK_DIGITS]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a packed store holds: precision, source, layers, and checksums of all files that are no experts.

    ``source`` has the source's ``name`` and ``identity`` (:func:`~swapless.store.packed.checkpoint_identity`); ``files`` map a
    name to its ``bytes`` and ``sha256``; ``dtype`` is the type that the checkpoint computes in. ``tensors`` maps each tensor of
    ``model.safetensors`` to its quick checksum (empty in version 2). ``dense`` names those of them that are quantised matrices
    in ``dense_bits``, each with the ``module`` that it is the weight of and its ``shape``.
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
    tensors: Mapping[str, str] = field(default_factory=dict)
    perplexity: Mapping[str, Any] | None = None
    format_version: int = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the version of the format first; what was not measured is left out."""
        document = {"format_version": self.format_version} | asdict(self)
        if self.perplexity is None:
            del document["perplexity"]
        if self.format_version == 2:
            del document["tensors"]
            for layer in document["moe_layers"]:
                del layer["part_checksums"]
        return document

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


def block_parts(block_bytes: int) -> int:
    """Into how many parts a block of this size is cut."""
    return max(1, min(4, round(block_bytes / _PART_BYTES)))


def part_ranges(block_bytes: int, parts: int) -> list[tuple[int, int]]:
    """First and last byte of each of so many parts of a block, all of whole pages."""
    pages = block_bytes // BLOCK_BYTES
    return list(pairwise(pages * part // parts * BLOCK_BYTES for part in range(parts + 1)))


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


def block_file_name(moe_layer: int) -> str:
    """Name of the file with the blocks of a MoE layer."""
    return f"experts-{moe_layer:05d}.safetensors"


def sealed(document: Mapping[str, Any]) -> bytes:
    """``document`` as JSON, with a last key ``checksum``: SHA-256 of all these bytes, where its own digits are zeros."""
    empty = "0" * 64
    raw = (json.dumps(dict(document) | {"checksum": empty}, indent=2) + "\n").encode()
    digest = hashlib.sha256(raw).hexdigest()
    return raw[: raw.rindex(empty.encode())] + digest.encode() + raw[raw.rindex(empty.encode()) + 64 :]


def manifest_bytes(manifest: Manifest) -> bytes:
    """``manifest`` as it stands in its file: sealed, unless it is of a version that had no checksum."""
    if manifest.format_version > 2:
        return sealed(manifest.to_dict())
    return (json.dumps(manifest.to_dict(), indent=2) + "\n").encode()


def seal_holds(raw: bytes) -> bool:
    """Whether the bytes of a JSON document are those that :func:`sealed` made."""
    found = list(_SEAL.finditer(raw))
    if not found:
        return False
    first, last = found[-1].span(1)
    return hashlib.sha256(raw[:first] + b"0" * 64 + raw[last:]).hexdigest().encode() == found[-1][1]


def parse_manifest(raw: bytes, where: Path) -> Manifest:
    """The manifest in the bytes of ``swapless.json`` at ``where``, every value of it checked.

    Raises
    ------
    CheckpointCorruptError
        No such manifest: a value that cannot be, or bytes that are not those that were written.
    PackMismatchError
        Another version of the format.
    """
    try:
        table = Table(parse_json(raw, where=where), where=where)
        version = table.integer("format_version", minimum=1)
        if version not in READABLE_VERSIONS:
            raise PackMismatchError(
                message(
                    "The packed store is of another version of the format.",
                    where=where,
                    got=version,
                    allowed=FORMAT_VERSION,
                    step=AGAIN,
                )
            )
        if version > 2 and not seal_holds(raw):
            raise CheckpointCorruptError(message("It is not as it was written: its checksum differs.", where=where))
        return _manifest(table, version)
    except CheckpointCorruptError as error:
        raise CheckpointCorruptError(f"The manifest of a packed store is malformed. {error} {AGAIN}") from error


def _manifest(table: Table, version: int) -> Manifest:
    newer = ("tensors", "checksum") if version > 2 else ()
    table.only(
        *("format_version", "bits", "group", "dense_bits", "dtype", "source", "moe_layers", "files", "dense", "perplexity"),
        *newer,
    )
    bits, group = _one_of(table, "bits", BITS), _one_of(table, "group", GROUPS)
    dense_bits = _one_of(table, "dense_bits", BITS)
    source = table.table("source")
    source.only("name", "identity")
    identity = source.text("identity", pattern=_SHA256)
    layers = tuple(
        _layer(layer, number, bits, group, identity, version)
        for number, layer in enumerate(table.tables("moe_layers", minimum=1, maximum=10_000))
    )
    for key in ("path", "block"):
        if len({getattr(layer, key) for layer in layers}) < len(layers):
            table.refuse("moe_layers", f"layers that each have a {key} of their own")
    return Manifest(
        bits=bits,
        group=group,
        dense_bits=dense_bits,
        dtype=table.text("dtype", choices=tuple(DTYPE_BYTES)),
        source={"name": source.text("name", maximum=1000), "identity": identity},
        moe_layers=layers,
        files=_files(table.table("files"), {layer.file for layer in layers}),
        dense=_dense(table.table("dense"), dense_bits),
        tensors=_texts(table.table("tensors"), rf"[0-9a-f]{{{QUICK_DIGITS}}}") if version > 2 else {},
        perplexity=_perplexity(table.table("perplexity")) if "perplexity" in table else None,
        format_version=version,
    )


def _layer(table: Table, number: int, bits: int, group: int, identity: str, version: int) -> PackedLayer:
    newer = ("part_checksums",) if version > 2 else ()
    table.only("path", "block", "file", "data_offset", "block_bytes", "pieces", "checksums", *newer)
    checksums = _all_like(table, "checksums", _SHA256, table.texts("checksums", least=1, maximum=64))
    pieces, end = [], 0
    for piece in table.tables("pieces", minimum=1, maximum=64):
        pieces.append(_piece(piece, bits, group, -(-end // SLOT_ALIGNMENT) * SLOT_ALIGNMENT))
        end = pieces[-1].offset + pieces[-1].nbytes
    names = [piece.name for piece in pieces]
    if sum(a != b for a, b in pairwise(names)) + 1 != len(set(names)):
        table.refuse("pieces", "pieces of one name one after the other")
    block_bytes = _exactly(table, "block_bytes", -(-end // BLOCK_BYTES) * BLOCK_BYTES)
    data_offset = _exactly(
        table, "data_offset", len(block_file_header(identity, number, len(checksums), block_bytes)), "by its experts"
    )
    parts: list[str] = []
    if version > 2:
        parts = table.texts("part_checksums", least=len(checksums), most=len(checksums), maximum=_MOST_PARTS * QUICK_DIGITS)
        count = len(parts[0]) // QUICK_DIGITS
        if not 1 <= count <= block_bytes // BLOCK_BYTES:
            table.refuse("part_checksums", f"{QUICK_DIGITS} digits a part, and no part without a page")
        _all_like(table, "part_checksums", rf"[0-9a-f]{{{count * QUICK_DIGITS}}}", parts)
    return PackedLayer(
        path=table.text("path", pattern=_PATH, maximum=1000),
        block=table.integer("block", maximum=1_000_000),
        file=table.text("file", choices=(block_file_name(number),)),
        data_offset=data_offset,
        block_bytes=block_bytes,
        pieces=tuple(pieces),
        checksums=tuple(checksums),
        part_checksums=tuple(parts),
    )


def _piece(table: Table, bits: int, group: int, offset: int) -> Piece:
    table.only("name", "bits", "dtype", "shape", "offset", "nbytes")
    own = _one_of(table, "bits", tuple(sorted({16, bits})))
    if own == 16:
        dtype = table.text("dtype", choices=tuple(DTYPE_BYTES))
        shape = table.integers("shape", minimum=1, maximum=_MOST_SIDE, least=1, most=8)
        nbytes = DTYPE_BYTES[dtype]
        for side in shape:
            nbytes *= side
    else:
        dtype = table.text("dtype", choices=(f"int{own}",))
        shape = table.integers("shape", minimum=1, maximum=_MOST_SIDE, least=2, most=2)
        nbytes = MatrixLayout(rows=shape[0], columns=shape[1], bits=own, group=group).nbytes
    return Piece(
        name=table.text("name", pattern=_NAME, maximum=100),
        bits=own,
        dtype=dtype,
        shape=tuple(shape),
        offset=_exactly(table, "offset", offset, "behind the piece before it"),
        nbytes=_exactly(table, "nbytes", nbytes, "by its shape"),
    )


def _files(table: Table, taken: set[str]) -> dict[str, dict[str, Any]]:
    found = {}
    for name in table:
        if not is_plain_name(name) or name in taken | {MANIFEST, JOURNAL, LOCK}:
            table.refuse(name, "the name of a file in the folder itself that is no file of experts")
        entry = table.table(name)
        entry.only("bytes", "sha256")
        found[name] = {"bytes": entry.integer("bytes"), "sha256": entry.text("sha256", pattern=_SHA256)}
    for name in (CONFIG, DENSE):
        if name not in found:
            table.table(name)  # refuses what is not there
    return found


def is_plain_name(name: str) -> bool:
    """Whether ``name`` is that of a file in a folder, and leads nowhere else."""
    return name not in ("", ".", "..") and len(name) <= 255 and "/" not in name and "\\" not in name and name.isprintable()


def _dense(table: Table, dense_bits: int) -> dict[str, dict[str, Any]]:
    found = {}
    for key in table:
        if dense_bits == 16:
            table.refuse(key, "nothing, where dense_bits are 16")
        entry = table.table(key)
        entry.only("module", "shape")
        shape = entry.integers("shape", minimum=1, maximum=_MOST_SIDE, least=2, most=2)
        found[key] = {"module": entry.text("module", pattern=_PATH, maximum=1000), "shape": shape}
    if len({entry["module"] for entry in found.values()}) < len(found):
        table.refuse(next(iter(found)), "a module of its own for each")
    return found


def _perplexity(table: Table) -> dict[str, Any]:
    table.only("original", "packed", "tokens", "context_tokens", "text_sha256")
    found: dict[str, Any] = {key: table.number(key, minimum=1.0) for key in ("original", "packed")}
    found |= {key: table.integer(key, minimum=1) for key in ("tokens", "context_tokens") if key in table}
    return found | {key: table.text(key, pattern=rf"({_SHA256})?") for key in ("text_sha256",) if key in table}


def _texts(table: Table, pattern: str) -> dict[str, str]:
    return {key: table.text(key, pattern=pattern) for key in table}


def _one_of(table: Table, key: str, choices: Sequence[int]) -> int:
    value = table.integer(key)
    if value not in choices:
        table.refuse(key, ", ".join(map(str, choices)))
    return value


def _exactly(table: Table, key: str, wanted: int, why: str = "by its pieces") -> int:
    if table.integer(key) != wanted:
        table.refuse(key, f"{wanted}, {why}")
    return wanted


def _all_like(table: Table, key: str, pattern: str, values: list[str]) -> list[str]:
    like = re.compile(pattern)
    for value in values:
        if not like.fullmatch(value):
            table.refuse(key, f"texts like {pattern}; one is {shown(value)}")
    return values
