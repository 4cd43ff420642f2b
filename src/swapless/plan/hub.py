"""A repository on the hub known by its headers: configuration and safetensors headers are fetched, weights are not.

The headers are written as *ghost* shards: files of the right size that hold nothing but their header, the rest a hole. So
whatever looks at a checkpoint folder without reading weights works on it unchanged, and it takes a few kilobytes of disk.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from swapless.errors import CheckpointCorruptError, CheckpointMissingError, UnsupportedCheckpointError, message
from swapless.runtime.source import checkpoint_folder, is_hub_id
from swapless.store.headers import INDEX_NAME, SINGLE_NAME, find_shards
from swapless.store.packed import MANIFEST

_CONNECTIONS = 8
_MOST_HEADER_BYTES = 100_000_000

Progress = Callable[[str, float], None]


def local_or_headers(
    checkpoint: str | Path, folder: Path, *, revision: str | None = None, progress: Progress | None = None
) -> tuple[Path, bool]:
    """Where ``checkpoint`` can be looked at, and whether its weights are there too.

    Parameters
    ----------
    checkpoint : str or Path
        Local folder, or hub id.
    folder : Path
        An empty folder, for the headers of a hub id that was not downloaded.
    revision : str, optional
        Branch, tag or commit on the hub.
    progress : callable of (str, float), optional
        Told what is going on and the share done.

    Returns
    -------
    tuple of (Path, bool)
        The folder to open; False where it holds ghost shards.

    Raises
    ------
    CheckpointMissingError
        No such repository, no access to it, or no connection: the message says which, and what to do.
    CheckpointCorruptError
        A shard without a header.
    UnsupportedCheckpointError
        A repository without safetensors, or a packed store.
    """
    if not is_hub_id(checkpoint):
        return Path(checkpoint), True
    downloaded = _downloaded(str(checkpoint), revision)
    if downloaded is not None:
        return downloaded, True
    fetch_headers(str(checkpoint), folder, revision=revision, progress=progress)
    return folder, False


def _downloaded(repository: str, revision: str | None) -> Path | None:
    try:
        folder = checkpoint_folder(repository, revision=revision, local_files_only=True)
        find_shards(folder)
    except (CheckpointMissingError, CheckpointCorruptError, UnsupportedCheckpointError):
        return None  # not, or not all of it: the hub has the headers
    return folder


def fetch_headers(
    repository: str,
    folder: Path,
    *,
    revision: str | None = None,
    endpoint: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Fetch configuration, index and headers of ``repository`` into ``folder``; raises as :func:`local_or_headers`.

    ``endpoint`` is that of the hub's client by default, which takes ``HF_ENDPOINT`` from the environment.
    """
    from huggingface_hub import HfApi, hf_hub_download

    report = progress or (lambda stage, done: None)
    report("asking the hub", 0.0)
    try:
        info = HfApi(endpoint=endpoint).model_info(repository, revision=revision)
        names = {sibling.rfilename for sibling in info.siblings or ()}
        _refuse_other_formats(repository, names)
        for name in ("config.json", INDEX_NAME):
            if name in names:
                hf_hub_download(repository, name, revision=info.sha, local_dir=folder, endpoint=endpoint)
        shards = _shards(folder, names)
        with ThreadPoolExecutor(_CONNECTIONS) as connections:
            jobs = [connections.submit(_ghost, repository, name, info.sha, endpoint, folder) for name in shards]
            for number, job in enumerate(jobs):
                job.result()
                report("fetching headers", (number + 1) / len(jobs))
    except Exception as error:  # the hub client's errors share no root
        if isinstance(error, (CheckpointCorruptError, UnsupportedCheckpointError)):
            raise
        raise _not_to_be_had(repository, error) from error


