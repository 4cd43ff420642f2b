"""What autocast would have chosen, for our own autograd functions, which it does not reach into."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["product_dtype"]


def product_dtype(x: Tensor) -> torch.dtype:
    """Type in which a product with ``x`` is computed: autocast's where it is on, else that of ``x``."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
