"""What inference servers say of one answer, in the forms that they have for it: rows of ids, and how many tokens there were.

Rows are tokens in order: the prompt's, then the generated ones but the last, whose routing never ran. SGLang and vLLM's
array for a whole sequence hold them all; vLLM 0.21 holds the prompt's rows apart (``prompt_routed_experts``), and each choice
those of its generated tokens. Which of the two it is cannot be seen in an array, so lengths are held against the tokens.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from swapless.errors import TraceFormatError, TraceValueError, message
from swapless.untrusted import Table, shown


class Shape(NamedTuple):
    """E, K and the number of blocks; None for what is not known."""

    num_experts: int
    top_k: int | None = None
    num_blocks: int | None = None


class Answer(NamedTuple):
    """Rows (tokens, blocks, K) of one answer, how many of them are the prompt's, and the model if it is named."""

    rows: np.ndarray
    prompt: int
    model: str | None


def answers_of(line: Table, shape: Shape, where: str) -> Iterator[Answer]:
    """The answers of one response, each choice one.

    Raises
    ------
    TraceFormatError
        No routing, or bytes that do not fit the shape.
    TraceValueError
        Rows that do not fit the tokens.
    """
    if "choices" in line:
        yield from _choices(line, shape, where)
        return
    inner = line
    if isinstance(line.raw("meta_info", None), dict):
        inner = Table({**line.value, **line.value["meta_info"]}, where=where, error=TraceFormatError)
    prompt = _rows_under(inner, "prompt_routed_experts", shape, where)
    rows = _rows_under(inner, "routed_experts", shape, where)
    if rows is None:
        got = ", ".join(list(line)[:8]) or "no key"
        what = "routed_experts does not fit the shape: the line has none."
        raise TraceFormatError(message(what, where=where, got=shown(got)))
    before, after = _count(inner, "prompt_tokens"), _count(inner, "completion_tokens")
    yield _whole(prompt, rows, before, after, inner.text("model", default=None), where)


def _choices(line: Table, shape: Shape, where: str) -> Iterator[Answer]:
    choices = line.tables("choices", minimum=1)
    usage = line.table("usage") if isinstance(line.raw("usage", None), dict) else None
    prompt_tokens, generated = (_count(usage, name) for name in ("prompt_tokens", "completion_tokens"))
    if prompt_tokens is None and isinstance(line.raw("prompt_token_ids", None), list):
        prompt_tokens = len(line.items("prompt_token_ids"))
    prompt = _rows_under(line, "prompt_routed_experts", shape, where)
    total = 0
    for number, choice in enumerate(choices):
        place = where if len(choices) == 1 else f"{where}, choice {number}"
        rows = _rows_under(choice, "routed_experts", shape, place)
        tokens = generated if len(choices) == 1 else None
        if isinstance(choice.raw("token_ids", None), list):
            tokens = len(choice.items("token_ids"))
        if rows is None and prompt is not None and tokens is not None and tokens <= 1:
            rows = prompt[:0]  # one token was generated, and it never ran
        if rows is None:
            raise TraceFormatError(message("A choice has no routed_experts.", where=place, step="Ask the server for them."))
        if prompt is None and prompt_tokens is None:
            what = "Whether the rows hold the prompt's cannot be told: neither usage nor prompt_routed_experts is there."
            raise TraceFormatError(message(what, where=place))
        answer = _whole(prompt, rows, prompt_tokens, tokens, line.text("model", default=None), place)
        total += len(answer.rows) - answer.prompt
        yield answer
    if len(choices) > 1 and generated is not None and not generated - len(choices) <= total <= generated:
        what = "The choices have other rows than usage counts generated tokens."
        raise TraceValueError(message(what, where=where, got=total, allowed=f"{generated} less one a choice"))


