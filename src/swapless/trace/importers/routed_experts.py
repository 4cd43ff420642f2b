"""The ``routed_experts`` that vLLM and SGLang return, in memory or saved as JSON: responses as they came, one a line.

Either hands out ints [tokens, blocks, K]; what a line may look like is in ``_answers``. Dense blocks come as zeros.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from swapless.errors import TraceFormatError, TraceMismatchError, TraceMissingError, TraceValueError, message
from swapless.notation import Phase
from swapless.trace.header import TraceHeader
from swapless.trace.importers._answers import SHAPE_STEP, Shape, answers_of
from swapless.trace.trace import Trace
from swapless.untrusted import MAX_BYTES, Table, parse_json, read_json

_SHAPE = ("num_experts", "top_k", "num_blocks")


def from_routed_experts(
    answers: Sequence[np.ndarray],
    *,
    num_experts: int,
    prompts: Sequence[np.ndarray] | None = None,
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
    prompts : sequence of int ndarray of shape (tokens, blocks, K), optional
        Rows of the prompts, where the server hands them out apart (vLLM 0.21: ``prompt_routed_experts``); ``answers`` then hold
        rows of generated tokens only, or none.
    prompt_tokens : sequence of int, optional
        Tokens of each prompt: they are prefill, those after them decode. All are prefill when left out, or as many as
        ``prompts`` have rows. An answer of fewer rows lacks those of its prompt, and is refused.
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
    if prompts is not None:
        arrays, prompt_tokens = _joined(prompts, arrays, prompt_tokens)
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
    counts = lengths if prompt_tokens is None else list(prompt_tokens)
    if len(counts) != len(lengths) or not all(0 <= p <= n for p, n in zip(counts, lengths)):
        what, step = (
            "prompt_tokens do not fit the answers.",
            "Give the prompts' rows as prompts, where the server has them apart.",
        )
        raise TraceValueError(message(what, got=counts[:8], allowed=f"up to {lengths[:8]}", step=step))
    codes = [np.repeat([int(Phase.PREFILL), int(Phase.DECODE)], [p, n - p]) for p, n in zip(counts, lengths)]
    header = TraceHeader(
        model_id=model_id, num_experts=num_experts, top_k=ids.shape[2], moe_blocks=tuple(blocks.tolist()), source=source
    )
    document = np.repeat(np.arange(len(arrays)), lengths)
    return Trace.from_arrays(header, expert_ids=ids[:, blocks], document=document, phase=np.concatenate(codes))


def _joined(prompts: Sequence[Any], arrays: list[np.ndarray], prompt_tokens: Any) -> tuple[list[np.ndarray], list[int]]:
    """Whole answers of rows that were apart, and the length of each prompt."""
    parts = [np.asarray(prompt) for prompt in prompts]
    lengths = [len(part) for part in parts if part.ndim == 3]
    if len(lengths) != len(arrays) or (prompt_tokens is not None and list(prompt_tokens) != lengths):
        what, got = "prompts do not fit the answers.", f"{len(parts)} prompts of {lengths[:8]} rows"
        allowed = f"{len(arrays)} arrays (tokens, blocks, K), as many rows as prompt_tokens"
        raise TraceValueError(message(what, got=got, allowed=allowed))
    for number, (part, array) in enumerate(zip(parts, arrays)):
        if array.size and array.shape[1:] != part.shape[1:]:
            where, theirs = f"answer {number}", part.shape[1:]
            raise TraceMismatchError(
                message("Prompt and answer of different models.", where=where, got=array.shape, allowed=theirs)
            )
    return [np.concatenate([part, array]) if array.size else part for part, array in zip(parts, arrays)], lengths


def matches(path: Path) -> bool:
    """Whether ``path`` begins with a JSON object of a server's answer, or of a shape, whatever its name."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        start = file.read(1 << 16).lstrip()
        if start[:1] not in (b"{", b"["):
            return False
        keys = (b'"routed_experts"', b'"prompt_routed_experts"')
        line, _, rest = start.partition(b"\n")
        if rest or len(start) < 1 << 16:
            try:
                if set(_SHAPE) <= set(json.loads(line)):
                    return True
            except (UnicodeDecodeError, ValueError, TypeError, RecursionError):
                pass
        while start:
            if any(key in start for key in keys):
                return True
            start = start[-32:] + more if (more := file.read(1 << 20)) else b""
    return False


