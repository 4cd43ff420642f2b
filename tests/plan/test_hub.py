"""Hub ids by their headers: a real server that speaks the hub's API counts what it hands out."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from swapless.errors import CheckpointCorruptError, CheckpointMissingError, UnsupportedCheckpointError
from swapless.plan.hub import fetch_headers, local_or_headers
from swapless.runtime import describe
from swapless.store.headers import INDEX_NAME
from tests.hub import Hub


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Start a hub with these repositories."""
    # The families' tests go offline when they are collected, and the hub's client looks at that once, when it is imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    running = []

    def call(repositories: dict[str, Path | str], **options: Any) -> Hub:
        hub = Hub(repositories, **options)
        threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True).start()
        running.append(hub)
        return hub

    yield call
    for hub in running:
        hub.shutdown()
        hub.server_close()


def header_ends(folder: Path) -> dict[str, int]:
    ends = {}
    for file in folder.glob("*.safetensors"):
        with open(file, "rb") as opened:
            ends[file.name] = 8 + struct.unpack("<Q", opened.read(8))[0]
    return ends


@pytest.mark.parametrize("kind", ["checkpoint", "sharded"])
def test_headers_alone_are_fetched_and_say_all(kind: str, request: Any, serve: Any, tmp_path: Path) -> None:
    source: Path = request.getfixturevalue(kind)
    hub = serve({"made/model": source})
    fetch_headers("made/model", tmp_path / "ghosts", endpoint=hub.endpoint)
    ends = header_ends(source)
    weights = [(name, first, count) for name, first, count in hub.served if name in ends]
    assert {name for name, *_ in weights} == set(ends)
    assert all(first + count <= ends[name] for name, first, count in weights), "not one byte of a tensor"
    ghost, real = describe(tmp_path / "ghosts"), describe(source)
    assert ghost == real
    for name in ends:
        assert (tmp_path / "ghosts" / name).stat().st_size == (source / name).stat().st_size
    held = sum(file.stat().st_blocks * 512 for file in (tmp_path / "ghosts").glob("*.safetensors"))
    assert held < sum(ends.values()) + len(ends) * 8192, "the rest of a ghost is a hole"


def test_a_server_without_ranges_is_not_read_to_the_end(serve: Any, checkpoint: Path, tmp_path: Path) -> None:
    hub = serve({"made/model": checkpoint}, ranges=False)
    fetch_headers("made/model", tmp_path, endpoint=hub.endpoint)
    assert describe(tmp_path) == describe(checkpoint)


@pytest.mark.parametrize(
    "name, told",
    [
        ("made/nothing", "Check the spelling"),
        ("made/gated", "Accept its terms"),
        ("made/private", "log in with"),
    ],
)
def test_what_is_not_to_be_had(name: str, told: str, serve: Any, tmp_path: Path) -> None:
    hub = serve({"made/gated": "gated", "made/private": "private"})
    with pytest.raises(CheckpointMissingError, match=told):
        fetch_headers(name, tmp_path, endpoint=hub.endpoint)


def test_no_connection(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMissingError, match="cannot be reached"):
        fetch_headers("made/model", tmp_path, endpoint="http://127.0.0.1:9")


