"""Write a packed store: layer after layer, a file each, so that a run that was killed goes on where the last whole file ends.

A journal keeps the checksums of what is whole until the manifest, written last, takes its place. What an expert's block is made
of is decided by the caller, who knows models; this file knows files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from xxhash import xxh3_64

from swapless.atomic import saying_where, write_whole
from swapless.errors import (
    CheckpointCorruptError,
    CheckpointMissingError,
    PackMismatchError,
    UsageError,
    WriteError,
    message,
)
from swapless.locks import Lock
from swapless.store.checksum import checksum
from swapless.store.kept import file_holds, kept_blocks, kept_tensors
from swapless.store.manifest import (
    DENSE,
    FORMAT_VERSION,
    JOURNAL,
    LOCK,
    MANIFEST,
    MOST_BYTES,
    Manifest,
    PackedLayer,
    block_file_header,
    parse_manifest,
    seal_holds,
    sealed,
)
from swapless.store.packed import read_manifest_bytes, write_manifest
from swapless.store.write import FileWriter
from swapless.store.write_blocks import Report, Source, write_blocks
from swapless.untrusted import Table, parse_json, read_regular


class DenseTensor(NamedTuple):
    """A tensor that is no expert: its ``key``, safetensors ``dtype`` and ``shape``, and its bytes piece by piece."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    chunks: Callable[[], Iterable[np.ndarray]]


