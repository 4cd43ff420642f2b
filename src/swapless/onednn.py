"""How much code oneDNN, which computes torch's products in 16 bits, keeps of shapes that it has met.

It compiles a product for every shape and keeps 1,024 of them by default, up to 1 MiB each on processors with a matrix unit: a
gigabyte that no memory budget holds, and that appears nowhere. It looks at the environment once, at the first product of a
process, so that is where the bound has to be by then. What is not kept is compiled again, in about a millisecond.
"""

from __future__ import annotations

import os

FEW = 64
"""Shapes kept where a model runs: a decode step has a few dozen."""

_MANY = 1024
_VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # of oneDNN, and of torch's own layer above it


def keep_few() -> None:
    """Bound what is kept, unless the environment says how much."""
    for name in _VARIABLES:
        os.environ.setdefault(name, str(FEW))


def keep_many() -> None:
    """For training, which has memory and meets hundreds of shapes a step: oneDNN's default, unless it was said how much."""
    for name in _VARIABLES:
        if os.environ.get(name) == str(FEW):
            os.environ[name] = str(_MANY)


def kept() -> int:
    """Shapes kept, as the environment has it."""
    text = os.environ.get(_VARIABLES[0], "")
    return int(text) if text.isdecimal() else _MANY
