"""The one alphabet of the project: every letter used in code, suffixes, annotations and documents.

B sequences, T tokens, L MoE layers, E routed experts a layer, K experts a token (top-k), C capacity in experts,
S segment length in tokens, D hidden size, F expert inner size. ``moe_layer`` runs 0..L-1 and ``block`` is the index in the
checkpoint; the two differ wherever a model has dense blocks, so neither is ever called plain ``layer``.
"""

from __future__ import annotations

from enum import IntEnum

NO_EXPERT = -1
"""Marks an unused place among the K expert ids of a token (a router that skips, or drops over capacity)."""


class Phase(IntEnum):
    """What a forward call does: prefill reads many tokens at once, decode one token a sequence."""

    PREFILL = 0
    DECODE = 1

    @property
    def label(self) -> str:
        """Name in traces and documents, ``prefill`` or ``decode``."""
        return self.name.lower()
