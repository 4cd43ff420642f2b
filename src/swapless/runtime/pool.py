"""The slots: one slab of page-aligned memory cut into equal pieces, each large enough for any expert of the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from swapless.runtime.allocator import madvise_away
from swapless.runtime.door import MoeLayer
from swapless.store.read import BLOCK_BYTES, aligned_buffer


class SlotPool:
    """Memory for ``slots`` experts, seen as bytes by readers and as parameters by the computation.

    Parameters
    ----------
    moe_layers : sequence of MoeLayer
        What an expert of each layer is made of.
    slots : int
        Number of slots.
    """

    def __init__(self, moe_layers: Sequence[MoeLayer], slots: int) -> None:
        self.slot_bytes = slot_bytes(moe_layers)
        self.slots = slots
        self._layers = list(moe_layers)
        self._held = np.zeros(slots, bool)
        self._slab: np.ndarray | None = aligned_buffer(self.slot_bytes * slots)
        self._address = self._slab.ctypes.data
        self._views: dict[int, tuple[int, dict[str, torch.Tensor]]] = {}

    @property
    def held_bytes(self) -> int:
        """Of the slots that were ever asked for, and not released since: the others cost nothing yet."""
        return int(np.count_nonzero(self._held)) * self.slot_bytes

    def release(self, slots: range) -> None:
        """Give the memory of these slots back to the system; what was in them is lost, and they may be used again."""
        assert self._slab is not None, "the pool is closed"
        self._held[slots.start : slots.stop] = False
        madvise_away(self._slab[slots.start * self.slot_bytes : slots.stop * self.slot_bytes])

    def bytes_of(self, slot: int) -> np.ndarray:
        """The slot's memory, uint8 (slot_bytes,): a view that lives as long as the pool."""
        assert self._slab is not None, "the pool is closed"
        self._held[slot] = True
        return self._slab[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    def addresses(self, slots: Sequence[int]) -> np.ndarray:
        """Where the memory of each of ``slots`` begins, int64, at multiples of a page."""
        assert self._slab is not None, "the pool is closed"
        return np.array(slots, np.int64) * self.slot_bytes + self._address

    def parameters(self, moe_layer: int, slot: int) -> dict[str, torch.Tensor]:
        """The slot seen as the parameters of an expert of ``moe_layer``: views, kept until it is another layer's."""
        owner, views = self._views.get(slot, (-1, {}))
        if owner != moe_layer:
            memory = torch.from_numpy(self.bytes_of(slot))
            views = {
                p.name: memory[p.slot_offset : p.slot_offset + p.nbytes].view(p.dtype).view(p.shape)
                for p in self._layers[moe_layer].parameters
            }
            self._views[slot] = moe_layer, views
        return views

    def extents(self, moe_layer: int) -> list[tuple[str, int, int]]:
        """What a slot holds of an expert of ``moe_layer``: name, first byte and bytes of each parameter."""
        return [(p.name, p.slot_offset, p.nbytes) for p in self._layers[moe_layer].parameters]

    def close(self) -> None:
        """Give the memory back."""
        self._views = {}
        self._slab = None


def slot_bytes(moe_layers: Sequence[MoeLayer]) -> int:
    """Bytes of one slot: the largest expert, rounded up to whole pages."""
    return -(-max(layer.slot_bytes for layer in moe_layers) // BLOCK_BYTES) * BLOCK_BYTES
