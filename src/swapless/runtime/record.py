"""Record a trace from a live model: real prefill, real decode steps, the model's output unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from swapless.errors import TraceValueError, message
from swapless.runtime.routers import RouterTap
from swapless.trace import Trace, TraceWriter


class Document(NamedTuple):
    """A text to record, and the domain it belongs to, if any."""

    text: str
    domain: str | None = None


def record(
    model: Any,
    tokenizer: Any,
    documents: Iterable[Document],
    out: str | Path,
    *,
    decode_tokens: int = 0,
    max_tokens: int | None = None,
    scores: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Run every document through ``model`` and write the routing as one trace.

    A document is read in one prefill; ``decode_tokens`` more are then generated greedily, one real decode step each (fewer
    where the model ends its text).

    Parameters
    ----------
    model : PreTrainedModel
        From :func:`swapless.load`, at any residency: the routing does not depend on it.
    tokenizer : PreTrainedTokenizer
        The model's own.
    documents : iterable of Document
        Texts; one that has no token is an error, none is skipped.
    out : path
        The Parquet file, whole or not written at all.
    decode_tokens : int
        Tokens to generate after each document.
    max_tokens : int, optional
        Cut a document after so many tokens; by default what the context leaves beside ``decode_tokens``.
    scores : bool
        Keep the router's output for every expert too.
    progress : callable of (documents, tokens), optional
        Told after every document.

    Returns
    -------
    int
        Rows written.

    Raises
    ------
    TraceValueError
        An empty document, no document, or ``scores`` of a family whose router does not show them.
    """
    engine = model.swapless
    room = engine.budget.context_tokens - decode_tokens
    limit = room if max_tokens is None else min(room, max_tokens)
    if limit < 1:
        raise TraceValueError(
            message(
                "The context leaves no room for a document.", got=f"{decode_tokens} tokens to decode", allowed=f"below {room}"
            )
        )
    tap = RouterTap(model) if scores else None
    engine.record_scores(tap)
    writer: TraceWriter | None = None
    try:
        for number, document in enumerate(documents):
            trace = _one(model, tokenizer, document, number, limit, decode_tokens)
            if writer is None:
                writer = TraceWriter(out, trace.header)
            writer.write(trace)
            if progress:
                progress(number + 1, writer.num_tokens)
    except BaseException as error:
        if writer is not None:
            writer.__exit__(type(error), error, error.__traceback__)
        raise
    finally:
        engine.record_scores(None)
        if tap is not None:
            tap.remove()
    if writer is None:
        raise TraceValueError(message("There is no document to record.", where=out))
    writer.__exit__(None, None, None)
    return writer.num_tokens


@torch.no_grad()
def _one(model: Any, tokenizer: Any, document: Document, number: int, limit: int, decode_tokens: int) -> Trace:
    ids = tokenizer(document.text, return_tensors="pt", truncation=True, max_length=limit)["input_ids"]
    if ids.shape[1] == 0:
        raise TraceValueError(message("An empty document has no routing.", where=f"document {number}", got=document.text[:40]))
    model.swapless.reset_trace()
    if decode_tokens:
        # The last generated token is never fed back, so one more is asked for than steps are wanted.
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=decode_tokens + 1, do_sample=False)
    else:
        model(input_ids=ids, use_cache=False)
    trace = model.swapless.trace()
    tokens = tokenizer.convert_ids_to_tokens(trace.token_id.tolist())
    return replace(
        trace,
        document=np.full(len(trace), number, np.int32),
        domain=np.full(len(trace), -1 if document.domain is None else 0, np.int32),
        domains=() if document.domain is None else (document.domain,),
        token=pa.array(tokens, pa.string()),
    )