def _shards(folder: Path, names: set[str]) -> list[str]:
    """Names of the shards: those of the index, which need not be all files of the repository."""
    if INDEX_NAME not in names:
        return [SINGLE_NAME]
    try:
        weight_map = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
        names_of_shards = sorted({str(name) for name in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointCorruptError(message("The index has no weight_map.", where=INDEX_NAME, got=repr(error))) from error
    if odd := [name for name in names_of_shards if Path(name).name != name]:
        raise CheckpointCorruptError(message("The index names a shard outside its folder.", where=INDEX_NAME, got=odd[0]))
    return names_of_shards


def _ghost(repository: str, name: str, revision: str | None, endpoint: str | None, folder: Path) -> None:
    """Write the ghost of one shard: its header, fetched by two ranges, and a hole for its weights."""
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(repository, name, revision=revision, endpoint=endpoint)
    prefix = _range(url, 0, 8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 2 <= length <= _MOST_HEADER_BYTES:
        raise CheckpointCorruptError(
            message("A shard on the hub has no safetensors header.", where=name, got=f"{length} bytes")
        )
    header = _range(url, 8, length)
    try:
        write_ghost(folder / name, header)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointCorruptError(
            message("The header of a shard on the hub is malformed.", where=name, got=repr(error))
        ) from error


def write_ghost(path: Path, header: bytes) -> None:
    """Write a ghost shard: its safetensors header, and a hole of the size of its data."""
    entries = json.loads(header)
    data_bytes = max((entry["data_offsets"][1] for key, entry in entries.items() if key != "__metadata__"), default=0)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + int(data_bytes))


def _range(url: str, first: int, count: int) -> bytes:
    """``count`` bytes of a file on the hub, and no more even where the server has never heard of ranges."""
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = {**build_hf_headers(), "range": f"bytes={first}-{first + count - 1}", "accept-encoding": "identity"}
    with get_session().stream("GET", url, headers=headers, timeout=30) as response:
        if response.status_code >= 400:
            response.read()
        hf_raise_for_status(response)
        wanted = count if response.status_code == 206 else first + count
        found = b""
        for chunk in response.iter_bytes(min(wanted, 1 << 16)):
            found += chunk
            if len(found) >= wanted:
                break
    return found[wanted - count : wanted]


def _refuse_other_formats(repository: str, names: set[str]) -> None:
    if MANIFEST in names:
        what, step = "a packed store", "Download it, and plan with its folder."
    elif SINGLE_NAME not in names and INDEX_NAME not in names:
        kinds = sorted({Path(name).suffix for name in names if Path(name).suffix in (".bin", ".gguf", ".pt", ".pth")})
        what, step = f"weights in {', '.join(kinds)}" if kinds else "no weights", "Look for a revision in safetensors."
    elif "config.json" not in names:
        what, step = "no config.json", "Swapless serves checkpoints in the layout of transformers."
    else:
        return
    raise UnsupportedCheckpointError(
        message(
            "The repository cannot be planned for by its headers.",
            where=repository,
            got=what,
            allowed=f"config.json with {SINGLE_NAME} or {INDEX_NAME}",
            step=step,
        )
    )


def _not_to_be_had(repository: str, error: Exception) -> CheckpointMissingError:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    status: Any = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError):
        what = "The repository is gated, and this account was not let in."
        step = "Accept its terms on its page, then log in with `hf auth login` (or set HF_TOKEN)."
    elif isinstance(error, RevisionNotFoundError):
        what, step = "The repository has no such revision.", "Check the spelling of the revision."
    elif isinstance(error, RepositoryNotFoundError) and status != 401:
        what = "There is no local folder and no repository on the hub of this name."
        step = "Check the spelling; a hub id is owner/name."
    elif isinstance(error, RepositoryNotFoundError) or status in (401, 403):
        what = "There is no repository on the hub of this name, or it is private or gated."
        step = "Check the spelling, and log in with `hf auth login` (or set HF_TOKEN)."
    elif isinstance(error, HfHubHTTPError) and status:
        what, step = "The hub did not answer as it should.", "Try again later."
    else:
        what = "The hub cannot be reached, and the model was not downloaded."
        step = f"Check the connection to {constants.ENDPOINT} (HF_ENDPOINT, HF_HUB_OFFLINE), or give the path of a folder."
    lines = str(error).split("\n")
    reason = f"{type(error).__name__}: {' '.join(line.strip() for line in lines if line.strip())[:160]}".rstrip(". ")
    return CheckpointMissingError(message(what, where=repository, got=reason, step=step))