@dataclass(slots=True)
class Packing:
    """A packed store in the making, in ``folder``, made by :meth:`begin`. Nobody else packs there until it is closed.

    Attributes
    ----------
    manifest : Manifest or None
        Of a store that is finished already; what it says was not yet compared with the files.
    files : dict
        Bytes and SHA-256 of all files but those of experts that are there by now, each verified or written in this run.
    tensors : dict
        Quick checksums of the tensors that are no experts, likewise.
    perplexity : mapping, optional
        What was measured of a store that is made whole again.
    """

    folder: Path
    options: Mapping[str, Any]
    lock: Lock | None
    manifest: Manifest | None = None
    done: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    perplexity: Mapping[str, Any] | None = None

    @classmethod
    def begin(cls, folder: Path, options: Mapping[str, Any], small_files: Collection[str] = ()) -> Packing:
        """Start in ``folder``, or go on with what is there.

        Parameters
        ----------
        folder : Path
            New, empty, or left by an earlier run.
        options : mapping
            ``identity`` of the source, ``bits``, ``group`` and ``dense_bits``.
        small_files : collection of str
            Names of the files that will be copied: what a killed run left half-written of them is removed.

        Raises
        ------
        LockedError
            Another process packs into the folder.
        PackMismatchError
            The folder holds a packed store, whole or not, of another source or packed in another way.
        CheckpointCorruptError
            It holds a packed store with a damaged manifest.
        UsageError
            It holds something else.
        WriteError
            It cannot be written.
        """
        with saying_where(folder):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = Lock(folder / LOCK, "packing")
        except WriteError:
            if not (folder / MANIFEST).is_file():
                raise
            lock = None  # a finished store in a folder that cannot be written: it can still be found whole
        packing = cls(folder, dict(options), lock)
        try:
            packing._look_around(frozenset(small_files))
        except BaseException:
            packing.close()
            raise
        return packing

    def close(self) -> None:
        """Let others pack into the folder. May be called twice."""
        if self.lock is not None:
            self.lock.release()

    def __enter__(self) -> Packing:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _look_around(self, small_files: frozenset[str]) -> None:
        if (self.folder / MANIFEST).is_file():
            try:
                self.manifest = parse_manifest(read_manifest_bytes(self.folder), self.folder / MANIFEST)
            except CheckpointCorruptError as error:
                raise CheckpointCorruptError(f"{error} Give another --out, or remove the folder first.") from error
            precision = {name: getattr(self.manifest, name) for name in _PRECISION}
            self._require({"identity": self.manifest.source["identity"]} | precision)
        elif (self.folder / JOURNAL).is_file():
            journal = _read_journal(self.folder / JOURNAL)
            self._require(journal["options"])
            self.done = journal["done"]
        elif any(file.name != LOCK and _part_of(file.name) != JOURNAL for file in self.folder.iterdir()):
            raise UsageError(
                message("The folder for the packed store holds something else.", got=self.folder, step="Give a new one.")
            )
        else:
            self._journal()  # before anything else, so that a folder that a killed run left is known as one
        if self.lock is None or not self.lock.held:
            return
        ours = small_files | {MANIFEST, JOURNAL, DENSE}
        for file in list(self.folder.iterdir()):
            whole = _part_of(file.name)
            if whole is not None and (whole in ours or _BLOCK_FILE.fullmatch(whole)):
                with saying_where(file):
                    file.unlink()

    def is_whole(self, report: Report) -> bool:
        """Whether a finished store still is what its manifest says, every byte of it. One of an older version is not."""
        assert self.manifest is not None
        if self.manifest.format_version != FORMAT_VERSION:
            return False
        for number, layer in enumerate(self.manifest.moe_layers):
            header = block_file_header(self.options["identity"], number, layer.num_experts, layer.block_bytes)
            if kept_blocks(self.folder / layer.file, header, layer, report) is None:
                return False
        for name, entry in self.manifest.files.items():
            if not file_holds(self.folder / name, entry):
                return False
            report(entry["bytes"])
        if self.lock is not None:
            with saying_where(self.folder / JOURNAL):
                (self.folder / JOURNAL).unlink(missing_ok=True)  # of a run that was killed between the two
        return True

    def reopen(self) -> None:
        """Turn a finished store into an unfinished one: what is still as it was written is kept by what follows.

        Raises
        ------
        WriteError
            The folder cannot be written.
        """
        assert self.manifest is not None
        if self.lock is None:
            self.lock = Lock(self.folder / LOCK, "packing")  # says why it cannot be written
        self.done = {layer.file: list(layer.checksums) for layer in self.manifest.moe_layers}
        self.done |= {name: dict(entry) for name, entry in self.manifest.files.items()}
        self.perplexity, self.manifest = self.manifest.perplexity, None
        self._journal()
        with saying_where(self.folder / MANIFEST):
            (self.folder / MANIFEST).unlink()

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
        noted = self.done.get(layer.file)
        if isinstance(noted, list) and len(noted) == num_experts:
            kept = replace(layer, data_offset=len(header), checksums=tuple(noted))
            parts = kept_blocks(self.folder / layer.file, header, kept, report)
            if parts is not None:
                return replace(kept, part_checksums=parts)
        nbytes = len(header) + num_experts * layer.block_bytes
        with FileWriter(self.folder / layer.file, nbytes) as writer:
            writer.write(np.frombuffer(header, np.uint8))
            checksums, parts = write_blocks(writer, number, num_experts, layer.block_bytes, source, report)
            writer.commit()
        self._note(layer.file, list(checksums))
        return replace(layer, data_offset=len(header), checksums=checksums, part_checksums=parts)

    def dense(self, name: str, tensors: Sequence[DenseTensor], report: Report) -> None:
        """Write a safetensors file of tensors that are no experts, unless it is there."""
        header = np.frombuffer(_safetensors_header(tensors), np.uint8)
        entry = {"bytes": len(header) + sum(tensor.nbytes for tensor in tensors)}
        noted = self.done.get(name)
        if isinstance(noted, dict) and noted["bytes"] == entry["bytes"]:
            sums = kept_tensors(self.folder / name, header, [(tensor.key, tensor.nbytes) for tensor in tensors], noted)
            if sums is not None:
                self.files[name], self.tensors = noted, sums
                report(entry["bytes"])
                return
        whole, sums = hashlib.sha256(header.data), {}
        with FileWriter(self.folder / name, entry["bytes"]) as writer:
            writer.write(header)
            for tensor in tensors:
                quick = xxh3_64()
                for chunk in tensor.chunks():
                    whole.update(chunk.data)
                    quick.update(chunk.data)
                    writer.write(chunk)
                    report(len(chunk))
                sums[tensor.key] = quick.hexdigest()
            writer.commit()
        self.files[name], self.tensors = entry | {"sha256": whole.hexdigest()}, sums
        self._note(name, self.files[name])

    def copy(self, file: Path) -> None:
        """Copy a small file of the checkpoint, unless it is there.

        Raises
        ------
        CheckpointCorruptError
            It is no regular file, or far too large.
        CheckpointMissingError
            It cannot be read.
        """
        try:
            data = np.frombuffer(read_regular(file, error=CheckpointCorruptError, what="file of the checkpoint"), np.uint8)
        except OSError as error:
            raise CheckpointMissingError(message("A file cannot be read.", where=file, got=error.strerror)) from error
        entry = {"bytes": len(data), "sha256": checksum(data)}
        if self.done.get(file.name) != entry or not file_holds(self.folder / file.name, entry):
            with FileWriter(self.folder / file.name, len(data)) as writer:
                writer.write(data)
                writer.commit()
            self._note(file.name, entry)
        self.files[file.name] = entry

    def finish(self, manifest: Manifest) -> None:
        """Write the manifest: from now on the store is whole."""
        write_manifest(self.folder, manifest)
        with saying_where(self.folder / JOURNAL):
            (self.folder / JOURNAL).unlink(missing_ok=True)

    def _note(self, name: str, what: Any) -> None:
        self.done[name] = what
        self._journal()

    def _journal(self) -> None:
        raw = sealed({"format_version": FORMAT_VERSION, "options": dict(self.options), "done": self.done})
        write_whole(self.folder / JOURNAL, lambda part: part.write_bytes(raw))


