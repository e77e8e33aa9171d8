"""The Hugging Face Hub on loopback: as much of its HTTP as its own library uses to upload and download a model."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """Models by name, and data sets by ``datasets/NAME``, each a list of commits ``{path: content}``."""

    def __init__(self) -> None:
        self.models: dict[str, list[dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []
        self.forbidden = False
        self.url = ""

    def sha(self, name: str, index: int = -1) -> str:
        commits = self.models[name]
        return hashlib.sha1(f"{name} {index % len(commits)}".encode()).hexdigest()

    def files(self, name: str, revision: str) -> dict[str, bytes] | None:
        commits = self.models.get(name, [])
        for i, commit in enumerate(commits):
            if revision == self.sha(name, i) or (revision == "main" and i == len(commits) - 1):
                return commit
        return None

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        files = dict(self.models[name][-1])
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
            else:
                raise ValueError(f"not served: {line['key']}")
        self.models[name].append(files)


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, status: int, content: object = b"", **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self) -> None:
        body = self.body()
        if self.hub.forbidden:
            return self.answer(403, {"error": "Forbidden"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name in self.hub.models:
                return self.answer(409, {"error": "exists", "url": f"{self.hub.url}/{name}"})
            self.hub.models[name] = [{}]
            self.hub.private[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
            return self.answer(200, {"url": f"{self.hub.url}/{name}"})
        name, _, action = self.path.removeprefix("/api/models/").partition("/main")[0].rpartition("/")
        if action == "preupload":
            asked = json.loads(body)["files"]
            return self.answer(200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False,
                                                "oid": None} for f in asked]})  # fmt: skip
        if action == "commit":
            self.hub.commit(name, [json.loads(line) for line in body.splitlines()])
            return self.answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{self.hub.sha(name)}",
                                     "commitOid": self.hub.sha(name)})  # fmt: skip
        return self.answer(404, {"error": f"not served: {self.path}"})

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/api/whoami-v2":
            return self.answer(200, {"name": "me", "type": "user", "orgs": []})
        match = re.fullmatch(
            r"/api/(?:models/|(?=datasets/))((?:datasets/)?[^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path
        )
        if match:
            name, kind, revision = match[1], match[2], match[3] or "main"
            files = self.hub.files(name, revision)
            if files is None:
                return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            if kind == "tree":
                entries = [{"type": "file", "path": k, "size": len(v), "oid": blob(v)} for k, v in files.items()]
                return self.answer(200, entries)
            index = -1 if revision == "main" else next(i for i in range(len(self.hub.models[name]))
                                                       if self.hub.sha(name, i) == revision)  # fmt: skip
            siblings = [{"rfilename": k} for k in files]
            about = {"id": name, "modelId": name, "sha": self.hub.sha(name, index), "siblings": siblings, "tags": []}
            return self.answer(200, {**about, "private": self.hub.private.get(name, False)})
        match = re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        files = self.hub.files(match[1], match[2]) if match else None
        if not match or files is None or match[3] not in files:
            return self.answer(404, {"error": "not found"}, X_Error_Code="EntryNotFound")
        content = files[match[3]]
        commit = self.hub.sha(match[1]) if match[2] == "main" else match[2]
        return self.answer(200, content, ETag=f'"{blob(content)}"', X_Repo_Commit=commit)

    do_HEAD = do_GET


def blob(content: bytes) -> str:
    """The name of a content in git."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """A hub on loopback."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
