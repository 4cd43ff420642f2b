"""Whether a packed store still holds the bytes that were packed: every block and file, by code that nothing else uses.

A check that shares code with what it checks shares its mistakes. So this file reads the manifest, the headers and the blocks by
itself, with ordinary reads, and works out from ``docs/formats/packed.md`` where everything must lie.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

import xxhash

from swapless.errors import CheckpointCorruptError, CheckpointMissingError, PackMismatchError, message
from swapless.processors import processors
from swapless.untrusted import Table, parse_json, read_regular

_MANIFEST = "swapless.json"
_DENSE = "model.safetensors"
_VERSIONS = (2, 3)
_MOST_BYTES = 32 << 20
_READ_BYTES = 4 << 20
_AT_ONCE = 4
_AGAIN = "Pack the checkpoint again."
_TYPES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_BITS_OF = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}


class Checked(NamedTuple):
    """One block or file: its name, how many bytes were read, and whether they are what was packed."""

    what: str
    nbytes: int
    holds: bool


@dataclass(frozen=True)
class _Layer:
    """Where the blocks of one MoE layer lie, their checksums, and the bytes of a block that must be zero."""

    file: Path
    first: int
    size: int
    checksums: list[str]
    parts: list[str]
    gaps: list[tuple[int, int]]


def verify_packed(folder: Path) -> Iterator[Checked]:
    """Yield what every block and every other file of a packed store came to.

    Raises
    ------
    CheckpointMissingError
        A file cannot be read.
    CheckpointCorruptError
        The store is unfinished, or its manifest, a header or the size of a file is wrong: then nothing in it has a place.
    PackMismatchError
        Another version of the format, or a file of another store.
    """
    table = _manifest(folder)
    identity = table.table("source").text("identity", pattern="[0-9a-f]{64}")
    group, version = table.integer("group"), table.integer("format_version")
    rows = table.tables("moe_layers", minimum=1)
    layers = [_layer(folder, row, number, group, identity, version) for number, row in enumerate(rows)]
    with ThreadPoolExecutor(min(_AT_ONCE, max(2, processors()))) as threads:
        for layer in layers:
            yield from _blocks(layer, threads)
    files = table.table("files")
    for name in files:
        entry = files.table(name)
        file, size = _inside(folder, name), entry.integer("bytes")
        if _size(file) != size:
            _refuse(file, f"{_size(file)} bytes", f"{size} bytes")
        digest = hashlib.sha256()
        for chunk in _chunks(file, 0, size):
            digest.update(chunk)
        holds = digest.hexdigest() == entry.text("sha256")
        yield Checked(name, size, holds and (name != _DENSE or version == 2 or _tensors_hold(file, table)))


def stored_bytes(folder: Path) -> int:
    """Bytes of all files of the store, for progress."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def _manifest(folder: Path) -> Table:
    path = folder / _MANIFEST
    if not path.is_file():
        raise CheckpointCorruptError(
            message("The packed store is not finished.", where=folder, got=f"no {_MANIFEST}", step="Run the same pack again.")
        )
    try:
        raw = read_regular(path, error=CheckpointCorruptError, what="manifest", max_bytes=_MOST_BYTES)
    except OSError as error:
        raise CheckpointMissingError(message("A file cannot be read.", where=path, got=error.strerror)) from error
    table = Table(parse_json(raw, where=path, what="manifest"), where=path)
    version = table.integer("format_version")
    if version not in _VERSIONS:
        raise PackMismatchError(
            message("The packed store is of another version of the format.", where=path, got=version, allowed="3", step=_AGAIN)
        )
    if version > 2:
        seal = table.text("checksum", pattern="[0-9a-f]{64}").encode()
        if raw.count(seal) != 1 or hashlib.sha256(raw.replace(seal, b"0" * 64)).hexdigest().encode() != seal:
            _refuse(path, "another checksum than its own", "the bytes that were written")
    return table


def _layer(folder: Path, row: Table, number: int, group: int, identity: str, version: int) -> _Layer:
    size, first = row.integer("block_bytes", minimum=4096), row.integer("data_offset", minimum=4096)
    checksums = row.texts("checksums", least=1, maximum=64)
    parts = row.texts("part_checksums", least=len(checksums), most=len(checksums)) if version > 2 else []
    if size % 4096 or first % 4096:
        _refuse(row.where, f"{size} and {first}", "blocks and a first byte at multiples of 4096")
    file = _inside(folder, row.text("file"))
    if _size(file) != first + size * len(checksums):
        _refuse(file, f"{_size(file)} bytes", f"{first + size * len(checksums)} bytes")
    header = parse_json(_head(file, first), where=file, what="header of blocks")
    wanted: dict[str, object] = {"__metadata__": {"format": "swapless", "source": identity, "moe_layer": str(number)}}
    for expert in range(len(checksums)):
        wanted[f"experts.{expert}"] = {"dtype": "U8", "shape": [size], "data_offsets": [size * expert, size * (expert + 1)]}
    if header != wanted:
        raise PackMismatchError(message("A file of another packed store lies in this one.", where=file, step=_AGAIN))
    taken = sorted(_piece(piece, group) for piece in row.tables("pieces", minimum=1))
    gaps, end = [], 0
    for begin, last in taken:
        if begin < end or begin % 64:
            _refuse(row.where, f"a piece from byte {begin} on", f"none before byte {end}, and at a multiple of 64")
        gaps.append((end, begin))
        end = last
    if not 0 <= size - end < 4096:
        _refuse(row.where, f"blocks of {size} bytes", f"the {end} that their pieces take, in whole pages")
    return _Layer(file, first, size, checksums, parts, [gap for gap in (*gaps, (end, size)) if gap[0] < gap[1]])


