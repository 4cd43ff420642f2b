"""From what the user names to a folder on disk: a local checkpoint, or one fetched from the hub."""

from __future__ import annotations

import glob
import re
from functools import partial
from pathlib import Path
from typing import Any

from swapless.errors import CheckpointMissingError, message
from swapless.store.headers import INDEX_NAME, SINGLE_NAME, local_folder, names_of_shards
from swapless.store.packed import is_packed
from swapless.untrusted import shown

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_WANTED = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
"""Configuration, index and tokenizer. Weights are fetched by name: a repository may hold them several times over."""
_ELSEWHERE = ["[!a]*/*", "a[!d]*/*"]
"""Of the folders below only ``additional_chat_templates``."""
_PACKED = "experts-*.safetensors"


def is_hub_id(checkpoint: str | Path) -> bool:
    """Whether ``checkpoint`` can only be meant for the hub: it has the form of an id, and no such path exists."""
    name = str(checkpoint)
    if not _HUB_ID.fullmatch(name) or name.startswith((".", "/")):
        return False
    return not Path(checkpoint).exists()


def checkpoint_folder(
    checkpoint: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    endpoint: str | None = None,
) -> Path:
    """The local folder of ``checkpoint``, downloaded into the hub's cache if it is a hub id.

    Of a repository only what is read is fetched: configuration, tokenizer, and the weights that transformers would take, which
    are ``model.safetensors`` or else the shards that the index names. ``endpoint`` is that of the hub's client by default.

    Raises
    ------
    CheckpointMissingError
        Neither a local path nor a repository that could be fetched.
    CheckpointCorruptError
        The repository's index is malformed.
    """
    if not is_hub_id(checkpoint):
        return local_folder(Path(checkpoint))  # what is wrong with a path is told by whoever reads it
    fetch = partial(_fetch, str(checkpoint), token=token, local_files_only=local_files_only, endpoint=endpoint)
    folder = fetch(revision=revision, allow_patterns=[*_WANTED, SINGLE_NAME], ignore_patterns=_ELSEWHERE)
    if is_packed(folder):
        fetch(revision=folder.name, allow_patterns=_PACKED)
    elif not (folder / SINGLE_NAME).is_file() and (folder / INDEX_NAME).is_file():
        shards = [glob.escape(name) for name in names_of_shards(folder / INDEX_NAME)]
        fetch(revision=folder.name, allow_patterns=shards)
    return folder


def _fetch(repository: str, **options: Any) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, **options))
    except Exception as error:  # the hub client's errors share no root: all mean that the checkpoint is not to be had
        lines = str(error).splitlines()
        raise CheckpointMissingError(
            message(
                f"No local folder {shown(repository)}, and the hub did not give a repository of that name.",
                got=f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(". "),
                step="Check the spelling, the connection and, for a gated model, the token; or give the path of a folder.",
            )
        ) from error
