"""``pack``: a checkpoint of any served family as a packed store, an expert after the other, in the memory of four of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from swapless.errors import UsageError, message
from swapless.runtime.door import DTYPES, ExpertParameter, MoeLayer, expert_pieces, experts_of, skeleton
from swapless.runtime.open import OpenCheckpoint, open_checkpoint
from swapless.runtime.source import checkpoint_folder
from swapless.store.checkpoint import CheckpointStore, Convert, FetchedPart, ParameterSource, cut
from swapless.store.headers import INDEX_NAME, TensorRef
from swapless.store.manifest import DENSE, Manifest, PackedLayer, Piece, block_file_name, is_plain_name
from swapless.store.matrix import ROW_BLOCK, MatrixLayout, check_precision
from swapless.store.pack import DenseTensor, Packing
from swapless.store.packed import checkpoint_identity, is_packed
from swapless.store.quantize import quantize
from swapless.store.read import BLOCK_BYTES, FileReader, aligned_buffer
from swapless.store.write import saying_that_it_goes_on
from swapless.store.write_blocks import Source
from swapless.units import format_size

DENSE_BITS = (16, 8, 4)
"""Bits of the weights that are no experts; 16 is the checkpoint's own type."""

_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.md", "LICENSE*")
_CHUNK_BYTES = 2 << 20

Progress = Callable[[str, float], None]


def pack(
    checkpoint: str | Path,
    out: str | Path,
    *,
    bits: int = 8,
    group: int = 32,
    dense_bits: int = 16,
    progress: Progress | None = None,
) -> Manifest:
    """Write ``checkpoint`` as a packed store into the folder ``out``, or go on with a run that was stopped there.

    Parameters
    ----------
    checkpoint : str or Path
        Local folder, or hub id.
    out : str or Path
        A new folder, or one that the same call began.
    bits : int
        Of an expert's weights: 16 keeps the checkpoint's type (and every bit), 8 has a scale a row, 4 a scale and a zero
        point a group.
    group : int
        Columns that share a scale in 4 bits.
    dense_bits : int
        Of all other weights: 16 keeps them as they are; with 8 and 4 those of linear layers are rounded like experts
        (no router and no embedding is touched).
    progress : callable of (str, float), optional
        Told what is going on and the share done.

    Returns
    -------
    Manifest
        What was written. Whether or not the run was stopped on the way, the files are the same, byte for byte: whatever an
        earlier run left is held against its checksums, and written again where it differs, in a finished store too.

    Raises
    ------
    CheckpointError, UnsupportedFamilyError
        As :func:`swapless.load`.
    PackMismatchError
        ``out`` holds a packed store of another checkpoint, or packed in another way.
    UsageError
        Unknown bits or group, or ``out`` holds something else.
    LockedError
        Another process packs into ``out``.
    WriteError
        No room, or no permission; ``out`` has no manifest then.
    """
    check_precision(bits, group)
    if dense_bits not in DENSE_BITS:
        raise UsageError(
            message("No packed store has such dense bits.", got=dense_bits, allowed=", ".join(map(str, DENSE_BITS)))
        )
    folder, target = checkpoint_folder(checkpoint), Path(out)
    if is_packed(folder):
        raise UsageError(message("This is a packed store already.", got=folder, step="Pack the checkpoint it was made from."))
    opened = open_checkpoint(folder)
    identity = checkpoint_identity(folder)
    small = [file for file in sorted({file for pattern in _SMALL_FILES for file in folder.glob(pattern)}) if _is_copied(file)]
    options = {"identity": identity, "bits": bits, "group": group, "dense_bits": dense_bits}
    with saying_that_it_goes_on(), Packing.begin(target, options, {file.name for file in small}) as packing:
        if packing.manifest is not None:
            nbytes = sum(layer.num_experts * layer.block_bytes for layer in packing.manifest.moe_layers)
            nbytes += sum(entry["bytes"] for entry in packing.manifest.files.values())
            if packing.is_whole(_Meter(progress, nbytes, "checked").add):
                return packing.manifest
            packing.reopen()
        return _pack(opened, packing, small, progress)


def _is_copied(file: Path) -> bool:
    return file.is_file() and file.name != INDEX_NAME and is_plain_name(file.name)