def _piece(piece: Table, group: int) -> tuple[int, int]:
    """First byte of a piece and the one behind it."""
    bits, shape = piece.integer("bits"), piece.integers("shape", minimum=1, least=1, most=8)
    if bits == 16:
        nbytes = _TYPES[piece.text("dtype", choices=tuple(_TYPES))]
        for side in shape:
            nbytes *= side
    elif bits in (4, 8) and len(shape) == 2:
        nbytes = matrix_bytes(shape[0], shape[1], bits, group)
    else:
        piece.refuse("bits", "16, or 8 and 4 of a matrix")
    if piece.integer("nbytes") != nbytes:
        piece.refuse("nbytes", f"{nbytes}, by its shape")
    begin = piece.integer("offset")
    return begin, begin + nbytes


def matrix_bytes(rows: int, columns: int, bits: int, group: int) -> int:
    """Bytes of a quantised matrix: values, scales and zeros, each filled up to a multiple of 64."""
    high = (rows + 31) // 32 * 32
    if bits == 8:
        wide = (columns + 31) // 32 * 32
        return high * wide + _up(4 * high)
    wide = (columns + group - 1) // group * group
    groups = wide // group
    return _up(high * wide // 2) + _up(2 * high * groups) + _up(high * groups // 2)


def _up(nbytes: int) -> int:
    return (nbytes + 63) // 64 * 64


def _blocks(layer: _Layer, threads: ThreadPoolExecutor) -> Iterator[Checked]:
    waiting: list[Future[bool]] = []
    count = len(layer.checksums)
    for expert in range(count + _AT_ONCE):
        if expert < count:
            waiting.append(threads.submit(_block_holds, layer, expert))
        if expert >= _AT_ONCE:
            done = expert - _AT_ONCE
            yield Checked(f"{layer.file.name}, expert {done}", layer.size, waiting[done].result())


def _block_holds(layer: _Layer, expert: int) -> bool:
    block = b"".join(_chunks(layer.file, layer.first + expert * layer.size, layer.size))
    if hashlib.sha256(block).hexdigest() != layer.checksums[expert]:
        return False
    if any(block[begin:end].strip(b"\0") for begin, end in layer.gaps):
        return False
    if not layer.parts:
        return True
    digits = layer.parts[expert]
    count, pages = len(digits) // 16, layer.size // 4096
    edges = [pages * part // max(1, count) * 4096 for part in range(count + 1)]
    sums = [xxhash.xxh3_64(block[begin:end]).hexdigest() for begin, end in itertools.pairwise(edges)]
    return count > 0 and "".join(sums) == digits


def _tensors_hold(file: Path, table: Table) -> bool:
    """Whether each tensor that is no expert is the one that its quick checksum is of; a wrong header is refused."""
    head = _head(file, _READ_BYTES, whole=False)
    header = Table(parse_json(head, where=file, what="header"), where=file)
    names = [key for key in header if key != "__metadata__"]
    sums, dense = table.table("tensors"), table.table("dense")
    if sorted(names) != sorted(sums):
        raise PackMismatchError(message("The store holds other weights than its manifest says.", where=file, step=_AGAIN))
    first, holds = 8 + len(head), True
    for name in names:
        entry = header.table(name)
        begin, end = entry.integers("data_offsets", least=2, most=2)
        nbytes = _BITS_OF.get(entry.text("dtype"), 8) // 8
        for side in entry.integers("shape", most=64):
            nbytes *= side
        if name in dense:
            rows, columns = dense.table(name).integers("shape", minimum=1, least=2, most=2)
            nbytes = matrix_bytes(rows, columns, table.integer("dense_bits"), table.integer("group"))
        if end - begin != nbytes or first + end > _size(file):
            _refuse(f"{name} in {file}", f"{end - begin} bytes", f"{nbytes} bytes within the file")
        quick = xxhash.xxh3_64()
        for chunk in _chunks(file, first + begin, nbytes):
            quick.update(chunk)
        holds &= quick.hexdigest() == sums.text(name)
    return holds


def _head(file: Path, most: int, *, whole: bool = True) -> bytes:
    """The JSON text at the head of a safetensors file; with ``whole`` it and its length fill ``most`` bytes."""
    length = int.from_bytes(b"".join(_chunks(file, 0, 8)), "little")
    if length > 100_000_000 or 8 + length > _size(file) or (whole and 8 + length != most):
        _refuse(file, f"a header of {length} bytes", f"{most - 8} bytes" if whole else "one that is in the file")
    return b"".join(_chunks(file, 8, length))


def _chunks(file: Path, first: int, nbytes: int) -> Iterator[bytes]:
    try:
        with open(file, "rb", buffering=0) as opened:
            opened.seek(first)
            left = nbytes
            while left:
                chunk = opened.read(min(left, _READ_BYTES))
                if not chunk:
                    _refuse(file, f"an end {left} bytes too soon", "as many bytes as when it was opened")
                left -= len(chunk)
                yield chunk
            if hasattr(os, "posix_fadvise"):  # what was read once need not stay in memory
                os.posix_fadvise(opened.fileno(), first, nbytes, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise CheckpointMissingError(message("A file cannot be read.", where=file, got=error.strerror)) from error


def _inside(folder: Path, name: str) -> Path:
    if Path(name).name != name or name in ("", ".", ".."):
        _refuse(folder / _MANIFEST, repr(name), "the name of a file in the folder itself")
    return folder / name


def _size(file: Path) -> int:
    """Bytes of a regular file; -1 where there is none."""
    return file.stat().st_size if file.is_file() else -1


def _refuse(where: object, got: str, allowed: str) -> NoReturn:
    raise CheckpointCorruptError(
        message("The packed store is not as its manifest says.", where=where, got=got, allowed=allowed, step=_AGAIN)
    )
