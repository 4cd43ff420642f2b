"""The checkpoint store: experts straight out of the user's own safetensors files.

Which bytes make up which parameter of which expert is told from outside (``runtime/door`` asks transformers' own conversion
table); this file only knows how to fetch them. What lies side by side is fetched by one read and copied from the bounce
buffer to its places in the slot; an expert of many megabytes is cut into parts, so that several readers can share it when it
is the only one missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from swapless.store.read import BLOCK_BYTES, FileReader, aligned_buffer, buffer_bytes

SLOT_ALIGNMENT = 64
"""Parameters begin at multiples of this within a slot: matrix products on less aligned memory differ in the last bits."""

_GAP_BYTES = 128 * 1024
"""Parts closer than this are fetched by one read: at 1 GB/s the gap costs less than a second request."""


class Extent(NamedTuple):
    """A byte range of a file."""

    file: Path
    offset: int
    nbytes: int


Convert = Callable[[list[np.ndarray], np.ndarray], None]
"""Turns the bytes of extents (uint8 views) into what belongs in the slot."""


class ParameterSource(NamedTuple):
    """Where one parameter of one expert comes from and where it goes in the slot.

    Without ``convert`` the extents' bytes follow each other from ``slot_offset`` on. With it, ``convert(parts, out)`` turns
    the extents' bytes (uint8 views) into the ``nbytes`` of ``out``.
    """

    extents: tuple[Extent, ...]
    slot_offset: int
    nbytes: int
    convert: Convert | None = None


def cut(extents: Sequence[Extent], first: int, nbytes: int) -> tuple[Extent, ...]:
    """Bytes ``first`` to ``first + nbytes`` of what ``extents`` are one after the other."""
    found = []
    for file, offset, length in extents:
        begin, end = max(0, first), min(length, first + nbytes)
        if begin < end:
            found.append(Extent(file, offset + begin, end - begin))
        first -= length
    return tuple(found)


_PART_BYTES = 3 << 20
"""Parts are about this large: long enough that the fixed cost of a read is lost in it, short enough to share out."""


class _Unit(NamedTuple):
    """What is copied in one go: bytes of one extent as they are, or all extents of a parameter through its conversion."""

    extents: tuple[Extent, ...]
    slot_offset: int
    nbytes: int
    convert: Convert | None


class _Run(NamedTuple):
    """One read, and what lies in it: (unit, extent of the unit)."""

    extent: Extent
    holds: tuple[tuple[int, int], ...]


class _Part(NamedTuple):
    units: tuple[_Unit, ...]
    runs: tuple[_Run, ...]


class FetchedPart(NamedTuple):
    """A part that was read into a bounce buffer: ``nbytes`` from the files, and the bytes of each unit's extents."""

    nbytes: int
    units: tuple[_Unit, ...]
    pieces: list[list[np.ndarray]]

    def place(self, slot: np.ndarray) -> None:
        """Copy or convert each unit to its place in ``slot``."""
        for unit, found in zip(self.units, self.pieces, strict=True):
            out = slot[unit.slot_offset : unit.slot_offset + unit.nbytes]
            if unit.convert is None:
                out[:] = found[0]
            else:
                unit.convert(found, out)


