"""A stand-in for the Hugging Face hub: its HTTP API, as far as uploads and downloads of ``huggingface_hub`` need it, with the
repositories in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_may_write"


@dataclass
class Repository:
    private: bool
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{}])
    """The files after each commit."""
    messages: list[str] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1]

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()


@dataclass
class Hub:
    url: str
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    """(kind, name) → repository."""
    blobs: dict[str, bytes] = field(default_factory=dict)
    """SHA-256 → content of the large files that were uploaded."""


@contextmanager
def running_hub() -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.hub  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined,no-any-return]

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        for pattern, reply in ROUTES.items():
            if found := re.fullmatch(pattern, path):
                reply(self, body, **found.groupdict())
                return
        self._send(404, {"error": f"no such address: {path}"})

    def _send(self, status: int, value: Any = None, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _may_write(self) -> bool:
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if not allowed:
            self._send(401, {"error": "Invalid username or password."}, X_Error_Message="Invalid credentials")
        return allowed

    def _repository(self, kind: str, name: str) -> Repository | None:
        found = self.hub.repositories.get((kind, name))
        if found is None:
            self._send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return found

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        kind, name = asked.get("type", "model"), f"{asked['organization']}/{asked['name']}"
        if not self._may_write():
            return
        url = f"{self.hub.url}/{'datasets/' if kind == 'dataset' else ''}{name}"
        if (kind, name) in self.hub.repositories:
            self._send(409, {"error": "You already created this repository", "url": url})
            return
        self.hub.repositories[kind, name] = Repository(
            asked.get("visibility", "public") == "private" or asked.get("private", False)
        )
        self._send(200, {"url": url})

    def describe(self, body: bytes, kind: str, name: str, revision: str = "main") -> None:
        if repository := self._repository(kind, name):
            siblings = [{"rfilename": path} for path in repository.files]
            self._send(200, {"id": name, "sha": repository.sha, "siblings": siblings, "private": repository.private})

    def tree(self, body: bytes, kind: str, name: str, revision: str) -> None:
        if repository := self._repository(kind, name):
            self._send(200, [_entry(path, data) for path, data in repository.files.items()])

    def info(self, body: bytes, kind: str, name: str, revision: str) -> None:
        """Some of the files. A client asks with a form or with JSON."""
        if repository := self._repository(kind, name):
            asked = json.loads(body)["paths"]
            self._send(200, [_entry(path, data) for path, data in repository.files.items() if path in asked])

    def preupload(self, body: bytes, kind: str, name: str, revision: str) -> None:
        if self._may_write():
            modes = {True: "regular", False: "lfs"}
            answers = [
                {"path": file["path"], "uploadMode": modes[file["path"].endswith(".md")], "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._send(200, {"files": answers})

    def validate(self, body: bytes) -> None:
        wrong = [{"message": '"license" must be one of […]'}] if "license: gpl-17" in json.loads(body)["content"] else []
        self._send(400 if wrong else 200, {"errors": wrong, "warnings": []})

    def batch(self, body: bytes, name: str, kind: str = "model") -> None:
        if self._may_write():
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.hub.url}/blobs/{each['oid']}", "header": {}}}}
                for each in json.loads(body)["objects"]
            ]
            self._send(200, {"transfer": "basic", "objects": objects})

    def blob(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        self._send(200, {})

    def commit(self, body: bytes, kind: str, name: str, revision: str) -> None:
        repository = self._repository(kind, name)
        if repository is None or not self._may_write():
            return
        files = dict(repository.files)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repository.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            else:
                assert line["key"] == "deletedFile"
                del files[value["path"]]
        repository.commits.append(files)
        self._send(200, {"commitOid": repository.sha, "commitUrl": f"{self.hub.url}/{name}/commit/{repository.sha}"})

    def resolve(self, body: bytes, name: str, revision: str, path: str, kind: str = "model") -> None:
        repository = self._repository(kind, name)
        if repository is None:
            return
        if path not in repository.files:
            self._send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            return
        data = repository.files[path]
        total = len(data)
        told = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X_Repo_Commit": repository.sha}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(part[1]), int(part[2] or total - 1)
            self._send(206, data[first : last + 1], **told, Content_Range=f"bytes {first}-{last}/{total}")
        else:
            self._send(200, data, **told)


def _entry(path: str, data: bytes) -> dict[str, Any]:
    oid = hashlib.sha256(data).hexdigest()
    return {
        "type": "file",
        "path": path,
        "size": len(data),
        "oid": oid,
        "lfs": {"oid": oid, "size": len(data), "pointerSize": 9},
    }


NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
API = rf"/api/(?P<kind>model|dataset)s/{NAME}"
REVISION = r"(?P<revision>\w+)"
ROUTES: dict[str, Any] = {
    "/api/repos/create": Handler.create,
    "/api/validate-yaml": Handler.validate,
    API: Handler.describe,
    f"{API}/revision/{REVISION}": Handler.describe,
    f"{API}/tree/{REVISION}": Handler.tree,
    f"{API}/paths-info/{REVISION}": Handler.info,
    f"{API}/preupload/{REVISION}": Handler.preupload,
    f"{API}/commit/{REVISION}": Handler.commit,
    rf"/(?P<kind>dataset)s/{NAME}\.git/info/lfs/objects/batch": Handler.batch,
    rf"/{NAME}\.git/info/lfs/objects/batch": Handler.batch,
    r"/blobs/(?P<oid>\w+)": Handler.blob,
    rf"/(?P<kind>dataset)s/{NAME}/resolve/{REVISION}/(?P<path>.+)": Handler.resolve,
    rf"/{NAME}/resolve/{REVISION}/(?P<path>.+)": Handler.resolve,
}  # fmt: skip
"""Pattern of an address → the method that answers."""
