"""Segment lengths as people give them."""

from __future__ import annotations

from typing import Any

import numpy as np

from swapless.errors import UsageError, message


def check_segments(segments: Any) -> list[int]:
    """Segment lengths in tokens, as a list of ints.

    Raises
    ------
    UsageError
        None, or one that is no int of at least 1.
    """
    lengths = [segments] if isinstance(segments, (int, np.integer)) else list(segments)
    if not lengths or any(isinstance(m, bool) or not isinstance(m, (int, np.integer)) or m < 1 for m in lengths):
        raise UsageError(message("Segment lengths must be ints of at least 1.", got=repr(segments), allowed="4,16,64,256"))
    return [int(m) for m in lengths]
