"""The words to type for a set-up, ready for a shell."""

from __future__ import annotations

import shlex
from pathlib import PurePath

from swapless.cache import DEFAULT_POLICY
from swapless.runtime.parts import AUTO_PREFETCH
from swapless.units import exact_size


def commands(
    name: str,
    memory_bytes: int,
    *,
    pack: tuple[int, int] | None = None,
    prefetch: str = AUTO_PREFETCH,
    policy: str = DEFAULT_POLICY,
    context: int | None = None,
    check: str | None = None,
) -> tuple[str, ...]:
    """Command lines that run checkpoint ``name`` so; the first one packs it where ``pack`` gives bits and dense bits.

    Examples
    --------
    >>> commands("owner/model", 8 << 30, pack=(4, 8))[0]
    'swapless pack owner/model --bits 4 --dense-bits 8 --out model-4-8bit'
    """
    lines = []
    if pack is not None:
        bits, dense_bits = pack
        store = f"{PurePath(name).name}-{bits}-{dense_bits}bit"
        lines.append(["swapless", "pack", name, "--bits", f"{bits}", "--dense-bits", f"{dense_bits}", "--out", store])
        name = store
    run = ["swapless", "run", name, "--memory", exact_size(memory_bytes)]
    if prefetch != AUTO_PREFETCH:
        run += ["--prefetch", prefetch]
    if policy != DEFAULT_POLICY:
        run += ["--policy", policy]
    if context is not None:
        run += ["--context", f"{context}"]
    if check is not None:
        run += ["--check", check]
    return tuple(shlex.join(line) for line in [*lines, [*run, "--prompt", "..."]])
