"""How the experts of a checkpoint come from the disk, in any precision: probed on its own files where they are there."""

from __future__ import annotations

from typing import Any

from swapless.plan.machine import Machine, probe_files
from swapless.plan.traffic import BlocksTraffic, StoreTraffic, Traffic
from swapless.runtime.open import OpenCheckpoint
from swapless.runtime.parts import open_store, sample_extents
from swapless.store.packed import Check, block_parts
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
    check : Check
        When blocks of a packed store are held against their checksums.
    """

    def __init__(self, opened: OpenCheckpoint, machine: Machine, whole: bool, check: Check = Check.FIRST) -> None:
        self._machine, self._opened, self._check = machine, opened, check
        self._files = opened.files if whole else []
        self._found: dict[int, Probe] = {}
        self.source = "probed on its files" if whole else "as of the disk of the cache folder: the model is not here"
        layers = opened.layout.moe_layers
        store = open_store(opened, check)
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
            return BlocksTraffic(self._files, self._block_bytes(form))
        return StoreTraffic(open_store(self._opened, self._check), min(m.num_experts for m in self._opened.layout.moe_layers))

    def threads(self, form: OpenCheckpoint) -> int:
        """How many reads the engine would have in flight."""
        return self._found_for(form).depth

    def _found_for(self, form: OpenCheckpoint) -> Probe:
        if not self._planned(form):
            return self._probe
        block_bytes = self._block_bytes(form)
        return self._at(block_bytes // block_parts(block_bytes))

    @staticmethod
    def _block_bytes(form: OpenCheckpoint) -> int:
        return max(layer.block_bytes for layer in form.manifest.moe_layers) if form.manifest else 0

    def _planned(self, form: OpenCheckpoint) -> bool:
        """Whether ``form`` is what ``opened`` would be packed as."""
        return self._bounce_bytes > 0 and form.manifest is not None

    def costs(self, form: OpenCheckpoint) -> dict[str, Any]:
        """What :class:`~swapless.plan.speed.Costs` say about the reads of ``form``: ``opened``, or how it would be packed.

        An expert that is copied into its slot is taken to wait for its read first.
        """
        found, read_bytes, parts, copied = self._found_for(form), self._bytes, self._parts, self._bounce_bytes > 0
        if self._planned(form):  # blocks that are not there yet
            read_bytes = self._block_bytes(form)
            parts, copied = block_parts(read_bytes), False
        best = found.best_bytes_per_s
        own = 1 / (1 / best + 1 / self._machine.copy_bytes_per_s) if copied else best
        return {
            "read_bytes": read_bytes,
            "parts": parts,
            "bytes_per_s": {depth: own / best * rate for depth, rate in found.bytes_per_s.items() if depth <= found.depth},
            "link_bytes_per_s": best,
        }

    def _at(self, block_bytes: int) -> Probe:
        if not self._files:
            return self._machine.read_at(block_bytes)
        if block_bytes not in self._found:
            self._found[block_bytes] = probe_files(self._files, block_bytes)
        return self._found[block_bytes]
