"""From what the user names to a folder on disk: a local checkpoint, or one fetched from the hub."""

from __future__ import annotations

import re
from pathlib import Path

from swapless.errors import CheckpointMissingError, message

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def is_hub_id(checkpoint: str | Path) -> bool:
    """Whether ``checkpoint`` can only be meant for the hub: it has the form of an id, and no such path exists."""
    name = str(checkpoint)
    return not Path(checkpoint).exists() and bool(_HUB_ID.fullmatch(name)) and not name.startswith((".", "/"))


def checkpoint_folder(
    checkpoint: str | Path, *, revision: str | None = None, token: str | None = None, local_files_only: bool = False
) -> Path:
    """The local folder of ``checkpoint``, downloaded into the hub's cache if it is a hub id.

    Raises
    ------
    CheckpointMissingError
        Neither a local path nor a repository that could be fetched.
    """
    if not is_hub_id(checkpoint):
        return Path(checkpoint)  # what is wrong with a path is told by whoever reads it
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                str(checkpoint), revision=revision, token=token, local_files_only=local_files_only, allow_patterns=_WANTED
            )
        )
    except Exception as error:  # the hub client's errors share no root: all mean that the checkpoint is not to be had
        raise CheckpointMissingError(
            message(
                f"No local folder {str(checkpoint)!r}, and the hub did not give a repository of that name.",
                got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                step="Check the spelling, the connection and, for a gated model, the token; or give the path of a folder.",
            )
        ) from error
