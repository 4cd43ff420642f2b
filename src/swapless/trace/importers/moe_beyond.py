"""The CSV folders of MoE-Beyond: one file a prompt, one row a (MoE layer, token), expert ids as text in brackets."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from swapless.errors import TraceFormatError, TraceMismatchError, TraceValueError, message
from swapless.notation import Phase
from swapless.trace.header import TraceHeader
from swapless.trace.trace import Trace

COLUMNS = ("Layer ID", "Token", "Activated Expert IDs")
NUM_EXPERTS = 64
"""E of DeepSeek-V2-Lite, the one model whose traces exist in this form; the files do not say it."""


class Prompt(NamedTuple):
    """One file: tokens, block indices, and ids of shape (T, L, K)."""

    tokens: list[str]
    blocks: tuple[int, ...]
    ids: np.ndarray


def matches(path: Path) -> bool:
    """Whether ``path`` is a folder whose first CSV file has the known columns."""
    first = next(iter(_files(path)), None) if path.is_dir() else None
    if first is None:
        return False
    with open(first, encoding="utf-8", errors="replace", newline="") as file:
        return set(COLUMNS) <= set(next(csv.reader(file), []))


def load(path: Path, model_id: str | None = None, *, num_experts: int = NUM_EXPERTS) -> Trace:
    """All prompts of a folder, in the order of the numbers in their names; documents count from 0.

    Raises
    ------
    TraceFormatError
        No CSV file, missing columns, or ids that are no list.
    TraceValueError
        A MoE layer or a row missing, another number of ids, an id out of range, an empty file.
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
    return Trace.from_arrays(
        header,
        expert_ids=np.concatenate([prompt.ids for prompt in prompts]),
        document=np.repeat(np.arange(len(prompts)), [len(prompt.tokens) for prompt in prompts]),
        phase=Phase.PREFILL,
        token=[token for prompt in prompts for token in prompt.tokens],
    )


def read_prompt(file: Path) -> Prompt:
    """One prompt: every MoE layer must list the same tokens in the same order, with the same number of ids."""
    tokens: dict[int, list[str]] = {}
    ids: dict[int, list[list[int]]] = {}
    with open(file, encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise TraceFormatError(message("A CSV file lacks columns.", where=file.name, got=", ".join(missing)))
        for row in reader:
            where = f"{file.name}, line {reader.line_num}"
            try:
                block = int(row["Layer ID"])
            except (TypeError, ValueError):
                raise TraceFormatError(message("Layer ID is no number.", where=where, got=repr(row["Layer ID"]))) from None
            text = row["Activated Expert IDs"] or ""
            if not re.fullmatch(r"\s*\[\s*-?\d+(\s*,\s*-?\d+)*\s*\]\s*", text):
                raise TraceFormatError(message("Expert ids are no list of ints.", where=where, got=repr(text)))
            tokens.setdefault(block, []).append(row["Token"])
            ids.setdefault(block, []).append([int(number) for number in re.findall(r"-?\d+", text)])
    if not tokens:
        raise TraceValueError(message("A document without tokens.", where=file.name))
    blocks = tuple(sorted(tokens))
    if blocks != tuple(range(blocks[0], blocks[-1] + 1)):
        lost = sorted(set(range(blocks[0], blocks[-1] + 1)) - set(blocks))
        raise TraceValueError(message("A MoE layer is missing.", where=file.name, got=f"no rows of layer {lost}"))
    first = tokens[blocks[0]]
    top_k = len(ids[blocks[0]][0])
    for block in blocks:
        if tokens[block] != first:
            got = f"{len(tokens[block])} rows, layer {blocks[0]} has {len(first)}"
            raise TraceValueError(
                message("The MoE layers list different tokens; a row is missing.", where=f"{file.name}, layer {block}", got=got)
            )
        for row_number, chosen in enumerate(ids[block]):
            if len(chosen) != top_k:
                where = f"{file.name}, layer {block}, row {row_number}"
                raise TraceValueError(message("Ragged number of expert ids.", where=where, got=len(chosen), allowed=top_k))
    return Prompt(first, blocks, np.array([ids[block] for block in blocks]).transpose(1, 0, 2))


def _files(path: Path) -> list[Path]:
    def number(file: Path) -> tuple[list[int], str]:
        return [int(part) for part in re.findall(r"\d+", file.stem)], file.name

    return sorted(path.glob("*.csv"), key=number)


class IMPORTER:
    """What the registry hands out."""

    matches = staticmethod(matches)
    load = staticmethod(load)
