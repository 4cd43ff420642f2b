"""Downloads: only what is read, told by a server that speaks the hub's API and counts."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects

from swapless.errors import CheckpointCorruptError, CheckpointMissingError
from swapless.runtime import source
from swapless.runtime.source import checkpoint_folder
from swapless.store.headers import INDEX_NAME, read_headers
from tests.hub import Hub

SMALL = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja"]
ELSEWHERE = [
    "original/model.safetensors",
    "original/config.json",
    "consolidated.safetensors",
    "consolidated.00.pth",
    "metal/model.bin",
    "onnx/model.onnx",
    "model.fp16.safetensors",
    "pytorch_model.bin",
    "runs/events.txt",
]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[Path], Hub]]:
    """Serve a folder as the repository ``made/model`` to the hub's client."""
    running = []

    def call(folder: Path) -> Hub:
        server = Hub({"made/model": folder})
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        running.append(server)
        for name, value in (("HF_HUB_OFFLINE", False), ("HF_HUB_CACHE", str(tmp_path / "hub"))):
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        return server

    yield call
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture
def repository(olmoe: Path, tmp_path: Path) -> Path:
    """A sharded checkpoint with all that repositories hold beside it."""
    folder = tmp_path / "repository"
    shutil.copytree(olmoe, folder)
    for name in (*SMALL[2:], *ELSEWHERE, "additional_chat_templates/tool.jinja"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def fetched(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def test_only_what_is_read_is_downloaded(hub: Any, repository: Path, olmoe: Path) -> None:
    endpoint = hub(repository).endpoint
    folder = checkpoint_folder("made/model", endpoint=endpoint)
    shards = {file.name for file in olmoe.glob("*.safetensors")}
    assert len(shards) > 1
    assert fetched(folder) == {*SMALL, *shards, INDEX_NAME, "additional_chat_templates/tool.jinja"}
    assert {ref.key for ref in read_headers(folder).values()} == set(read_headers(olmoe))


def test_the_single_file_comes_before_an_index(hub: Any, repository: Path, qwen3_moe: Path) -> None:
    shutil.copy(qwen3_moe / "model.safetensors", repository)
    endpoint = hub(repository).endpoint
    folder = checkpoint_folder("made/model", endpoint=endpoint)
    assert [file.name for file in folder.rglob("*.safetensors")] == ["model.safetensors"]


def test_shards_that_lie_below(hub: Any, repository: Path, olmoe: Path) -> None:
    (repository / "weights").mkdir()
    for shard in list(repository.glob("model-*")):
        shard.rename(repository / "weights" / shard.name)
    index = json.loads((repository / INDEX_NAME).read_text())
    index["weight_map"] = {key: f"weights/{name}" for key, name in index["weight_map"].items()}
    (repository / INDEX_NAME).write_text(json.dumps(index))
    endpoint = hub(repository).endpoint
    assert set(read_headers(checkpoint_folder("made/model", endpoint=endpoint))) == set(read_headers(olmoe))


def test_a_second_time_nothing_is_downloaded(hub: Any, repository: Path) -> None:
    server = hub(repository)
    endpoint = server.endpoint
    first = checkpoint_folder("made/model", endpoint=endpoint)
    server.served.clear()
    assert (
        checkpoint_folder("made/model", endpoint=endpoint)
        == first
        == checkpoint_folder("made/model", local_files_only=True, endpoint=endpoint)
    )
    assert not [name for name, *_ in server.served if name.endswith(".safetensors")]


@pytest.mark.parametrize("index", ["{", "[" * 100_000, '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": 5}'])
def test_a_malformed_index_is_called_so(hub: Any, repository: Path, index: str) -> None:
    (repository / INDEX_NAME).write_text(index)
    endpoint = hub(repository).endpoint
    with pytest.raises(CheckpointCorruptError, match="index"):
        checkpoint_folder("made/model", endpoint=endpoint)


def test_what_is_not_there(hub: Any, repository: Path) -> None:
    endpoint = hub(repository).endpoint
    with pytest.raises(CheckpointMissingError, match=r"'made/other'.*spelling"):
        checkpoint_folder("made/other", endpoint=endpoint)


@pytest.mark.parametrize("files", [ELSEWHERE, ["model.safetensors", "original/consolidated.00.pth"]])
def test_no_pattern_takes_weights(files: list[str]) -> None:
    found = list(filter_repo_objects(files, allow_patterns=source._WANTED))
    assert not [name for name in found if name.endswith((".safetensors", ".bin", ".pth", ".onnx"))]


def test_a_repository_in_the_hubs_cache_is_its_snapshot(olmoe: Path, tmp_path: Path) -> None:
    cached = tmp_path / "models--made--model"
    shutil.copytree(olmoe, cached / "snapshots" / "0123abcd")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123abcd")
    assert checkpoint_folder(cached) == cached / "snapshots" / "0123abcd"
    assert checkpoint_folder(olmoe) == olmoe
