"""How the experts of a checkpoint come from the disk, in any precision: probed on its own files where they are there."""

from __future__ import annotations

from typing import Any

from swapless.plan.machine import Machine, probe_files
from swapless.plan.traffic import Traffic, blocks_traffic, store_traffic
from swapless.runtime.open import OpenCheckpoint
from swapless.runtime.parts import open_store, sample_extents
from swapless.store.packed import block_parts
from swapless.store.probe import DEPTHS, Probe, probe


class Reads:
    """Reads of a checkpoint.

    Parameters
    ----------
    opened : OpenCheckpoint
        A checkpoint, a packed store, or ghosts of a checkpoint.
    machine : Machine
        Its figures stand in where the weights are not there.
    whole : bool
        Whether they are.
    """

    def __init__(self, opened: OpenCheckpoint, machine: Machine, whole: bool) -> None:
        self._machine, self._opened = machine, opened
        self._files = opened.files if whole else []
        self._found: dict[int, Probe] = {}
        self.source = "probed on its files" if whole else "as of the disk of the cache folder: the model is not here"
        layers = opened.layout.moe_layers
        store = open_store(opened, check=False)
        try:
            extents = store.extents(0, 0)
            self._bytes = sum(extent.nbytes for extent in extents)
            self._parts, self._bounce_bytes = store.parts(0, 0), store.bounce_bytes
            copied = self._bounce_bytes > 0
            whole_probe = probe(store.reader, sample_extents(store, layers), copied=copied) if whole else None
            self._probe = whole_probe or machine.read_at(extents[0].nbytes)
        finally:
            store.close()

    def io_bytes(self, form: OpenCheckpoint) -> int:
        """Bounce buffers of the reader threads; packed stores have none."""
        return 0 if form.manifest is not None else self._probe.depth * self._bounce_bytes

    def most_io_bytes(self, form: OpenCheckpoint) -> int:
        """The same with as many threads as there ever are."""
        return 0 if form.manifest is not None else max(DEPTHS) * self._bounce_bytes

    def traffic(self, form: OpenCheckpoint) -> Traffic | None:
        """Reads of ``form`` as the engine's threads make them; None where the weights are not there."""
        if not self._files:
            return None
        if self._planned(form):
            layers = form.manifest.moe_layers if form.manifest else ()
            block_bytes = max(layer.block_bytes for layer in layers)
            parts = block_parts(block_bytes)
            return blocks_traffic(self._files, block_bytes // parts, self._at(block_bytes // parts).depth)
        return store_traffic(self._opened, self._probe.depth)

    def _planned(self, form: OpenCheckpoint) -> bool:
        """Whether ``form`` is what ``opened`` would be packed as."""
        return self._bounce_bytes > 0 and form.manifest is not None

    def costs(self, form: OpenCheckpoint, read_bytes_per_s: float | None) -> dict[str, Any]:
        """What :class:`~swapless.plan.speed.Costs` say about the reads of ``form``: ``opened``, or how it would be packed.

        ``read_bytes_per_s`` is what the engine's own reads came to, the copy of an expert that needs one included. Where none
        were made, the copy is taken to wait for its read.
        """
        found, read_bytes, parts, copied = self._probe, self._bytes, self._parts, self._bounce_bytes > 0
        if self._planned(form):  # blocks that are not there yet
            assert form.manifest is not None
            read_bytes = max(layer.block_bytes for layer in form.manifest.moe_layers)
            parts, copied = block_parts(read_bytes), False
            found = self._at(read_bytes // parts)
        best = found.best_bytes_per_s
        if read_bytes_per_s is None:
            read_bytes_per_s = 1 / (1 / best + 1 / self._machine.copy_bytes_per_s) if copied else best
        share = read_bytes_per_s / best
        return {
            "read_bytes": read_bytes,
            "parts": parts,
            "bytes_per_s": {depth: share * rate for depth, rate in found.bytes_per_s.items() if depth <= found.depth},
            "link_bytes_per_s": max(best, read_bytes_per_s),
        }

    def _at(self, block_bytes: int) -> Probe:
        if not self._files:
            return self._machine.read_at(block_bytes)
        if block_bytes not in self._found:
            self._found[block_bytes] = probe_files(self._files, block_bytes)
        return self._found[block_bytes]
