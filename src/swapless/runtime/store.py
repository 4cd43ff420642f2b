"""What the engine asks of a store, whichever kind it is: the checkpoint's own files, or a packed store."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from swapless.store.checkpoint import Extent
from swapless.store.read import FileReader


class Store(Protocol):
    """Experts by (moe_layer, expert), read into slots from several threads at once."""

    reader: FileReader
    bounce_bytes: int

    def bounce_buffer(self) -> np.ndarray:
        """Scratch memory for one reader thread."""
        ...

    def extents(self, moe_layer: int, expert: int) -> list[Extent]:
        """The ranges that are fetched for one expert, one read each."""
        ...

    def parts(self, moe_layer: int, expert: int) -> int:
        """Into how many parts, read independently of each other, the expert is cut."""
        ...

    def read_part(self, moe_layer: int, expert: int, part: int, slot: np.ndarray, bounce: np.ndarray) -> int:
        """Fill the places of one part in ``slot``; returns the bytes fetched."""
        ...

    def close(self) -> None:
        """Close the files."""
        ...