def _pack(opened: OpenCheckpoint, packing: Packing, small: Sequence[Path], progress: Progress | None) -> Manifest:
    bits, group, dense_bits = (int(packing.options[name]) for name in ("bits", "group", "dense_bits"))
    modules = dict(experts_of(skeleton(opened.cls, opened.config)))
    layers = packed_layers(opened, modules, bits, group)
    # What no parameter was matched with is kept too: transformers may know what to do with it.
    refs = [ref for key, ref in opened.refs.items() if key not in opened.layout.expert_keys]
    read_bytes = sum(opened.refs[key].nbytes for key in opened.layout.expert_keys)
    written = sum(layer.num_experts * plan.block_bytes for layer, plan in zip(opened.layout.moe_layers, layers, strict=True))
    meter = _Meter(progress, read_bytes + written + 2 * sum(ref.nbytes for ref in refs), "read and written")
    reader = FileReader(opened.files)
    try:
        for file in small:
            packing.copy(file)
        linears = packed_linears(opened, dense_bits)
        tensors = [_linear(ref, reader, dense_bits, group) if ref.key in linears else _as_it_is(ref, reader) for ref in refs]
        with ThreadPoolExecutor(1) as aside:
            loaded = aside.submit(_load_kernels, {bits, dense_bits}, group)  # while the first files are copied
            packing.dense(DENSE, tensors, lambda nbytes: meter.add(2 * nbytes))
            loaded.result()
        transposed = [bool(modules[layer.path].is_transposed) for layer in opened.layout.moe_layers]
        source = _source(opened, reader, layers, transposed, group)
        layers = [
            packing.layer(number, plan, layer.num_experts, source, meter.add)
            for number, (plan, layer) in enumerate(zip(layers, opened.layout.moe_layers, strict=True))
        ]
    finally:
        reader.close()
    manifest = Manifest(
        bits=bits,
        group=group,
        dense_bits=dense_bits,
        dtype=str(opened.layout.dtype).removeprefix("torch."),
        source={"name": opened.folder.resolve().name, "identity": str(packing.options["identity"])},
        moe_layers=tuple(layers),
        dense=linears,
        tensors=packing.tensors,
        files=dict(sorted(packing.files.items())),
        perplexity=packing.perplexity,
    )
    packing.finish(manifest)
    return manifest


def packed_layers(opened: OpenCheckpoint, modules: Mapping[str, Any], bits: int, group: int) -> list[PackedLayer]:
    """What a packed store of ``opened`` would be made of, nothing written: layers without checksums.

    ``modules`` are the experts modules of its model by path, from :func:`~swapless.runtime.door.experts_of`.
    """
    layers = opened.layout.moe_layers
    return [_plan(number, layer, modules[layer.path], bits, group) for number, layer in enumerate(layers)]


def packed_linears(opened: OpenCheckpoint, dense_bits: int) -> dict[str, dict[str, Any]]:
    """Tensors that would be rounded to ``dense_bits`` beside the experts, as :class:`Manifest` has them in ``dense``."""
    linears = opened.layout.linear_keys if dense_bits < 16 else {}
    return {key: {"module": linears[key], "shape": list(opened.refs[key].shape)} for key in sorted(linears)}


