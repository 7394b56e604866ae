"""A local stand-in of the Hugging Face hub."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

OWNER, TOKEN = "tiny", "hf_standin"


class HubStandIn(ThreadingHTTPServer):
    """The hub's answers to a download and to an upload. Every `owner/name` in `repos` is a folder; `gated` ones are
    refused. A new repository becomes a folder in `home`; uploads need the token `TOKEN`."""

    def __init__(self, home: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.home = home
        self.repos: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.downloads: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: HubStandIn
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts == ["api", "validate-yaml"]:
            return self._json({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, b'{"error": "Invalid username or password."}', {}, True)
        if parts == ["api", "repos", "create"]:
            asked = json.loads(data)
            repo_id = f"{asked.get('organization') or OWNER}/{asked['name']}"
            answer = json.dumps({"url": f"{self.server.url}/{repo_id}"}).encode()
            if repo_id in self.server.repos:
                return self._send(409, answer, {}, True)
            self.server.repos[repo_id] = self.server.home / asked["name"]
            self.server.repos[repo_id].mkdir()
            return self._send(200, answer, {}, True)
        folder = self.server.repos["/".join(parts[2:4])]
        if parts[4] == "preupload":
            paths = [file["path"] for file in json.loads(data)["files"]]
            return self._json(
                {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
            )
        for line in map(json.loads, data.decode().splitlines()):
            if line["key"] == "file":
                (folder / line["value"]["path"]).write_bytes(base64.b64decode(line["value"]["content"]))
        url = f"{self.server.url}/{'/'.join(parts[2:4])}/commit/{_commit(folder)}"
        return self._json({"commitUrl": url, "commitOid": _commit(folder), "success": True})

    def _json(self, answer: object) -> None:
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"}, True)

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, body: bool) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        owner, name, *rest = parts[2:] if is_api else parts
        repo_id = f"{owner}/{name}"
        if repo_id in self.server.gated:
            return self._send(403, b"", {"X-Error-Code": "GatedRepo"}, body)
        if repo_id not in self.server.repos:
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
        folder = self.server.repos[repo_id]
        if rest[:1] == ["revision"] and rest[1] not in ("main", _commit(folder)):
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
        if is_api and rest[:1] in ([], ["revision"]):
            return self._send(200, json.dumps({"id": repo_id, "sha": _commit(folder)}).encode(), {}, body)
        if is_api and rest[:1] == ["tree"]:
            files = [_listed(path) for path in sorted(folder.iterdir())]
            return self._send(200, json.dumps(files).encode(), {}, body)
        if rest[:1] == ["resolve"]:
            if not (folder / rest[2]).is_file():
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": _commit(folder)}, body)
            content = (folder / rest[2]).read_bytes()
            if body:
                self.server.downloads.append(rest[2])
            etag = hashlib.sha1(content).hexdigest()
            return self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": _commit(folder)}, body)
        return self._send(404, b"", {}, body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


def _commit(folder: Path) -> str:
    """A commit's name that changes with what is in it."""
    return hashlib.sha1(
        b"".join(path.name.encode() + path.read_bytes() for path in sorted(folder.iterdir()))
    ).hexdigest()


def _listed(path: Path) -> dict[str, Any]:
    oid = hashlib.sha1(path.read_bytes()).hexdigest()
    return {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": oid}


@pytest.fixture
def hub_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubStandIn]:
    """A hub without repositories."""
    server = HubStandIn(tmp_path_factory.mktemp("hub"))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
