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

from swapless.atomic import write_json
from swapless.errors import PackMismatchError, UsageError, message
from swapless.processors import processors
from swapless.store.checkpoint import FetchedPart
from swapless.store.packed import FORMAT_VERSION, JOURNAL, MANIFEST, Manifest, PackedLayer, block_file_header, read_manifest
from swapless.store.read import aligned_buffer, buffer_bytes
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
    """Where blocks come from: ``fetch(moe_layer, expert, bounce)`` reads an expert into ``bounce`` (``bounce_bytes``).

    It is called from one thread while what it fetched is placed on others. The largest expert has ``expert_bytes``.
    """

    expert_bytes: int
    bounce_bytes: int
    fetch: Callable[[int, int, np.ndarray], FetchedPart]


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


_AT_ONCE = 4
"""Experts on their way at once: while one is read, others are rounded, hashed or written."""

_SMALL_BYTES = 64 << 20
"""In so much memory all of them may be, however small an expert is beside its buffers."""


def _write_blocks(
    writer: FileWriter, moe_layer: int, num_experts: int, block_bytes: int, source: Source, report: Report
) -> list[str]:
    """Write a block an expert, in order, and return their checksums.

    One thread does nothing but read, so that the disk never waits for a processor, and one nothing but write. There are
    buffers for two experts, and for more as long as all of them are no larger than four experts of the checkpoint, or than
    64 MiB where those are small.
    """
    each_bytes = buffer_bytes(source.bounce_bytes) + buffer_bytes(block_bytes)
    at_once = min(_AT_ONCE, num_experts, max(2, max(_SMALL_BYTES, 4 * source.expert_bytes) // each_bytes))
    bounces = [aligned_buffer(source.bounce_bytes) for _ in range(at_once)]
    blocks = [aligned_buffer(block_bytes)[:block_bytes] for _ in range(at_once)]
    for block in blocks:
        block[:] = 0

    with (
        ThreadPoolExecutor(1) as scribe,
        ThreadPoolExecutor(1) as reader,
        ThreadPoolExecutor(min(at_once, processors())) as workers,
    ):

        def fetch(expert: int) -> Future[FetchedPart]:
            return reader.submit(source.fetch, moe_layer, expert, bounces[expert % at_once])

        def make(expert: int) -> tuple[int, str]:
            fetched, block = fetching[expert].result(), blocks[expert % at_once]
            fetched.place(block)
            if expert + at_once < num_experts:  # its bounce buffer is free now
                fetching[expert + at_once] = fetch(expert + at_once)
            return fetched.nbytes, hashlib.sha256(block.data).hexdigest()

        fetching = {expert: fetch(expert) for expert in range(at_once)}
        making = {expert: workers.submit(make, expert) for expert in range(at_once)}
        writing: list[Future[None]] = []
        checksums = []
        for expert in range(num_experts):
            nbytes, checksum = making[expert].result()
            writing.append(scribe.submit(writer.write, blocks[expert % at_once]))
            checksums.append(checksum)
            report(nbytes + block_bytes)
            if expert:  # the block before is free as soon as it is written
                writing[expert - 1].result()
                if expert - 1 + at_once < num_experts:
                    making[expert - 1 + at_once] = workers.submit(make, expert - 1 + at_once)
        writing[-1].result()
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
