"""Hub ids by their headers: a real server that speaks the hub's API counts what it hands out."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from swapless.errors import CheckpointCorruptError, CheckpointMissingError, UnsupportedCheckpointError
from swapless.plan.hub import fetch_headers, local_or_headers
from swapless.runtime import describe

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Repositories by id, each a folder, ``gated`` or ``private``; ``served`` lists (file, first byte, bytes) of all bodies."""

    daemon_threads = True

    def __init__(self, repositories: dict[str, Path | str], *, ranges: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories, self.ranges = repositories, ranges
        self.served: list[tuple[str, int, int]] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Silent."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        found = self.server.repositories.get((api or file)[1]) if api or file else None
        if found in ("gated", "private"):
            code = "GatedRepo" if found == "gated" else "RepoNotFound"
            self._send(403 if found == "gated" else 401, b"", {"X-Error-Code": code}, body)
        elif found is None:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
        elif api:
            names = [{"rfilename": entry.name} for entry in sorted(Path(found).iterdir())]
            document = {"id": api[1], "modelId": api[1], "sha": COMMIT, "siblings": names, "tags": [], "private": False}
            self._send(200, json.dumps(document).encode(), {"Content-Type": "application/json"}, body)
        elif file and (Path(found) / file[2]).is_file():
            self._file(Path(found) / file[2], body)
        else:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)

    def _file(self, path: Path, body: bool) -> None:
        data = path.read_bytes()
        first, end, code = 0, len(data), 200
        headers = {"ETag": f'"{path.stat().st_mtime_ns:x}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked and self.server.ranges:
            first, end, code = int(asked[1]), min(len(data), int(asked[2]) + 1), 206
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(data)}"
        if body:
            self.server.served.append((path.name, first, end - first))
        self._send(code, data[first:end], headers, body)

    def _send(self, code: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            try:
                self.wfile.write(content)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the client has what it wanted


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Start a hub with these repositories."""
    # The families' tests go offline when they are collected, and the hub's client looks at that once, when it is imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    running = []

    def call(repositories: dict[str, Path | str], **options: Any) -> Hub:
        hub = Hub(repositories, **options)
        threading.Thread(target=hub.serve_forever, daemon=True).start()
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