def _whole(
    prompt: np.ndarray | None, rows: np.ndarray, before: int | None, after: int | None, model: str | None, where: str
) -> Answer:
    """One answer of what a server said: rows apart or together, tokens of the prompt, tokens that were generated."""
    if prompt is not None:
        rows = rows if rows.size else prompt[:0]
        if rows.shape[1:] != prompt.shape[1:]:
            what, got = "routed_experts and prompt_routed_experts have different shapes.", f"{rows.shape} and {prompt.shape}"
            raise TraceFormatError(message(what, where=where, got=got))
        before = len(prompt) if before is None else before
        if len(prompt) != before:
            what = "prompt_routed_experts has another number of rows than the prompt has tokens."
            raise TraceValueError(message(what, where=where, got=len(prompt), allowed=before))
        if after is not None and len(rows) not in (after - 1, after):
            if len(rows) in (before + after - 1, before + after) and np.array_equal(rows[:before], prompt):
                return Answer(rows, before, model)  # the whole sequence, and the prompt's rows once more
            what = "routed_experts has another number of rows than tokens were generated."
            raise TraceValueError(message(what, where=where, got=len(rows), allowed=_either(after)))
        rows = np.concatenate([prompt, rows])
    elif before is not None and after is not None and len(rows) not in (before + after - 1, before + after):
        missing = len(rows) in (after - 1, after)
        what = "routed_experts has another number of rows than there are tokens."
        if missing:
            what = "routed_experts lacks the prompt's rows."
        step = "Keep prompt_routed_experts beside it: vLLM 0.21 returns the prompt's rows apart." if missing else None
        raise TraceValueError(message(what, where=where, got=len(rows), allowed=_either(before + after), step=step))
    elif before is not None and len(rows) < before - 1:
        what = "routed_experts has fewer rows than the prompt has tokens; the prompt's may be missing."
        raise TraceValueError(message(what, where=where, got=len(rows), allowed=f"at least {before - 1}"))
    if len(rows) == 0:
        raise TraceValueError(message("A document without tokens.", where=where))
    return Answer(rows, len(rows) if before is None else min(before, len(rows)), model)


def _either(tokens: int) -> str:
    return f"{max(0, tokens - 1)} (the last token never ran) or {tokens}"


def _count(table: Table | None, name: str) -> int | None:
    return None if table is None or table.raw(name, None) is None else table.integer(name)


def _rows_under(table: Table, name: str, shape: Shape, where: str) -> np.ndarray | None:
    value = table.raw(name, None)
    if value is None:
        return None
    array = _decoded(value, name, shape, where)
    wrong = array.ndim != 3 or array.dtype.kind not in "iu" or not array.shape[2]
    for wanted, got in zip((shape.num_blocks, shape.top_k), array.shape[1:]):
        wrong = wrong or wanted not in (None, got)
    if wrong:
        got, allowed = f"{array.dtype} {array.shape}", f"ints (tokens, {shape.num_blocks or 'blocks'}, {shape.top_k or 'K'})"
        raise TraceFormatError(message(f"{name} does not fit the shape.", where=where, got=got, allowed=allowed))
    return array


def _decoded(value: Any, name: str, shape: Shape, where: str) -> np.ndarray:
    if not isinstance(value, str):
        if value == []:
            return np.zeros((0, shape.num_blocks or 0, shape.top_k or 1), np.int32)
        try:
            return np.asarray(value)
        except ValueError as error:
            raise TraceFormatError(message(f"{name} is ragged.", where=where, got=shown(error))) from error
    try:
        raw = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise TraceFormatError(message(f"{name} is no base64.", where=where, got=shown(error))) from error
    if raw.startswith(np.lib.format.MAGIC_PREFIX):
        return _saved(raw, name, where)
    if len(raw) % 4:
        raise TraceFormatError(message(f"{name} is no base64 of int32.", where=where, got=f"{len(raw)} bytes"))
    flat = np.frombuffer(raw, "<i4")
    if shape.num_blocks is None or shape.top_k is None:
        what = f"{name} is flat, and nothing says how many blocks and experts a token there are."
        raise TraceFormatError(message(what, where=where, step=SHAPE_STEP))
    if len(flat) % (shape.num_blocks * shape.top_k):
        raise TraceFormatError(message(f"{name} does not fit the shape.", where=where, got=f"{len(flat)} ids"))
    return flat.reshape(-1, shape.num_blocks, shape.top_k)


SHAPE_STEP = "Put the model's config.json beside the file, or begin it with a line of num_experts, top_k and num_blocks."


def _saved(raw: bytes, name: str, where: str) -> np.ndarray:
    """The array of an ``.npy`` file; what its header claims is held against its bytes first."""
    file = io.BytesIO(raw)
    try:
        version = np.lib.format.read_magic(file)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        sizes, by_column, dtype = reader(file)
    except (ValueError, EOFError) as error:
        raise TraceFormatError(message(f"{name} is no array that numpy saved.", where=where, got=shown(error))) from error
    held = len(raw) - file.tell()
    cells = 1
    for size in sizes:
        cells *= int(size)
    if dtype.kind not in "iu" or by_column or cells * dtype.itemsize != held:
        got = f"{dtype} {shown(sizes)} in {held} bytes"
        raise TraceFormatError(message(f"{name} does not fit its own header.", where=where, got=got))
    return np.frombuffer(raw, dtype, offset=file.tell()).reshape(sizes)