class CheckpointStore:
    """Experts by (moe_layer, expert), read into slots.

    Parameters
    ----------
    sources : callable of (moe_layer, expert) -> sequence of ParameterSource
        The plan of one expert.
    reader : FileReader
        Its files must cover every extent. The store owns it from now on.
    experts : iterable of (int, int)
        Every (moe_layer, expert): how far the parts of an expert lie apart may differ between them, and with it the
        bounce buffer that they need.
    most_parts : int
        Into how many parts, read independently of each other, an expert may be cut.
    """

    def __init__(
        self,
        sources: Callable[[int, int], Sequence[ParameterSource]],
        reader: FileReader,
        experts: Iterable[tuple[int, int]],
        *,
        most_parts: int = 4,
    ) -> None:
        self._sources = sources
        self._most_parts = most_parts
        self._plans: dict[tuple[int, int], tuple[_Part, ...]] = {}
        self.reader = reader
        plans = (_plan(sources(*expert), most_parts) for expert in experts)
        self.bounce_bytes = buffer_bytes(max(_bounce_bytes(part) for plan in plans for part in plan))

    def _plan(self, moe_layer: int, expert: int) -> tuple[_Part, ...]:
        key = (moe_layer, expert)
        if key not in self._plans:
            self._plans[key] = _plan(self._sources(moe_layer, expert), self._most_parts)
        return self._plans[key]

    def bounce_buffer(self) -> np.ndarray:
        """A buffer for one reader thread, large enough for any expert. The caller owns it."""
        return aligned_buffer(self.bounce_bytes)

    def extents(self, moe_layer: int, expert: int) -> list[Extent]:
        """The ranges that are fetched for one expert, one read each."""
        return [run.extent for part in self._plan(moe_layer, expert) for run in part.runs]

    def parts(self, moe_layer: int, expert: int) -> int:
        """Into how many parts, read independently of each other, the expert is cut."""
        return len(self._plan(moe_layer, expert))

    def read(self, moe_layer: int, expert: int, slot: np.ndarray, bounce: np.ndarray) -> int:
        """Fill ``slot`` with a whole expert; as :meth:`read_part`, part by part."""
        parts = range(self.parts(moe_layer, expert))
        return sum(self.read_part(moe_layer, expert, part, slot, bounce) for part in parts)

    def read_part(self, moe_layer: int, expert: int, part: int, slot: np.ndarray, bounce: np.ndarray) -> int:
        """Fill the places of one part in ``slot`` (uint8, aligned); returns the bytes fetched from the files.

        ``bounce`` is scratch and belongs to the calling thread for the time of the call.

        Raises
        ------
        ReadError
            A file changed under us or a read failed; the slot's content is then undefined.
        """
        fetched = self.fetch_part(moe_layer, expert, part, bounce)
        fetched.place(slot)
        return fetched.nbytes

    def fetch_part(self, moe_layer: int, expert: int, part: int, bounce: np.ndarray) -> FetchedPart:
        """The first half of :meth:`read_part`: one part is read into ``bounce``, from where it is yet to be placed."""
        units, runs = self._plan(moe_layer, expert)[part]
        pieces: list[list[np.ndarray]] = [[bounce] * len(unit.extents) for unit in units]
        fetched = used = 0
        for run in runs:
            view = self.reader.read(run.extent.file, run.extent.offset, run.extent.nbytes, bounce[used:])
            fetched += run.extent.nbytes
            used += _padded(run.extent.nbytes)
            for index, place in run.holds:
                extent = units[index].extents[place]
                first = extent.offset - run.extent.offset
                pieces[index][place] = view[first : first + extent.nbytes]
        return FetchedPart(fetched, units, pieces)

    def close(self) -> None:
        """Close the files."""
        self.reader.close()


def _plan(sources: Sequence[ParameterSource], most_parts: int) -> tuple[_Part, ...]:
    units = sorted((unit for source in sources for unit in _units(source)), key=lambda unit: unit.extents[0])
    sizes = [sum(extent.nbytes for extent in unit.extents) for unit in units]
    total = sum(sizes)
    count = min(most_parts, max(1, round(total / _PART_BYTES)))
    shares: list[list[_Unit]] = [[] for _ in range(count)]
    done = 0
    for unit, size in zip(units, sizes, strict=True):
        shares[min(count - 1, (done + size // 2) * count // max(1, total))].append(unit)
        done += size
    return tuple(_Part(tuple(share), _runs(share)) for share in shares if share)


def _units(source: ParameterSource) -> list[_Unit]:
    if source.convert is not None:
        return [_Unit(source.extents, source.slot_offset, source.nbytes, source.convert)]
    units = []
    at = source.slot_offset
    for file, offset, nbytes in source.extents:
        pieces = max(1, round(nbytes / _PART_BYTES * 2))
        size = -(-nbytes // pieces)
        for start in range(0, nbytes, size):
            length = min(size, nbytes - start)
            units.append(_Unit((Extent(file, offset + start, length),), at + start, length, None))
        at += nbytes
    return units


def _runs(units: Sequence[_Unit]) -> tuple[_Run, ...]:
    located = sorted((extent, (i, j)) for i, unit in enumerate(units) for j, extent in enumerate(unit.extents))
    runs: list[_Run] = []
    for extent, place in located:
        if runs:
            last = runs[-1].extent
            end = last.offset + last.nbytes
            if last.file == extent.file and extent.offset - end <= _GAP_BYTES:
                nbytes = max(end, extent.offset + extent.nbytes) - last.offset
                runs[-1] = _Run(last._replace(nbytes=nbytes), (*runs[-1].holds, place))
                continue
        runs.append(_Run(extent, (place,)))
    return tuple(runs)


def _padded(nbytes: int) -> int:
    return (-(-nbytes // BLOCK_BYTES) + 2) * BLOCK_BYTES


def _bounce_bytes(part: _Part) -> int:
    return sum(_padded(run.extent.nbytes) for run in part.runs)
