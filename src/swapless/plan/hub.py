"""A repository on the hub known by its headers: configuration and safetensors headers are fetched, weights are not.

The headers are written as *ghost* shards: files of the right size that hold nothing but their header, the rest a hole. So
whatever looks at a checkpoint folder without reading weights works on it unchanged, and it takes a few kilobytes of disk.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from swapless.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMissingError,
    SwaplessError,
    UnsupportedCheckpointError,
    message,
)
from swapless.runtime.source import checkpoint_folder, is_hub_id
from swapless.store.headers import (
    CONFIG_NAME,
    INDEX_NAME,
    MAX_CONFIG_BYTES,
    MAX_INDEX_BYTES,
    SINGLE_NAME,
    find_shards,
    local_folder,
    names_of_shards,
    read_header,
)
from swapless.store.packed import MANIFEST
from swapless.store.shard import MAX_HEADER_BYTES
from swapless.untrusted import Table, parse_json

_CONNECTIONS = 8
_MOST_SHARD_BYTES = 2**44
_SMALL_FILES = {
    CONFIG_NAME: MAX_CONFIG_BYTES,
    INDEX_NAME: MAX_INDEX_BYTES,
    "adapter_config.json": MAX_CONFIG_BYTES,
    "hf_quant_config.json": MAX_CONFIG_BYTES,
}
"""What is fetched whole, each with the most bytes that it may have."""

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
        return local_folder(Path(checkpoint)), True
    downloaded = _downloaded(str(checkpoint), revision)
    if downloaded is not None:
        return downloaded, True
    fetch_headers(str(checkpoint), folder, revision=revision, progress=progress)
    return folder, False


def _downloaded(repository: str, revision: str | None) -> Path | None:
    try:
        folder = checkpoint_folder(repository, revision=revision, local_files_only=True)
        find_shards(folder)
    except CheckpointError:
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
        info = HfApi(endpoint=endpoint).model_info(repository, revision=revision, files_metadata=True)
        sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or ()}
        _refuse_other_formats(repository, set(sizes))
        for name, most in _SMALL_FILES.items():
            if name in sizes:
                if (sizes[name] or 0) > most:
                    raise CheckpointCorruptError(
                        message("A file on the hub is too large.", where=f"{repository}/{name}", allowed=f"up to {most} bytes")
                    )
                hf_hub_download(repository, name, revision=info.sha, local_dir=folder, endpoint=endpoint)
        shards = [SINGLE_NAME] if SINGLE_NAME in sizes else names_of_shards(folder / INDEX_NAME)
        with ThreadPoolExecutor(_CONNECTIONS) as connections:
            jobs = [connections.submit(_ghost, repository, name, info.sha, endpoint, folder) for name in shards]
            for number, job in enumerate(jobs):
                job.result()
                report("fetching headers", (number + 1) / len(jobs))
    except SwaplessError as error:
        # What is wrong with a file is told with its name on the hub, and not that of a copy that goes away.
        raise type(error)(str(error).replace(f"{folder}/", f"{repository}/")) from error
    except Exception as error:  # the hub client's errors share no root
        raise _not_to_be_had(repository, error) from error


def _ghost(repository: str, name: str, revision: str | None, endpoint: str | None, folder: Path) -> None:
    """Write the ghost of one shard: its header, fetched by two ranges, and a hole for its weights."""
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(repository, name, revision=revision, endpoint=endpoint)
    prefix = _range(url, 0, 8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise CheckpointCorruptError(
            message("A shard on the hub has no safetensors header.", where=f"{repository}/{name}", got=f"{length} bytes")
        )
    header = _range(url, 8, length)
    if len(header) < length:
        got, allowed = f"{8 + len(header)} bytes", f"at least {8 + length} bytes"
        raise CheckpointCorruptError(
            message("A shard on the hub is truncated.", where=f"{repository}/{name}", got=got, allowed=allowed)
        )
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_ghost(path, header)
    read_header(path)


def write_ghost(path: Path, header: bytes) -> None:
    """Write a ghost shard: its safetensors header, and a hole of the size of its data.

    Raises
    ------
    CheckpointCorruptError
        The header does not tell that size.
    """
    entries = Table(parse_json(header, where=path, what="header of the shard"), where=path)
    data_bytes = 0
    for key in entries:
        if key != "__metadata__":
            offsets = entries.table(key).integers("data_offsets", maximum=_MOST_SHARD_BYTES, least=2, most=2)
            data_bytes = max(data_bytes, offsets[1])
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + data_bytes)


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
