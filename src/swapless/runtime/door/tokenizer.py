"""The tokenizer's files: regular and of bounded size before transformers reads them, its errors named by ours."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from swapless.errors import CheckpointError, message
from swapless.runtime.door.foreign import foreign_errors

_MAX_BYTES = {
    "tokenizer.json": 256 * 2**20,
    "tokenizer.model": 256 * 2**20,
    "tekken.json": 256 * 2**20,
    "vocab.json": 64 * 2**20,
    "vocab.txt": 64 * 2**20,
    "merges.txt": 64 * 2**20,
    "added_tokens.json": 16 * 2**20,
    "special_tokens_map.json": 4 * 2**20,
    "tokenizer_config.json": 16 * 2**20,
    "chat_template.jinja": 2**20,
    "chat_template.json": 2**20,
}
"""The files of a tokenizer, each with the most bytes that it may have: several times those of any published one."""

_STEP = "Put the tokenizer's files (tokenizer.json, tokenizer_config.json) beside config.json."
_WHAT = "The tokenizer of this checkpoint cannot be read."


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer in a checkpoint's folder, which can make tokens of a text. Code of its own is not run.

    Raises
    ------
    CheckpointError
        There is none that transformers can read.
    """
    for name, most in _MAX_BYTES.items():
        try:
            status = (folder / name).stat()
        except (OSError, ValueError):
            continue
        if not stat.S_ISREG(status.st_mode) or status.st_size > most:
            got = f"{status.st_size} bytes" if stat.S_ISREG(status.st_mode) else "no regular file"
            raise CheckpointError(message(_WHAT, where=folder / name, got=got, allowed=f"a file of up to {most} bytes"))
    with foreign_errors(_WHAT, folder, error=CheckpointError, step=_STEP):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        ids = tokenizer("a", add_special_tokens=False)["input_ids"]
        tokenizer.decode(ids)
    if not ids:
        raise CheckpointError(message(_WHAT, where=folder, got="one without a vocabulary", step=_STEP))
    return tokenizer


def text_ids(tokenizer: Any, text: str) -> Any:
    """Token ids of a text, int64 (1, T).

    Raises
    ------
    CheckpointError
        The tokenizer fails on it.
    """
    with foreign_errors("The tokenizer of this checkpoint fails on the text.", _place(tokenizer), error=CheckpointError):
        return tokenizer(text, return_tensors="pt")["input_ids"].long()


def _place(tokenizer: Any) -> object:
    return getattr(tokenizer, "name_or_path", None)
