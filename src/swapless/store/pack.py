"""Write a packed store: layer after layer, a file each, so that a run that was killed goes on where the last whole file ends.

A journal keeps the checksums of what is whole until the manifest, written last, takes its place. What an expert's block is made
of is decided by the caller, who knows models; this file knows files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from swapless.errors import PackMismatchError, UsageError, message
from swapless.manifest import write_json
from swapless.store.packed import FORMAT_VERSION, JOURNAL, MANIFEST, Manifest, PackedLayer, block_file_header, read_manifest
from swapless.store.read import aligned_buffer
from swapless.store.write import FileWriter, write_error

Report = Callable[[int], None]
"""Told the bytes read and written since the last call."""


class DenseTensor(NamedTuple):
    """A tensor that is no expert: its ``key``, safetensors ``dtype`` and ``shape``, and its bytes piece by piece."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    chunks: Callable[[], Iterable[np.ndarray]]


@dataclass(frozen=True, slots=True)
class Source:
    """Where blocks come from.

    ``read(moe_layer, expert, slot)`` fills ``slot`` (uint8, aligned, ``slot_bytes``) with an expert of the checkpoint and
    returns the bytes read; ``convert(moe_layer, slot, block)`` makes a block of it. They are called from different threads,
    for different experts at once.
    """

    slot_bytes: int
    read: Callable[[int, int, np.ndarray], int]
    convert: Callable[[int, np.ndarray, np.ndarray], None]


