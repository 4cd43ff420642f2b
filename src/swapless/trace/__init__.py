"""Traces: which experts a model chose, token by token; read, written, chosen from and imported."""

from __future__ import annotations

from swapless.trace.header import TraceHeader
from swapless.trace.parquet import TraceWriter, read_trace, write_trace
from swapless.trace.trace import Trace

__all__ = ["Trace", "TraceHeader", "TraceWriter", "read_trace", "write_trace"]
