"""Segment lengths as people give them."""

from __future__ import annotations

from typing import Any

import numpy as np

from swapless.errors import UsageError, message
from swapless.trace import Trace

LONGEST = 65536
"""Tokens of the longest segment: tables of so many counts an expert are made."""


def check_segments(segments: Any) -> list[int]:
    """Segment lengths in tokens, as a list of ints.

    Raises
    ------
    UsageError
        None, or one that is no int from 1 to :data:`LONGEST`.
    """
    lengths = [segments] if isinstance(segments, (int, np.integer)) else list(segments)
    if not lengths or any(isinstance(m, bool) or not isinstance(m, (int, np.integer)) or m < 1 for m in lengths):
        raise UsageError(message("Segment lengths must be ints of at least 1.", got=repr(segments), allowed="4,16,64,256"))
    if max(lengths) > LONGEST:
        raise UsageError(message("A segment is too long.", got=max(lengths), allowed=f"1 to {LONGEST} tokens"))
    return [int(m) for m in lengths]


def layer_ids(piece: Trace, moe_layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids (T, K) of one MoE layer, int16 in one piece, as the kernels trust them, and the document offsets.

    Raises
    ------
    UsageError
        An id out of range, or twice in one token: the trace was never checked, or was changed since.
    """
    from swapless.arrays import want, want_ids  # not before a measure is called: they are compiled

    ids = np.ascontiguousarray(want(piece.expert_ids, "expert_ids", np.int16, (len(piece), None, None))[:, moe_layer])
    return want_ids(ids, piece.num_experts), piece.document_offsets
