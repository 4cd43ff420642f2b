"""The CSV folders of MoE-Beyond: one file a prompt, one row a (MoE layer, token), expert ids as text in brackets."""

from __future__ import annotations

import csv
import itertools
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from swapless.errors import TraceFormatError, TraceMismatchError, TraceValueError, message
from swapless.notation import NO_EXPERT, Phase
from swapless.trace.header import TraceHeader
from swapless.trace.trace import Trace

_LOG = logging.getLogger(__name__)

COLUMNS = ("Layer ID", "Token", "Activated Expert IDs")
NUM_EXPERTS = 64
"""E of DeepSeek-V2-Lite, the one model whose traces exist in this form; the files do not say it."""


class Prompt(NamedTuple):
    """One file: tokens (numbers of rows, where they hold nothing else), block indices, and ids of shape (T, L, K)."""

    tokens: list[str]
    blocks: tuple[int, ...]
    ids: np.ndarray


def matches(path: Path) -> bool:
    """Whether ``path`` is a folder that holds a CSV file with the known columns, or is such a file itself."""
    return any(set(COLUMNS) <= {_plain(name) for name in _first_line(file)} for file in _files(path))


def _plain(name: str) -> str:
    """A column's name without what stands in brackets behind it, as in ``Token(index)``."""
    return name.split("(")[0].strip()


def _first_line(file: Path) -> list[str]:
    with open(file, encoding="utf-8", errors="replace", newline="") as lines:
        try:
            return next(csv.reader(lines), [])
        except csv.Error:  # no CSV, whatever its name says: not ours
            return []


def load(path: Path, model_id: str | None = None, *, num_experts: int = NUM_EXPERTS) -> Trace:
    """All prompts of a folder (or one file), in the order of the numbers in their names; documents count from 0.

    Raises
    ------
    TraceFormatError
        No CSV file, missing columns, or ids that are no list.
    TraceValueError
        A MoE layer or a row missing, another number of ids, an id out of range, an empty file; file, layer and row are named.
    TraceMismatchError
        Files with different MoE layers or K.
    """
    files = list(_files(path))
    if not files:
        raise TraceFormatError(message("The folder holds no CSV file.", where=path))
    prompts = [read_prompt(file) for file in files]
    for file, prompt in zip(files, prompts):
        for what, ours, theirs in (
            ("MoE layers", prompt.blocks, prompts[0].blocks),
            ("ids a token", prompt.ids.shape[2], prompts[0].ids.shape[2]),
        ):
            if ours != theirs:
                text = f"The files of a folder differ in their {what}."
                raise TraceMismatchError(message(text, where=file.name, got=ours, allowed=f"{theirs}, as in {files[0].name}"))
    header = TraceHeader(
        model_id=model_id,
        num_experts=num_experts,
        top_k=prompts[0].ids.shape[2],
        moe_blocks=prompts[0].blocks,
        expert_order="as recorded",
        source=f"MoE-Beyond CSV folder of {len(files)} prompts",
    )
    for file, prompt in zip(files, prompts):
        _check_range(file, prompt, num_experts)
    return Trace.from_arrays(
        header,
        expert_ids=np.concatenate([prompt.ids for prompt in prompts]),
        document=np.repeat(np.arange(len(prompts)), [len(prompt.tokens) for prompt in prompts]),
        phase=Phase.PREFILL,
        token=_texts(path, prompts),
    )


def _texts(path: Path, prompts: list[Prompt]) -> list[str] | None:
    """Tokens of all prompts, None where the files number their rows instead of saying the tokens."""
    numbered = [prompt.tokens == [str(row) for row in range(len(prompt.tokens))] for prompt in prompts]
    if not all(numbered):
        return [token for prompt in prompts for token in prompt.tokens]
    what = "The column Token holds numbers of rows, as in MoE-Beyond's predicted_csvs: the trace has no tokens."
    _LOG.warning(message(what, where=path, step="Take formatted_csvs for a predictor that reads tokens."))
    return None


