"""A Hugging Face of one's own: repositories in memory behind HTTP, which can be made to fail as the real one does."""

import hashlib
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 4096
"""Files from this size on are kept as large ones: named by their SHA-256, and served from elsewhere."""


@dataclass
class Repository:
    files: dict[str, bytes]
    commit: str = COMMIT
    gated: bool = False
    """Whether only the token "granted" may have its files."""
    announced: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What its list of files says otherwise than is true: {"model.safetensors": {"size": 5}}."""


@dataclass
class FakeHub:
    """`faults`: for a path's last part, what happens to the next requests for it, one after the other: "reset" (at half
    of what is sent), "cut" (ends politely at half), or a status with headers, as (429, {"Retry-After": "1"}).
    """

    repositories: dict[str, Repository]
    url: str = ""
    faults: dict[str, list[Any]] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    ignores_ranges: bool = False

    def environment(self) -> dict[str, str]:
        return {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*", "no_proxy": "*"}

    def asked_for(self, name: str) -> list[dict[str, str]]:
        """The headers of the requests for a file's content."""
        return [headers for path, headers in self.requests if path.startswith("/cdn/") and path.endswith(f"/{name}")]


def listing(repository: Repository) -> list[dict[str, Any]]:
    siblings = []
    for name, data in repository.files.items():
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        about: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": git}
        if len(data) >= LARGE:
            about["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        siblings.append(about | repository.announced.get(name, {}))
    return siblings


@contextmanager
def serve(repositories: dict[str, Repository]) -> Iterator[FakeHub]:
    hub = FakeHub(repositories)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if path.startswith("/api/") and not path.startswith("/api/models/"):
                self.answer(404, b"")  # what huggingface_hub asks of its own accord
                return
            hub.requests.append((path, {key.lower(): value for key, value in self.headers.items()}))
            fault = next(iter(hub.faults.get(path.rpartition("/")[2], [])), None)
            if isinstance(fault, tuple):
                hub.faults[path.rpartition("/")[2]].pop(0)
                self.answer(fault[0], b"{}", **fault[1])
            elif path.startswith("/api/models/"):
                self.answer_model(path.removeprefix("/api/models/"))
            else:
                self.answer_file(path)

        def answer_model(self, path: str) -> None:
            checks_access, path = path.endswith("/auth-check"), path.removesuffix("/auth-check")
            hub_id, _, revision = path.partition("/revision/")
            repository = hub.repositories.get(hub_id)
            if repository is not None and checks_access and (code := self.refusal(repository)):
                self.answer(code, b"{}", **{"X-Error-Code": "GatedRepo"})
            elif repository is None:
                self.answer(401, b"{}", **{"X-Error-Code": "RepoNotFound"})
            elif revision not in ("", "main", "v1", repository.commit):
                self.answer(404, b"{}", **{"X-Error-Code": "RevisionNotFound"})
            else:
                about = {"id": hub_id, "sha": repository.commit, "siblings": listing(repository), "tags": []}
                self.answer(200, json.dumps(about | {"gated": repository.gated, "private": False}).encode())

        def answer_file(self, path: str) -> None:
            cdn, path = path.startswith("/cdn/"), path.removeprefix("/cdn")
            hub_id, _, rest = path.removeprefix("/").partition("/resolve/")
            repository = hub.repositories[hub_id]
            data = repository.files.get(rest.partition("/")[2])
            if data is None:
                self.answer(404, b"", **{"X-Error-Code": "EntryNotFound"})
            elif not cdn and (code := self.refusal(repository)):
                self.answer(code, b"", **{"X-Error-Code": "GatedRepo"})
            elif not cdn:
                self.answer(302, b"", Location=f"{hub.url}/cdn{path}")
            else:
                self.send_content(rest.rpartition("/")[2], data)

        def refusal(self, repository: Repository) -> int:
            """The status for who may not have its files; 0 for who may."""
            token = self.headers.get("Authorization")
            return 0 if not repository.gated or token == "Bearer granted" else 403 if token else 401

        def send_content(self, name: str, data: bytes) -> None:
            start = 0
            asked = self.headers.get("Range")
            if asked and not hub.ignores_ranges:
                start = int(asked.removeprefix("bytes=").rstrip("-"))
            body = data[start:]
            fault = hub.faults[name].pop(0) if hub.faults.get(name) else None
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if fault is None:
                self.wfile.write(body)
                return
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if fault == "reset":
                time.sleep(0.3)  # what has not been read yet is lost with it
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True

        def answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def clean_environment() -> dict[str, str]:
    """This process's, without what would lead to the real Hugging Face or to somebody's token."""
    others = ("HF_", "HUGGING_FACE", "TORCHCHAT_")
    return {key: value for key, value in os.environ.items() if not key.startswith(others)}
