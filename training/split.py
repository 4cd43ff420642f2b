"""Which documents a model may train on: the package's own rule, under the name that the scripts here know."""

from __future__ import annotations

from swapless.oracle.split import HELD_OUT_FRACTION, MIN_HELD_OUT_DOCUMENTS, document_score, held_out_mask

__all__ = ["HELD_OUT_FRACTION", "MIN_HELD_OUT_DOCUMENTS", "document_score", "held_out_mask"]