def read_prompt(file: Path) -> Prompt:
    """One prompt: every MoE layer must list the same tokens in the same order, with the same number of ids."""
    tokens: dict[int, list[str]] = {}
    ids: dict[int, list[list[int]]] = {}
    for line, row in _rows(file):
        where = f"{file.name}, line {line}"
        try:
            block = int(row["Layer ID"])
        except (TypeError, ValueError):
            raise TraceFormatError(message("Layer ID is no number.", where=where, got=repr(row["Layer ID"]))) from None
        text = row["Activated Expert IDs"] or ""
        if not re.fullmatch(r"\s*\[\s*-?\d{1,9}(\s*,\s*-?\d{1,9})*\s*\]\s*", text):
            raise TraceFormatError(message("Expert ids are no list of ints.", where=where, got=repr(text[:80])))
        tokens.setdefault(block, []).append(row["Token"])
        ids.setdefault(block, []).append([int(number) for number in re.findall(r"-?\d+", text)])
    if not tokens:
        raise TraceValueError(message("A document without tokens.", where=file.name))
    blocks = tuple(sorted(tokens))
    if blocks[-1] - blocks[0] + 1 != len(blocks):
        lost = [block + 1 for block, following in itertools.pairwise(blocks) if following != block + 1][:8]
        raise TraceValueError(message("A MoE layer is missing.", where=file.name, got=f"no rows of layer {lost}"))
    # The tokens that most MoE layers list are taken for the prompt's, so that the message names the layer that departs.
    listed = [tuple(tokens[block]) for block in blocks]
    whole = max(listed, key=listed.count)
    top_k = len(ids[blocks[0]][0])
    for block, ours in zip(blocks, listed):
        if ours != whole:
            row_number = next((n for n, (a, b) in enumerate(zip(ours, whole)) if a != b), min(len(ours), len(whole)))
            where = f"{file.name}, layer {block}, row {row_number}"
            got, allowed = f"{len(ours)} rows", f"{len(whole)} rows, the same tokens as the other layers"
            what = "The MoE layers list different tokens; a row is missing."
            raise TraceValueError(message(what, where=where, got=got, allowed=allowed))
        for row_number, chosen in enumerate(ids[block]):
            if len(chosen) != top_k:
                where = f"{file.name}, layer {block}, row {row_number}"
                raise TraceValueError(message("Ragged number of expert ids.", where=where, got=len(chosen), allowed=top_k))
    return Prompt(list(whole), blocks, np.array([ids[block] for block in blocks]).transpose(1, 0, 2))


def _rows(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line numbers and rows of a CSV file that has the known columns."""
    try:
        with open(file, encoding="utf-8", newline="") as lines:
            reader = csv.DictReader(lines)
            reader.fieldnames = [_plain(name) for name in reader.fieldnames or ()]
            missing = [name for name in COLUMNS if name not in reader.fieldnames]
            if missing:
                raise TraceFormatError(message("A CSV file lacks columns.", where=file.name, got=", ".join(missing)))
            for row in reader:
                yield reader.line_num, row
    except (UnicodeDecodeError, csv.Error) as error:
        raise TraceFormatError(message("Not a CSV file in UTF-8.", where=file.name, got=str(error))) from error


def _check_range(file: Path, prompt: Prompt, num_experts: int) -> None:
    bad = np.argwhere((prompt.ids < NO_EXPERT) | (prompt.ids >= num_experts))
    if len(bad):
        row, layer, place = bad[0]
        where = f"{file.name}, layer {prompt.blocks[layer]} (moe_layer {layer}), row {row}"
        allowed = f"0 to {num_experts - 1}, or -1 for no expert"
        raise TraceValueError(
            message("Expert id out of range.", where=where, got=prompt.ids[row, layer, place], allowed=allowed)
        )


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix == ".csv" else []

    def number(file: Path) -> tuple[list[int], str]:
        return [int(part) for part in re.findall(r"\d+", file.stem)], file.name

    return sorted(path.glob("*.csv"), key=number)


class IMPORTER:
    """What the registry hands out."""

    reads = "CSV files, one a prompt, with the columns Layer ID, Token, Activated Expert IDs"
    matches = staticmethod(matches)
    load = staticmethod(load)