def load(path: Path, model_id: str | None = None) -> Trace:
    """Responses of a server: JSON lines, or one JSON document that is a response or a list of them.

    Shape and model are those of a first line with ``num_experts``, ``top_k``, ``num_blocks`` and perhaps ``model_id``, or of
    the model's ``config.json`` beside the file.

    Raises
    ------
    TraceFormatError
        A line that is no such object, or bytes that do not fit the shape.
    TraceValueError
        Rows that do not fit the tokens.
    TraceMismatchError
        Answers of more than one model, where the lines name it (``model``).
    TraceMissingError
        No such file.
    """
    if not path.is_file():
        raise TraceMissingError(message("No such file.", where=path))
    shape, named = None, model_id
    rows, prompts = [], []
    for number, line in _objects(path):
        where = f"{path}, line {number}"
        if shape is None and set(_SHAPE) <= set(line):
            sizes = [line.integer(name, minimum=1, maximum=1 << 20) for name in _SHAPE]
            shape, named = Shape(*sizes), named or line.text("model_id", default=None)
            continue
        shape = shape or _shape_beside(path)
        for answer in answers_of(line, shape, where):
            named = named or answer.model
            if answer.model not in (None, named):
                what = "Answers of different models."
                raise TraceMismatchError(message(what, where=where, got=repr(answer.model), allowed=repr(named)))
            rows.append(answer.rows)
            prompts.append(answer.prompt)
    if shape is None:
        raise TraceFormatError(message("The file holds no answer.", where=path))
    return from_routed_experts(rows, num_experts=shape.num_experts, prompt_tokens=prompts, model_id=named)


def _objects(path: Path) -> Iterator[tuple[int, Table]]:
    """Objects of a file with the numbers of their lines; those of a list one by one."""
    with open(path, "rb") as file:
        first = file.readline(MAX_BYTES + 1)
        file.seek(0)
        if _is_json(first):
            for number, raw in enumerate(iter(lambda: file.readline(MAX_BYTES + 1), b""), start=1):
                if raw.strip():
                    yield from _tables(raw, path, number)
        else:  # a document over several lines
            yield from _tables(file.read(MAX_BYTES + 1), path, 1)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (UnicodeDecodeError, ValueError):
        return False
    except RecursionError:
        return True
    return True


def _tables(raw: bytes, path: Path, number: int) -> Iterator[tuple[int, Table]]:
    where = f"{path}, line {number}"
    value = parse_json(raw, where=where, error=TraceFormatError, what="JSON line")
    for item in value if isinstance(value, list) and value else [value]:
        if not isinstance(item, dict):
            what = "A line must be an object, or a list of them."
            raise TraceFormatError(message(what, where=where, got=type(item).__name__))
        yield number, Table(item, where=where, error=TraceFormatError)


_NAMES = {
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"),
    "top_k": ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k", "moe_topk"),
    "num_blocks": ("num_hidden_layers", "n_layer", "num_layers"),
}
"""What configurations of transformers call each of the sizes."""


def _shape_beside(path: Path) -> Shape:
    """The shape by the model's ``config.json`` beside the file."""
    place = path.parent / "config.json"
    if not place.is_file():
        what = "Nothing says how many experts the model has; answers do not."
        raise TraceFormatError(message(what, where=path, step=SHAPE_STEP))
    config = read_json(place, error=TraceFormatError, what="configuration", special_floats=True)
    if isinstance(config.raw("text_config", None), dict):
        config = config.table("text_config")
    found = {}
    for size, names in _NAMES.items():
        held = [name for name in names if config.raw(name, None) is not None]
        found[size] = config.integer(held[0], minimum=1, maximum=1 << 20) if held else None
    if found["num_experts"] is None:
        what = "The config.json beside the file names no number of experts."
        raise TraceFormatError(message(what, where=place, allowed=" or ".join(_NAMES["num_experts"]), step=SHAPE_STEP))
    return Shape(found["num_experts"], found["top_k"], found["num_blocks"])


class IMPORTER:
    """What the registry hands out."""

    reads = "lines of JSON with vLLM's or SGLang's routed_experts, the first with num_experts, top_k, num_blocks"
    matches = staticmethod(matches)
    load = staticmethod(load)
