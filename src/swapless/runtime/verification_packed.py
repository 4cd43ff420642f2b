"""Hold a packed store against the checkpoint that it was made from: every weight within the rounding of its bits.

The checkpoint is read by safetensors and built by transformers; the store is read and taken apart by code of this file alone,
written from ``docs/formats/packed.md``. So a mistake in how weights are rounded, laid out or named has nowhere to hide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open

from swapless.errors import PackMismatchError, message
from swapless.runtime.door import Reference, experts_of, skeleton
from swapless.runtime.open import open_checkpoint
from swapless.runtime.source import checkpoint_folder
from swapless.store.packed import DENSE, Manifest, checkpoint_identity, read_manifest
from swapless.store.verify import matrix_bytes

_WORST_STEPS = {8: 0.501, 4: 0.56}
"""How far from its weight a rounded value may lie, in steps of its scale. In 4 bits the step itself is rounded to bfloat16, and
the zero to a whole number: so an end of the range may lie outside by a little more than half a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One part of a store: whether it is what its checkpoint rounds to, and the largest difference in steps of its scale."""

    what: str
    holds: bool
    worst_steps: float


class _Decoded(NamedTuple):
    """Weights of a quantised matrix, float32 (rows, columns), and the step between neighbouring values at each of them."""

    weights: np.ndarray
    steps: np.ndarray


@torch.no_grad()
def compare_with_source(
    folder: Path, source: str | Path, *, progress: Callable[[str, float], None] | None = None
) -> Iterator[Compared]:
    """Yield a result a MoE layer and one a tensor that is no expert.

    Parameters
    ----------
    folder : Path
        The packed store.
    source : str or Path
        The checkpoint, a local folder or hub id.
    progress : callable of (str, float), optional
        Told what is going on and the share done.

    Raises
    ------
    PackMismatchError
        ``source`` is another checkpoint than the one that was packed.
    CheckpointError, UnsupportedFamilyError
        Something is wrong with one of the two.
    """
    manifest, place = read_manifest(folder), checkpoint_folder(source)
    opened = open_checkpoint(place)
    identity = checkpoint_identity(place)
    if identity != manifest.source["identity"]:
        raise PackMismatchError(
            message(
                "The store was packed from another checkpoint.",
                where=place,
                got=f"identity {identity[:16]}...",
                allowed=f"{manifest.source['identity'][:16]}..., named {manifest.source['name']!r}",
            )
        )
    dtype = opened.layout.dtype
    meta = skeleton(opened.cls, opened.config, dtype)
    modules = dict(experts_of(meta))
    reference = Reference(meta, opened.folder, opened.files, dtype)
    kept = sorted(key for key in opened.refs if key not in opened.layout.expert_keys)
    total = len(manifest.moe_layers) + len(kept)
    for number, layer in enumerate(opened.layout.moe_layers):
        if progress is not None:
            progress(f"MoE layer {number}", number / total)
        module, worst = modules[layer.path], 0.0
        for expert in range(layer.num_experts):
            held = reference.experts(module, layer.path, [expert])
            whole = {parameter.name: held._parameters[parameter.name] for parameter in layer.parameters}
            worst = max(worst, _expert(folder, manifest, number, expert, whole, bool(module.is_transposed)))
        yield Compared(what=f"MoE layer {number}", holds=worst <= _WORST_STEPS.get(manifest.bits, 0.0), worst_steps=worst)
    with safe_open(folder / DENSE, framework="pt") as store:
        for number, key in enumerate(kept, start=len(manifest.moe_layers)):
            if progress is not None:
                progress(key, number / total)
            with safe_open(opened.refs[key].file, framework="pt") as shard:
                weights = shard.get_tensor(key)
            worst = _tensor(store.get_tensor(key), weights, manifest, key)
            allowed = _WORST_STEPS[manifest.dense_bits] if key in manifest.dense else 0.0
            yield Compared(what=key, holds=worst <= allowed, worst_steps=worst)


def _expert(folder: Path, manifest: Manifest, number: int, expert: int, whole: dict[str, Any], transposed: bool) -> float:
    """The largest difference of one expert, in steps; infinite where what is kept as it is differs by a bit."""
    layer = manifest.moe_layers[number]
    with open(folder / layer.file, "rb") as file:
        file.seek(layer.data_offset + expert * layer.block_bytes)
        block = np.frombuffer(file.read(layer.block_bytes), np.uint8)
    worst, row = 0.0, dict.fromkeys(whole, 0)
    for piece in layer.pieces:
        held = block[piece.offset : piece.offset + piece.nbytes]
        parameter = whole[piece.name][0]
        if piece.bits == 16:
            same = _bytes_of(parameter).tobytes() == held.tobytes()
            worst = max(worst, 0.0 if same and list(parameter.shape) == list(piece.shape) else np.inf)
            continue
        rows, columns = piece.shape
        matrix = parameter.T if transposed else parameter
        first = row[piece.name]
        row[piece.name] += rows
        wanted = matrix[first : first + rows].float().numpy()
        worst = max(worst, _distance(decode(held, rows, columns, piece.bits, manifest.group), wanted))
    for name, parameter in whole.items():  # every row was met
        if row[name] not in (0, (parameter[0].T if transposed else parameter[0]).shape[0]):
            return np.inf
    return worst if {piece.name for piece in layer.pieces} == set(whole) else np.inf


def _tensor(held: torch.Tensor, weights: torch.Tensor, manifest: Manifest, key: str) -> float:
    if key not in manifest.dense:
        same = held.dtype == weights.dtype and held.shape == weights.shape
        return 0.0 if same and _bytes_of(held).tobytes() == _bytes_of(weights).tobytes() else np.inf
    rows, columns = manifest.dense[key]["shape"]
    if tuple(weights.shape) != (rows, columns):
        return np.inf
    return _distance(decode(held.numpy(), rows, columns, manifest.dense_bits, manifest.group), weights.float().numpy())


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    flat: np.ndarray = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat


def _distance(decoded: _Decoded, wanted: np.ndarray) -> float:
    if decoded.weights.shape != wanted.shape:
        return np.inf
    apart = np.abs(decoded.weights.astype(np.float64) - wanted)
    # Where all weights of a scale are zero there is no step, and nothing may differ.
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.where(apart == 0, 0.0, apart / decoded.steps)
    return float(steps.max(initial=0.0))


def decode(held: np.ndarray, rows: int, columns: int, bits: int, group: int) -> _Decoded:
    """The weights in the bytes of a quantised matrix, taken apart value by value as the format's page says.

    Examples
    --------
    >>> held = np.zeros(matrix_bytes(1, 2, 8, 32), np.uint8)
    >>> held[:2] = 3, 253  # the first row's first two columns: 3 and -3
    >>> held[32 * 32 : 32 * 32 + 4] = np.array([0.5], "<f4").view(np.uint8)  # its scale
    >>> decode(held, 1, 2, 8, 32).weights.tolist()
    [[1.5, -1.5]]
    """
    assert len(held) == matrix_bytes(rows, columns, bits, group)
    row, column = np.arange(rows)[:, None], np.arange(columns)[None, :]
    blocks = -(-rows // 32)
    unit = 32 if bits == 8 else group
    wide = -(-columns // unit) * unit
    after_values = -(-(blocks * 32 * wide * bits // 8) // 64) * 64
    block, lane = row // 32, row % 32
    if bits == 8:
        place = ((block * (wide // 4) + column // 4) * 32 + lane) * 4 + column % 4
        scales = held[after_values : after_values + blocks * 32 * 4].view("<f4")
        steps = np.broadcast_to(scales[row], (rows, columns))
        return _Decoded(held[place].view(np.int8).astype(np.float32) * steps, steps)
    groups = wide // group
    place = ((block * (wide // 8) + column // 8) * 32 + lane) * 4 + column % 4
    byte = held[place]
    value = np.where(column % 8 < 4, byte & 15, byte >> 4)
    after_scales = after_values + -(-(blocks * 32 * groups * 2) // 64) * 64
    halves = held[after_values : after_values + blocks * 32 * groups * 2].view("<u2")
    steps = (halves[(block * groups + column // group) * 32 + lane].astype(np.uint32) << np.uint32(16)).view(np.float32)
    pairs = held[after_scales + (block * groups + column // group) * 16 + lane % 16]
    zero = np.where(lane < 16, pairs & 15, pairs >> 4)
    return _Decoded(steps * (value.astype(np.float32) - zero.astype(np.float32)), steps)
