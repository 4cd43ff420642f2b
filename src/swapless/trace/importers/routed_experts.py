"""The ``routed_experts`` arrays that vLLM and SGLang return, in memory or saved one answer a line as JSON.

vLLM hands out an int array [tokens, blocks, K] for each answer, SGLang the same as base64 of int32 in ``meta_info``. Rows are
the prompt's tokens and then the generated ones but the last, whose routing never ran. Dense blocks come as zeros.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from swapless.errors import TraceFormatError, TraceMismatchError, TraceValueError, message
from swapless.notation import Phase
from swapless.trace.header import TraceHeader
from swapless.trace.trace import Trace

_SHAPE = ("num_experts", "top_k", "num_blocks")


def from_routed_experts(
    answers: Sequence[np.ndarray],
    *,
    num_experts: int,
    prompt_tokens: Sequence[int] | None = None,
    model_id: str | None = None,
    source: str = "routed_experts",
) -> Trace:
    """Trace of the arrays of several answers, one document each.

    Parameters
    ----------
    answers : sequence of int ndarray of shape (tokens, blocks, K)
        As the server returned them. Blocks that are zero everywhere are dense and left out.
    num_experts : int
        E; the arrays do not say it.
    prompt_tokens : sequence of int, optional
        Tokens of each prompt: they are prefill, those after them decode. All are prefill when left out.
    model_id : str, optional
        The model.

    Raises
    ------
    TraceMismatchError
        Answers with different blocks or K.
    TraceValueError
        An empty answer, an unfilled row (an expert twice), an id out of range.
    """
    if not answers:
        raise TraceValueError(message("There is no answer.", got="0 arrays"))
    arrays = [np.asarray(answer) for answer in answers]
    for number, array in enumerate(arrays):
        if array.ndim != 3 or array.dtype.kind not in "iu":
            got = f"{array.dtype} {array.shape}"
            raise TraceValueError(message("An answer must be ints [tokens, blocks, K].", where=f"answer {number}", got=got))
        if len(array) == 0:
            raise TraceValueError(message("A document without tokens.", where=f"answer {number}"))
        if array.shape[1:] != arrays[0].shape[1:]:
            where, allowed = f"answer {number}", arrays[0].shape[1:]
            raise TraceMismatchError(message("Answers of different models.", where=where, got=array.shape[1:], allowed=allowed))
    ids = np.concatenate(arrays)
    dense = (ids == 0).all(axis=(0, 2)) if ids.shape[2] > 1 else np.zeros(ids.shape[1], np.bool_)
    blocks = np.flatnonzero(~dense)
    lengths = [len(array) for array in arrays]
    prompts = lengths if prompt_tokens is None else list(prompt_tokens)
    if len(prompts) != len(lengths) or not all(0 <= p <= n for p, n in zip(prompts, lengths)):
        raise TraceValueError(message("prompt_tokens do not fit the answers.", got=prompts[:8], allowed=f"up to {lengths[:8]}"))
    codes = [np.repeat([int(Phase.PREFILL), int(Phase.DECODE)], [p, n - p]) for p, n in zip(prompts, lengths)]
    header = TraceHeader(
        model_id=model_id, num_experts=num_experts, top_k=ids.shape[2], moe_blocks=tuple(blocks.tolist()), source=source
    )
    document = np.repeat(np.arange(len(arrays)), lengths)
    return Trace.from_arrays(header, expert_ids=ids[:, blocks], document=document, phase=np.concatenate(codes))


def matches(path: Path) -> bool:
    """Whether the first line of ``path`` is a JSON object with ``num_experts``, ``top_k`` and ``num_blocks``."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        start = file.readline(65536)
    try:
        first = json.loads(start)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        return False
    return isinstance(first, dict) and set(_SHAPE) <= set(first)


def load(path: Path, model_id: str | None = None) -> Trace:
    """A file of JSON lines: the shape first, then one answer a line.

    The first line holds ``num_experts``, ``top_k``, ``num_blocks`` and perhaps ``model_id``; each other line
    ``routed_experts`` (a nested list, or base64 of int32), at its top or in ``meta_info``, and perhaps ``prompt_tokens``.

    Raises
    ------
    TraceFormatError
        A line that is no such object, or bytes that do not fit the shape.
    TraceMismatchError
        Answers of more than one model, where the lines name it (``model``).
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise TraceFormatError(message("Not UTF-8 text.", where=path, got=str(error))) from error
    shape = _object(lines[0] if lines else "", path, 1)
    wrong = [name for name in _SHAPE if not (_is_int(shape.get(name)) and shape[name] > 0)]
    if wrong:
        what = "The first line lacks the shape."
        raise TraceFormatError(message(what, where=path, got=", ".join(wrong), allowed="ints of at least 1"))
    named = model_id or shape.get("model_id")
    answers, prompts = [], []
    for number, text in enumerate(lines[1:], start=2):
        if not text.strip():
            continue
        line, where = _object(text, path, number), f"{path}, line {number}"
        inner = {**line, **line["meta_info"]} if isinstance(line.get("meta_info"), dict) else line
        answer = _decoded(inner.get("routed_experts"), shape, where)
        if len(answer) == 0:
            raise TraceValueError(message("A document without tokens.", where=where))
        prompt = inner.get("prompt_tokens", len(answer))
        if not _is_int(prompt) or prompt < 0:
            raise TraceFormatError(message("prompt_tokens is no count.", where=where, got=repr(prompt)))
        named = named or inner.get("model")
        if inner.get("model", named) != named:
            what = "Answers of different models."
            raise TraceMismatchError(message(what, where=where, got=repr(inner["model"]), allowed=repr(named)))
        answers.append(answer)
        # The last token of an answer never ran, so a prompt may be one longer than its rows.
        prompts.append(min(len(answer), prompt))
    return from_routed_experts(answers, num_experts=shape["num_experts"], prompt_tokens=prompts, model_id=named)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _object(text: str, path: Path, number: int) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise TraceFormatError(message("Not a JSON line.", where=f"{path}, line {number}", got=str(error))) from error
    if not isinstance(value, dict):
        raise TraceFormatError(message("A line must be an object.", where=f"{path}, line {number}", got=type(value).__name__))
    return value


def _decoded(value: Any, shape: dict[str, Any], where: str) -> np.ndarray:
    if isinstance(value, str):
        try:
            flat = np.frombuffer(base64.b64decode(value, validate=True), "<i4")
        except (binascii.Error, ValueError) as error:
            raise TraceFormatError(message("routed_experts is no base64 of int32.", where=where, got=str(error))) from error
        row = shape["num_blocks"] * shape["top_k"]
        if len(flat) % row:
            raise TraceFormatError(message("routed_experts does not fit the shape.", where=where, got=f"{len(flat)} ids"))
        return flat.reshape(-1, shape["num_blocks"], shape["top_k"])
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise TraceFormatError(message("routed_experts is ragged.", where=where, got=str(error))) from error
    if value == []:
        return np.zeros((0, shape["num_blocks"], shape["top_k"]), np.int32)
    if array.ndim != 3 or array.dtype.kind not in "iu" or array.shape[1:] != (shape["num_blocks"], shape["top_k"]):
        got = f"{array.dtype} {array.shape}"
        raise TraceFormatError(message("routed_experts does not fit the shape.", where=where, got=got))
    return array


class IMPORTER:
    """What the registry hands out."""

    matches = staticmethod(matches)
    load = staticmethod(load)