@pytest.mark.parametrize(
    "names, told", [(["pytorch_model.bin"], ".bin"), (["swapless.json"], "packed store"), ([], "no weights")]
)
def test_other_formats(names: list[str], told: str, serve: Any, tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    folder.mkdir()
    for name in [*names, "config.json"]:
        (folder / name).write_text("{}")
    hub = serve({"made/model": folder})
    with pytest.raises(UnsupportedCheckpointError, match=re.escape(told)):
        fetch_headers("made/model", tmp_path / "ghosts", endpoint=hub.endpoint)


@pytest.mark.parametrize("content", [b"", b"\xff" * 16, struct.pack("<Q", 4) + b"[1]]", struct.pack("<Q", 8) + b'{"a": 1}'])
def test_shards_without_a_header(content: bytes, serve: Any, tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(content)
    hub = serve({"made/model": folder})
    with pytest.raises(CheckpointCorruptError, match=r"model\.safetensors"):
        fetch_headers("made/model", tmp_path / "ghosts", endpoint=hub.endpoint)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {"a": "../../elsewhere.safetensors"}}', "[]"])
def test_an_index_that_leads_nowhere(index: str, serve: Any, tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(index)
    hub = serve({"made/model": folder})
    with pytest.raises(CheckpointCorruptError, match="index"):
        fetch_headers("made/model", tmp_path / "ghosts", endpoint=hub.endpoint)


MALFORMED = {
    "nested deep": b"[" * 100_000,
    "a header of nested objects": b'{"a":' * 50_000,
    "an overlap": b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}',
    "sizes beyond all disks": b'{"a":{"dtype":"U8","shape":[4611686018427387904],"data_offsets":[0,4611686018427387904]}}',
    "no numbers": b'{"a":{"dtype":"U8","shape":[4],"data_offsets":["0","4"]}}',
    "5000 digits": b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,' + b"9" * 5000 + b"]}}",
    "no text": b"{\xff}",
}


@pytest.mark.parametrize("header", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_shard_is_called_malformed(header: bytes, serve: Any, tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    hub = serve({"made/model": folder})
    with pytest.raises(CheckpointCorruptError, match=r"made/model/model\.safetensors"):
        fetch_headers("made/model", tmp_path / "ghosts", endpoint=hub.endpoint)


def test_the_single_file_comes_before_an_index(serve: Any, sharded: Path, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    shutil.copytree(sharded, folder)
    shutil.copy(checkpoint / "model.safetensors", folder)
    hub = serve({"made/model": folder})
    fetch_headers("made/model", tmp_path / "ghosts", endpoint=hub.endpoint)
    assert [file.name for file in (tmp_path / "ghosts").glob("*.safetensors")] == ["model.safetensors"]


def test_shards_in_a_folder_below(serve: Any, sharded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    shutil.copytree(sharded, folder)
    (folder / "below").mkdir()
    for shard in list(folder.glob("*.safetensors")):
        shard.rename(folder / "below" / shard.name)
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"] = {key: f"below/{name}" for key, name in index["weight_map"].items()}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    hub = serve({"made/model": folder})
    fetch_headers("made/model", tmp_path / "ghosts", endpoint=hub.endpoint)
    assert describe(tmp_path / "ghosts") == describe(folder)


def test_a_configuration_without_end_is_not_fetched(serve: Any, tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    folder.mkdir()
    with open(folder / "config.json", "wb") as file:
        file.truncate(200 << 20)
    (folder / "model.safetensors").write_bytes(b"")
    hub = serve({"made/model": folder})
    with pytest.raises(CheckpointCorruptError, match=r"too large.*made/model/config\.json"):
        fetch_headers("made/model", tmp_path / "ghosts", endpoint=hub.endpoint)


def test_a_folder_is_taken_as_it_is(checkpoint: Path, tmp_path: Path) -> None:
    assert local_or_headers(checkpoint, tmp_path) == (checkpoint, True)
    assert local_or_headers("./no such folder", tmp_path) == (Path("no such folder"), True)


@pytest.mark.slow
def test_the_command_line_plans_for_a_hub_id(serve: Any, sharded: Path, kept_machine: Path, tmp_path: Path) -> None:
    hub = serve({"made/model": sharded})
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "hf"),
        "SWAPLESS_CACHE_DIR": str(kept_machine),
    }
    command = [
        sys.executable,
        "-c",
        "from swapless.cli.main import main; main()",
        "plan",
        "made/model",
        "--memory",
        "600MiB",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["here"] is False and "not here" in found["reads_from"]
    assert found["set_ups"][0]["commands"][0].startswith("swapless run made/model --memory 600MiB")
    ends = header_ends(sharded)
    assert all(first + count <= ends.get(name, 1 << 60) for name, first, count in hub.served)