def _plan(number: int, layer: MoeLayer, module: Any, bits: int, group: int) -> PackedLayer:
    pieces = expert_pieces(layer.parameters, module, bits, group)
    return PackedLayer(
        path=layer.path,
        block=layer.block,
        file=block_file_name(number),
        data_offset=0,
        block_bytes=-(-(pieces[-1].offset + pieces[-1].nbytes) // BLOCK_BYTES) * BLOCK_BYTES,
        pieces=pieces,
        checksums=(),
    )


def _source(opened: OpenCheckpoint, reader: FileReader, plans: list[PackedLayer], transposed: list[bool], group: int) -> Source:
    """Blocks are what a checkpoint store reads, where rounding is the conversion of what was read: no expert is ever whole."""
    layers = opened.layout.moe_layers
    everyone = [(number, expert) for number, layer in enumerate(layers) for expert in range(layer.num_experts)]

    def sources(number: int, expert: int) -> list[ParameterSource]:
        layer, pieces = layers[number], plans[number].pieces
        return [
            part
            for parameter, source in zip(layer.parameters, layer.sources(expert), strict=True)
            for part in _rounded(
                parameter, source, [piece for piece in pieces if piece.name == parameter.name], transposed[number], group
            )
        ]

    store = CheckpointStore(sources, reader, everyone, most_parts=1)

    def fetch(number: int, expert: int, bounce: np.ndarray) -> FetchedPart:
        return store.fetch_part(number, expert, 0, bounce)

    return Source(max(layer.expert_bytes for layer in layers), store.bounce_bytes, fetch)


def _rounded(
    parameter: ExpertParameter, source: ParameterSource, pieces: Sequence[Piece], transposed: bool, group: int
) -> Iterator[ParameterSource]:
    """A parameter's pieces in a block, each out of its own bytes of the checkpoint where these are its rows as they are."""
    first, convert = pieces[0], source.convert
    if first.bits == 16:
        yield source._replace(slot_offset=first.offset)
    elif convert is None and not transposed:
        size = parameter.nbytes // len(pieces)
        for number, piece in enumerate(pieces):
            extents = cut(source.extents, number * size, size)
            yield ParameterSource(extents, piece.offset, piece.nbytes, _rounding(parameter, None, [piece], False, group))
    else:
        nbytes = pieces[-1].offset + pieces[-1].nbytes - first.offset
        yield ParameterSource(source.extents, first.offset, nbytes, _rounding(parameter, convert, pieces, transposed, group))


def _rounding(
    parameter: ExpertParameter, convert: Convert | None, pieces: Sequence[Piece], transposed: bool, group: int
) -> Convert:
    def rounding(parts: list[np.ndarray], out: np.ndarray) -> None:
        if convert is not None:
            held = np.empty(parameter.nbytes, np.uint8)
            convert(parts, held)
        else:
            held = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if held.ctypes.data % parameter.dtype.itemsize:
            held = held.copy()
        weights = torch.from_numpy(held).view(parameter.dtype).view(-1, parameter.shape[-1])
        rows = iter((weights.T if transposed else weights).split([piece.shape[0] for piece in pieces]))
        for piece in pieces:
            layout = MatrixLayout(rows=piece.shape[0], columns=piece.shape[1], bits=piece.bits, group=group)
            at = piece.offset - pieces[0].offset
            quantize(_as_array(next(rows)), layout, out[at : at + piece.nbytes])

    return rounding


def _load_kernels(precisions: set[int], group: int) -> None:
    """Round a few weights in each of these bits, so that the code is there when the first expert is."""
    for bits in precisions - {16}:
        layout = MatrixLayout(rows=ROW_BLOCK, columns=group, bits=bits, group=group)
        quantize(np.zeros((ROW_BLOCK, group), np.uint16), layout, aligned_buffer(layout.nbytes)[: layout.nbytes])


def _as_array(weights: torch.Tensor) -> np.ndarray:
    """Weights as :func:`quantize` takes them, without a copy where that can be."""
    if weights.dtype == torch.bfloat16:
        return weights.contiguous().view(torch.int16).numpy().view(np.uint16)
    return weights.float().contiguous().numpy()


def _as_it_is(ref: TensorRef, reader: FileReader) -> DenseTensor:
    def chunks() -> Iterator[np.ndarray]:
        buffer = aligned_buffer(_CHUNK_BYTES + 2 * BLOCK_BYTES)
        for first in range(0, ref.nbytes, _CHUNK_BYTES):
            yield reader.read(ref.file, ref.offset + first, min(_CHUNK_BYTES, ref.nbytes - first), buffer)

    return DenseTensor(ref.key, ref.dtype, ref.shape, ref.nbytes, chunks)


def _linear(ref: TensorRef, reader: FileReader, bits: int, group: int) -> DenseTensor:
    """The weight of a linear layer, rounded some rows at a time: their values at once, what follows them at the end."""
    layout = MatrixLayout(rows=ref.shape[0], columns=ref.shape[1], bits=bits, group=group)
    row_bytes = ref.nbytes // layout.rows
    at_once = max(1, _CHUNK_BYTES // (row_bytes * ROW_BLOCK)) * ROW_BLOCK

    def chunks() -> Iterator[np.ndarray]:
        buffer = aligned_buffer(at_once * row_bytes + 2 * BLOCK_BYTES)
        scales, zeros = [], []
        for first in range(0, layout.rows, at_once):
            rows = min(at_once, layout.rows - first)
            raw = reader.read(ref.file, ref.offset + first * row_bytes, rows * row_bytes, buffer)
            weights = torch.from_numpy(raw.copy()).view(DTYPES[ref.dtype]).view(rows, layout.columns)
            part = replace(layout, rows=rows)
            out = np.empty(part.nbytes, np.uint8)
            quantize(_as_array(weights), part, out)
            yield out[: part.scales_offset]
            scales.append(out[part.scales_offset : part.zeros_offset])
            zeros.append(part.planes(out)[2].reshape(-1))
        yield from scales
        yield from zeros
        yield np.zeros(layout.nbytes - layout.zeros_offset - sum(map(len, zeros)), np.uint8)

    return DenseTensor(ref.key, "U8", (layout.nbytes,), layout.nbytes, chunks)


class _Meter:
    """Bytes read and written so far."""

    def __init__(self, progress: Progress | None, total: int, done: str) -> None:
        self._progress, self._word = progress, done
        self._total = max(1, total)
        self._done = 0

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        if self._progress is None:
            return
        text = f"{format_size(self._done)} of {format_size(self._total)} {self._word}"
        self._progress(text, min(1.0, self._done / self._total))
