"""Record a trace from a live model: real prefill, real decode steps, the model's output unchanged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from swapless.errors import TraceValueError, message
from swapless.runtime.one_sequence import decode_steps, plain_settings
from swapless.runtime.routers import RouterTap
from swapless.trace import Trace, TraceWriter
from swapless.untrusted import shown

_LOG = logging.getLogger(__name__)


class Document(NamedTuple):
    """A text to record, and the domain it belongs to, if any."""

    text: str
    domain: str | None = None


def record(
    model: Any,
    tokenizer: Any,
    documents: Iterable[Document | str],
    out: str | Path,
    *,
    decode_tokens: int | None = None,
    max_tokens: int | None = None,
    scores: bool = False,
    progress: Callable[[float, int], None] | None = None,
) -> int:
    """Run every document through ``model`` and write the routing as one trace.

    By default a document is decoded, token by token: its first token is prefill, every other a real decode step. With
    ``decode_tokens`` it is read in one prefill, and so many tokens are then generated greedily, one real decode step each
    (fewer where the model ends its text).

    Parameters
    ----------
    model : PreTrainedModel
        From :func:`swapless.load`, at any residency: the routing does not depend on it.
    tokenizer : PreTrainedTokenizer
        The model's own.
    documents : iterable of Document or str
        Texts; one that has no token is an error, none is skipped.
    out : path
        The Parquet file, whole or not written at all.
    decode_tokens : int, optional
        Read a document in one go and generate so many tokens after it; 0 only reads.
    max_tokens : int, optional
        Cut a document after so many tokens; by default what the context leaves beside ``decode_tokens``, with a warning
        (of the logger ``swapless``) where that cuts one.
    scores : bool
        Keep the router's output for every expert too.
    progress : callable of (documents, tokens), optional
        Told while documents are decoded: those that are finished, with the share of the present one, and the rows so far.

    Returns
    -------
    int
        Rows written.

    Raises
    ------
    TraceValueError
        An empty document, no document, one whose routing is more than can be kept, or ``scores`` of a family whose router
        does not show them.
    """
    engine = model.swapless
    context = engine.budget.context_tokens
    room = context - (decode_tokens or 0)
    limit = room if max_tokens is None else min(room, max_tokens)
    if limit < 1:
        raise TraceValueError(
            message(
                "The context leaves no room for a document.",
                got=f"{decode_tokens} tokens to decode",
                allowed=f"below {context}",
                step="Decode fewer, or raise --context.",
            )
        )
    tell = progress or (lambda documents, tokens: None)
    tap = RouterTap(model) if scores else None
    engine.record_scores(tap)
    writer: TraceWriter | None = None
    cut: list[int] = []
    try:
        for number, given in enumerate(documents):
            document = Document(given) if isinstance(given, str) else given
            rows = 0 if writer is None else writer.num_tokens
            ids = _ids(tokenizer, document, number)
            if len(ids) > limit and max_tokens is None:
                cut.append(len(ids) - limit)
            _run(model, ids[:limit], decode_tokens, _counted(tell, number, rows, min(len(ids), limit) + (decode_tokens or 0)))
            trace = _trace(model, tokenizer, document, number)
            if writer is None:
                writer = TraceWriter(out, trace.header)
            writer.write(trace)
            tell(number + 1, writer.num_tokens)
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
    if cut:
        what = "1 document was" if len(cut) == 1 else f"{len(cut)} documents were"
        step = "Raise --context, or say --max-tokens."
        _LOG.warning("%s cut at the context of %d tokens, the longest by %d tokens. %s", what, limit, max(cut), step)
    return writer.num_tokens


def _ids(tokenizer: Any, document: Document, number: int) -> list[int]:
    ids: list[int] = tokenizer(document.text)["input_ids"]
    if not ids:
        raise TraceValueError(
            message("The document has no tokens, and so no routing.", where=f"document {number}", got=shown(document.text))
        )
    return ids


def _counted(tell: Callable[[float, int], None], document: int, rows: int, tokens: int) -> Callable[[int], None]:
    """What is told of the tokens of one document, as word of all."""
    return lambda done: tell(document + min(done, tokens) / (tokens + 1), rows + done)


@torch.no_grad()
def _run(model: Any, ids: list[int], decode_tokens: int | None, tell: Callable[[int], None]) -> None:
    """The forward calls of one document; the engine keeps their routing."""
    model.swapless.reset_trace()
    if decode_tokens is None:
        for done, _ in enumerate(decode_steps(model, ids), start=1):
            tell(done)
        return
    whole = torch.tensor([ids])
    if not decode_tokens:
        model(input_ids=whole, use_cache=False)
        return
    # The last generated token is never fed back, so one more is asked for than steps are wanted.
    settings, _ = plain_settings(model.generation_config)
    model.generate(
        whole,
        attention_mask=torch.ones_like(whole),
        max_new_tokens=decode_tokens + 1,
        do_sample=False,
        use_cache=True,
        streamer=_Counter(tell),
        **settings,
    )


class _Counter:
    """A streamer that counts: transformers hands it the prompt, then token after token."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self._tell, self._tokens = tell, 0

    def put(self, value: torch.Tensor) -> None:
        """Tokens that were read or generated."""
        self._tokens += value.numel()
        self._tell(self._tokens)

    def end(self) -> None:
        """The text is over."""


def _trace(model: Any, tokenizer: Any, document: Document, number: int) -> Trace:
    trace = model.swapless.trace()
    if trace.header.notes:  # so no row is missing from a file that says nothing of it
        raise TraceValueError(
            message("The routing of a document was not kept whole.", where=f"document {number}", got=trace.header.notes)
        )
    tokens = tokenizer.convert_ids_to_tokens(trace.token_id.tolist())
    return replace(
        trace,
        document=np.full(len(trace), number, np.int32),
        domain=np.full(len(trace), -1 if document.domain is None else 0, np.int32),
        domains=() if document.domain is None else (document.domain,),
        token=pa.array(tokens, pa.string()),
    )