_PRECISION = ("bits", "group", "dense_bits")
_BLOCK_FILE = re.compile(r"experts-\d{5,}\.safetensors")
_PART = re.compile(r"\.(.+)\.\d+-[0-9a-f]{8}\.part")


def _part_of(name: str) -> str | None:
    """The file that ``name`` would become in the end, if it is named as :class:`~swapless.atomic.WholeFile` names its parts."""
    found = _PART.fullmatch(name)
    return found[1] if found else None


def _read_journal(path: Path) -> dict[str, Any]:
    try:
        raw = read_regular(path, error=PackMismatchError, what="journal", max_bytes=MOST_BYTES)
        table = Table(parse_json(raw, where=path, error=PackMismatchError, what="journal"), where=path, error=PackMismatchError)
        version = table.integer("format_version", minimum=1, default=1)
        if version != FORMAT_VERSION:
            raise PackMismatchError(
                message("It is of another version of the format.", where=path, got=version, allowed=FORMAT_VERSION)
            )
        if not seal_holds(raw):
            raise PackMismatchError(message("It is not as it was written: its checksum differs.", where=path))
        table.only("format_version", "options", "done", "checksum")
        options, done = table.table("options"), table.table("done")
        options.only("identity", *_PRECISION)
        found: dict[str, Any] = {}
        for name in done:
            if isinstance(done.raw(name), list):
                found[name] = done.texts(name, maximum=64)
            else:
                entry = done.table(name)
                found[name] = {"bytes": entry.integer("bytes"), "sha256": entry.text("sha256", maximum=64)}
        precision = {name: options.integer(name) for name in _PRECISION}
        return {"options": {"identity": options.text("identity")} | precision, "done": found}
    except PackMismatchError as error:
        raise PackMismatchError(f"The journal of an unfinished packed store is no use. {error} Remove the folder.") from error
    except OSError as error:
        raise CheckpointMissingError(message("A file cannot be read.", where=path, got=error.strerror)) from error


def _safetensors_header(tensors: Sequence[DenseTensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        entries[tensor.key] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    length = -(-len(text) // 8) * 8
    return length.to_bytes(8, "little") + text.ljust(length)
