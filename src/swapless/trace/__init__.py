"""Traces: which experts a model chose, token by token; read, written, chosen from and imported."""

from __future__ import annotations

from swapless.trace.header import TraceHeader
from swapless.trace.parquet import TraceWriter, read_trace, write_trace
from swapless.trace.select import concatenate, select, split
from swapless.trace.stream import TraceFile
from swapless.trace.trace import Trace

__all__ = ["Trace", "TraceFile", "TraceHeader", "TraceWriter", "concatenate", "read_trace", "select", "split", "write_trace"]