@dataclass(slots=True)
class Packing:
    """A packed store in the making, in ``folder``, made by :meth:`begin`."""

    folder: Path
    options: Mapping[str, Any]
    done: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def begin(cls, folder: Path, options: Mapping[str, Any]) -> Packing:
        """Start in ``folder``, or go on with what is there; ``options`` tell the source and how it is packed.

        Raises
        ------
        PackMismatchError
            The folder holds a packed store, whole or not, of another source or packed in another way.
        UsageError
            The folder holds something else.
        WriteError
            It cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(error, folder, 0) from error
        packing = cls(folder, dict(options))
        if (folder / MANIFEST).is_file():
            manifest = read_manifest(folder)
            packing._require({"identity": manifest.source["identity"]} | {name: getattr(manifest, name) for name in _PRECISION})
            (folder / JOURNAL).unlink(missing_ok=True)  # of a run that was killed between the two
        elif (folder / JOURNAL).is_file():
            journal = _read_journal(folder / JOURNAL)
            packing._require(journal["options"])
            packing.done = journal["done"]
        elif any(not file.match(_FIRST_JOURNAL) for file in folder.iterdir()):
            raise UsageError(
                message("The folder for the packed store holds something else.", got=folder, step="Give a new one.")
            )
        else:
            packing._journal()  # before anything else, so that a folder that a killed run left is known as one
        for stale in folder.glob(".*.part"):
            stale.unlink()
        return packing

    @property
    def finished(self) -> bool:
        """Whether the manifest is there already."""
        return (self.folder / MANIFEST).is_file()

    def _require(self, found: Mapping[str, Any]) -> None:
        different = [name for name in ("identity", *_PRECISION) if found.get(name) != self.options[name]]
        if different:
            raise PackMismatchError(
                message(
                    "The folder holds a packed store of another checkpoint, or packed in another way.",
                    where=self.folder,
                    got=", ".join(f"{name} {found.get(name)}" for name in different),
                    allowed=", ".join(f"{name} {self.options[name]}" for name in different),
                    step="Give another --out, or remove the folder.",
                )
            )

    def layer(self, number: int, layer: PackedLayer, num_experts: int, source: Source, report: Report) -> PackedLayer:
        """Write the blocks of one MoE layer, unless they are there; returns ``layer`` with their place and checksums."""
        header = block_file_header(self.options["identity"], number, num_experts, layer.block_bytes)
        nbytes = len(header) + num_experts * layer.block_bytes
        if not self._has(layer.file, nbytes):
            with FileWriter(self.folder / layer.file, nbytes) as writer:
                writer.write(np.frombuffer(header, np.uint8))
                checksums = _write_blocks(writer, number, num_experts, layer.block_bytes, source, report)
                writer.commit()
            self._note(layer.file, checksums)
        else:
            report(nbytes)
        return replace(layer, data_offset=len(header), checksums=tuple(self.done[layer.file]))

    def dense(self, name: str, tensors: Sequence[DenseTensor], report: Report) -> None:
        """Write a safetensors file of tensors that are no experts, unless it is there."""
        header = _safetensors_header(tensors)
        nbytes = len(header) + sum(tensor.nbytes for tensor in tensors)
        if self._has(name, nbytes):
            report(nbytes)
            return

        def chunks() -> Iterator[np.ndarray]:
            yield np.frombuffer(header, np.uint8)
            for tensor in tensors:
                yield from tensor.chunks()

        self._file(name, nbytes, chunks(), report)

    def copy(self, file: Path) -> None:
        """Copy a small file of the checkpoint, unless it is there."""
        data = file.read_bytes()
        if not self._has(file.name, len(data)):
            self._file(file.name, len(data), [np.frombuffer(data, np.uint8)], lambda nbytes: None)

    def finish(self, manifest: Manifest) -> None:
        """Write the manifest: from now on the store is whole."""
        try:
            write_json(self.folder / MANIFEST, manifest.to_dict())
            (self.folder / JOURNAL).unlink(missing_ok=True)
        except OSError as error:
            raise write_error(error, self.folder / MANIFEST, 0) from error

    def _file(self, name: str, nbytes: int, chunks: Iterable[np.ndarray], report: Report) -> None:
        digest = hashlib.sha256()
        with FileWriter(self.folder / name, nbytes) as writer:
            for chunk in chunks:
                digest.update(chunk.data)
                writer.write(chunk)
                report(len(chunk))
            writer.commit()
        self._note(name, {"bytes": nbytes, "sha256": digest.hexdigest()})

    def _has(self, name: str, nbytes: int) -> bool:
        file = self.folder / name
        return name in self.done and file.is_file() and file.stat().st_size == nbytes

    def _note(self, name: str, what: Any) -> None:
        self.done[name] = what
        self._journal()

    def _journal(self) -> None:
        try:
            write_json(
                self.folder / JOURNAL, {"format_version": FORMAT_VERSION, "options": dict(self.options), "done": self.done}
            )
        except OSError as error:
            raise write_error(error, self.folder / JOURNAL, 0) from error


_PRECISION = ("bits", "group", "dense_bits")
_FIRST_JOURNAL = f".{JOURNAL}.*.part"
"""A journal that a killed run had not yet given its name."""


def _read_journal(path: Path) -> dict[str, Any]:
    try:
        journal: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = {"options": dict(journal["options"]), "done": dict(journal["done"])}
        version = journal.get("format_version")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PackMismatchError(
            message("The journal of an unfinished packed store is malformed.", where=path, step="Remove the folder.")
        ) from error
    if version != FORMAT_VERSION:
        raise PackMismatchError(
            message(
                "The unfinished packed store is of another version of the format.",
                where=path,
                got=version,
                allowed=FORMAT_VERSION,
                step="Remove the folder.",
            )
        )
    return known


def _write_blocks(
    writer: FileWriter, moe_layer: int, num_experts: int, block_bytes: int, source: Source, report: Report
) -> list[str]:
    """Read the next expert, and write the last one and hash it, while this one is converted: two slots, two blocks."""
    slots = [aligned_buffer(source.slot_bytes) for _ in range(2)]
    blocks = [aligned_buffer(block_bytes)[:block_bytes] for _ in range(2)]
    checksums: list[str] = []

    def checksum(block: np.ndarray) -> str:
        return hashlib.sha256(block.data).hexdigest()

    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as scribe, ThreadPoolExecutor(1) as notary:
        reading: Future[int] = reader.submit(source.read, moe_layer, 0, slots[0])
        last: list[Future[Any]] = []  # of the block before: its writing and its checksum
        for expert in range(num_experts):
            fetched = reading.result()
            if expert + 1 < num_experts:
                reading = reader.submit(source.read, moe_layer, expert + 1, slots[(expert + 1) % 2])
            block = blocks[expert % 2]
            source.convert(moe_layer, slots[expert % 2], block)
            checksums += [future.result() for future in last][1:]
            last = [scribe.submit(writer.write, block), notary.submit(checksum, block)]
            report(fetched + block_bytes)
        checksums += [future.result() for future in last][1:]
    return checksums


def _safetensors_header(tensors: Sequence[DenseTensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        entries[tensor.key] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    length = -(-len(text) // 8) * 8
    return length.to_bytes(8, "little") + text.ljust(length)
