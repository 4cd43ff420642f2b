"""Swapless: run Mixture-of-Experts language models in less memory than their weights.

    load(checkpoint, memory)    a transformers model whose experts stay on disk, under a byte budget
    plan(checkpoint, memory)    how fast a checkpoint would be here, and in which precision
    pack(checkpoint, out)       a checkpoint with fewer bits a weight
    record(model, ...)          which experts a loaded model routes to, as a trace
    read_trace, write_trace     a trace from its file, and into one
    Trace, TraceHeader          the routing itself, and what it says of its model
    errors                      every error that is raised on purpose; SwaplessError is the root

Importing this package imports neither torch nor transformers; its functions do, when they are called.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from swapless import errors
from swapless.errors import SwaplessError
from swapless.onednn import keep_few

if TYPE_CHECKING:
    from swapless import plan as plan
    from swapless.runtime.model import load as load
    from swapless.runtime.packing import pack as pack
    from swapless.runtime.record import record as record
    from swapless.trace import Trace as Trace
    from swapless.trace import TraceHeader as TraceHeader
    from swapless.trace import read_trace as read_trace
    from swapless.trace import write_trace as write_trace
else:

    def load(checkpoint, memory=None, **options):
        """An ordinary transformers model that holds its experts in a byte budget and reads the rest when needed.

        ``memory`` is what the whole process may hold, as ``"8GiB"``; ``resident="25%"`` in its place keeps that share of the
        experts. Further: ``policy``, ``prefetch``, ``context``, ``revision``, ``token``, ``dtype``, ``attn_implementation``,
        ``local_files_only``, ``progress``; ``help(swapless.runtime.load)`` explains each, and names the errors.

        ``model.swapless`` is the engine: ``stats()``, ``trace()``, ``budget``, ``close()``. The model is a context manager
        that closes itself.
        """
        from swapless.runtime.model import load as run

        return run(checkpoint, memory, **options)

    def pack(checkpoint, out, **options):
        """Write a checkpoint as a packed store into the folder ``out``, or go on with a run that was stopped there.

        ``bits`` of an expert's weights are 16, 8 (the default) or 4, with a scale for each ``group`` of them; ``dense_bits``
        are those of all others. ``help(swapless.runtime.packing.pack)`` explains each, and names the errors.
        """
        from swapless.runtime.packing import pack as run

        return run(checkpoint, out, **options)

    def record(model, tokenizer, documents, out, **options):
        """Run documents through a loaded model and write the routing as one trace; returns the rows written.

        Documents are texts, or ``swapless.runtime.record.Document(text, domain)``. Each is decoded token by token;
        ``decode_tokens`` reads it in one go instead and generates so many. ``help(swapless.runtime.record)`` explains each.
        """
        from swapless.runtime.record import record as run

        return run(model, tokenizer, documents, out, **options)

    def read_trace(path, **options):
        """Read a whole trace, checked; ``columns`` names the optional columns to read, by default all."""
        from swapless.trace import read_trace as run

        return run(path, **options)

    def write_trace(path, trace, **options):
        """Write a trace, whole or not at all."""
        from swapless.trace import write_trace as run

        return run(path, trace, **options)


keep_few()  # before the first product, which may not be ours

__version__ = "0.1.0"
__all__ = [
    "SwaplessError",
    "Trace",
    "TraceHeader",
    "__version__",
    "errors",
    "load",
    "pack",
    "plan",
    "read_trace",
    "record",
    "write_trace",
]

_LAZY = {"Trace": "swapless.trace:Trace", "TraceHeader": "swapless.trace:TraceHeader", "plan": "swapless.plan"}


def __dir__() -> list[str]:
    return sorted({name for name in globals() if name.startswith("__")} | set(__all__))


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        module, _, attribute = _LAZY[name].partition(":")
        found = import_module(module)
        return getattr(found, attribute) if attribute else found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
