"""The checkpoint store: experts straight out of the user's own safetensors files.

Which bytes make up which parameter of which expert is told from outside (``runtime/door`` asks transformers' own conversion
table); this file only knows how to fetch them. An expert's parts often lie side by side, so they are fetched in as few reads
as possible, and copied from the bounce buffer to their places in the slot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from swapless.store.read import BLOCK_BYTES, FileReader, aligned_buffer

SLOT_ALIGNMENT = 64
"""Parameters begin at multiples of this within a slot: matrix products on less aligned memory differ in the last bits."""

_GAP_BYTES = 128 * 1024
"""Parts closer than this are fetched by one read: at 1 GB/s the gap costs less than a second request."""


class Extent(NamedTuple):
    """A byte range of a file."""

    file: Path
    offset: int
    nbytes: int


class ParameterSource(NamedTuple):
    """Where one parameter of one expert comes from and where it goes in the slot.

    Without ``convert`` the extents' bytes follow each other from ``slot_offset`` on. With it, ``convert(parts, out)`` turns
    the extents' bytes (uint8 views) into the ``nbytes`` of ``out``.
    """

    extents: tuple[Extent, ...]
    slot_offset: int
    nbytes: int
    convert: Callable[[list[np.ndarray], np.ndarray], None] | None = None


class _Run(NamedTuple):
    extent: Extent
    parts: tuple[tuple[int, int], ...]  # (source index, extent index) of what lies in it


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
    """

    def __init__(
        self,
        sources: Callable[[int, int], Sequence[ParameterSource]],
        reader: FileReader,
        experts: Iterable[tuple[int, int]],
    ) -> None:
        self._sources = sources
        self._plans: dict[tuple[int, int], tuple[Sequence[ParameterSource], list[_Run]]] = {}
        self.reader = reader
        self.bounce_bytes = max(_bounce_bytes(_runs(sources(*expert))) for expert in experts)

    def _plan(self, moe_layer: int, expert: int) -> tuple[Sequence[ParameterSource], list[_Run]]:
        key = (moe_layer, expert)
        if key not in self._plans:
            sources = self._sources(moe_layer, expert)
            self._plans[key] = (sources, _runs(sources))
        return self._plans[key]

    def bounce_buffer(self) -> np.ndarray:
        """A buffer for one reader thread, large enough for any expert. The caller owns it."""
        return aligned_buffer(self.bounce_bytes)

    def extents(self, moe_layer: int, expert: int) -> list[Extent]:
        """The ranges that :meth:`read` fetches for one expert, parts that lie close together merged."""
        return [run.extent for run in self._plan(moe_layer, expert)[1]]

    def read(self, moe_layer: int, expert: int, slot: np.ndarray, bounce: np.ndarray) -> int:
        """Fill ``slot`` (uint8, aligned) with one expert; returns the bytes fetched from the files.

        ``bounce`` is scratch and belongs to the calling thread for the time of the call.

        Raises
        ------
        ReadError
            A file changed under us or a read failed; the slot's content is then undefined.
        """
        sources, runs = self._plan(moe_layer, expert)
        parts: list[list[np.ndarray | None]] = [[None] * len(source.extents) for source in sources]
        fetched = used = 0
        for run in runs:
            view = self.reader.read(run.extent.file, run.extent.offset, run.extent.nbytes, bounce[used:])
            fetched += run.extent.nbytes
            for source_index, extent_index in run.parts:
                extent = sources[source_index].extents[extent_index]
                first = extent.offset - run.extent.offset
                parts[source_index][extent_index] = view[first : first + extent.nbytes]
            used += _padded(run.extent.nbytes)
        for source, pieces in zip(sources, parts, strict=True):
            out = slot[source.slot_offset : source.slot_offset + source.nbytes]
            if source.convert is not None:
                source.convert([piece for piece in pieces if piece is not None], out)
                continue
            at = 0
            for piece in pieces:
                assert piece is not None, "every extent belongs to exactly one run"
                out[at : at + piece.nbytes] = piece
                at += piece.nbytes
        return fetched

    def close(self) -> None:
        """Close the files."""
        self.reader.close()


def _runs(sources: Sequence[ParameterSource]) -> list[_Run]:
    located = sorted(
        (extent, (source_index, extent_index))
        for source_index, source in enumerate(sources)
        for extent_index, extent in enumerate(source.extents)
    )
    runs: list[_Run] = []
    for extent, part in located:
        if runs:
            last = runs[-1].extent
            end = last.offset + last.nbytes
            if last.file == extent.file and extent.offset - end <= _GAP_BYTES:
                nbytes = max(end, extent.offset + extent.nbytes) - last.offset
                runs[-1] = _Run(last._replace(nbytes=nbytes), (*runs[-1].parts, part))
                continue
        runs.append(_Run(extent, (part,)))
    return runs


def _padded(nbytes: int) -> int:
    return (-(-nbytes // BLOCK_BYTES) + 2) * BLOCK_BYTES


def _bounce_bytes(runs: list[_Run]) -> int:
    return sum(_padded(run.extent.nbytes) for run in runs)
