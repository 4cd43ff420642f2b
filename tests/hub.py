"""A real server that speaks the hub's API and counts what it hands out."""

from __future__ import annotations

import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

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
        tree = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        asked = api or tree or file
        found = self.server.repositories.get(asked[1]) if asked else None
        if found in ("gated", "private"):
            code = "GatedRepo" if found == "gated" else "RepoNotFound"
            self._send(403 if found == "gated" else 401, b"", {"X-Error-Code": code}, body)
        elif found is None:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
        elif tree:
            entries = [{"type": "file", "path": name, "size": size, "oid": "0" * 40} for name, size in _files(Path(found))]
            self._send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"}, body)
        elif api:
            names = [{"rfilename": name, "size": size} for name, size in _files(Path(found))]
            document = {"id": api[1], "modelId": api[1], "sha": COMMIT, "siblings": names, "tags": [], "private": False}
            self._send(200, json.dumps(document).encode(), {"Content-Type": "application/json"}, body)
        elif file and (Path(found) / file[2]).is_file():
            self._file(Path(found) / file[2], body)
        else:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)

    def _file(self, path: Path, body: bool) -> None:
        data = path.read_bytes()
        first, end, code = 0, len(data), 200
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
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


def _files(folder: Path) -> list[tuple[str, int]]:
    """Names and sizes of all files below ``folder``."""
    files = sorted(entry for entry in folder.rglob("*") if entry.is_file())
    return [(entry.relative_to(folder).as_posix(), entry.stat().st_size) for entry in files]
