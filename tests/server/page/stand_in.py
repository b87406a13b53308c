"""A server that answers the page as the real one does, by script: which pieces, when, and what goes wrong. Knows no
model. What it shares with the real one, the page and its policy, is taken from there.
"""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from server.app import POLICY, STATIC

TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}
SCRIPT = "text/javascript; charset=utf-8"
CUSTOMIZATION = {
    "model": "tiny-8b",
    "device": "cpu",
    "device_name": "A CPU, 2 cores",
    "device_why": "fast: no cuda, no mps",
    "dtype": "bf16",
    "dtype_why": "fast: the CPU has AMX bf16",
    "quantization": "int8",
    "compiled": True,
    "compiled_prefill": False,
    "bytes_per_token": 61_000_000,
    "bandwidth": 32e9,
    "context_length": 2048,
    "max_num_seqs": 8,
    "chat_format": "its own",
    "sampling": {
        "temperature": 0.6,
        "top_k": 0,
        "top_p": 0.95,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "max_tokens": None,
    },
}


@dataclass
class Refusal:
    """An answer that is an error."""

    status: int
    message: str
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Answer:
    """Pieces of text one after the other; a callable is called in their place, to wait or to look."""

    pieces: Iterable[str | Callable[[], object]]
    finish: str = "stop"
    pause: float = 0.0
    breaks: str = ""
    """ "error": an error event at the end, "cut": the connection ends without a word."""


class StandIn:
    """Runs on a port of its own while the `with` lasts. `answers` are used up in turn; then "Hello." is the answer."""

    def __init__(self, key: str | None = None, customization: dict[str, Any] | None = None) -> None:
        self.key = key
        self.customization = CUSTOMIZATION if customization is None else customization
        self.answers: list[Answer | Refusal] = []
        self.requests: list[dict[str, Any]] = []
        self.disconnected = threading.Event()
        self.connections: list[socket.socket] = []
        self._port = 0
        self._server: ThreadingHTTPServer | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """On the same port as before, if there was one."""
        stand_in = self

        class Handler(_Handler):
            owner = stand_in

        ThreadingHTTPServer.allow_reuse_address = True
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._server.daemon_threads = True
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):  # it is closed already
                connection.shutdown(socket.SHUT_RDWR)
        self.connections.clear()

    def __enter__(self) -> "StandIn":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class _Handler(BaseHTTPRequestHandler):
    owner: StandIn
    protocol_version = "HTTP/1.1"  # connections stay for the next request
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.owner.connections.append(self.connection)

    def do_GET(self) -> None:
        if self.path == "/health":
            self._json(200, {"status": "ok"})
        elif self.path == "/v1/customization":
            if self._key_is_right():
                self._json(200, self.owner.customization)
        else:
            self._file("index.html" if self.path == "/" else self.path.removeprefix("/static/"))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._key_is_right():
            return
        if self.path == "/tokenize":  # a token is a word here
            count = sum(len(message["content"].split()) + 1 for message in body["messages"])
            self._json(200, {"count": count})
            return
        self.owner.requests.append(body)
        answer = self.owner.answers.pop(0) if self.owner.answers else Answer(["Hel", "lo."])
        if isinstance(answer, Refusal):
            self._error(answer)
            return
        try:
            self._stream(answer)
        except (BrokenPipeError, ConnectionResetError):
            self.owner.disconnected.set()

    def _stream(self, answer: Answer) -> None:
        self._head(200, "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        made = 0
        self._chunk(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
        for piece in answer.pieces:
            if callable(piece):
                piece()
                continue
            made += 1
            self._chunk(choices=[{"index": 0, "delta": {"content": piece}, "finish_reason": None}])
            if answer.pause:
                time.sleep(answer.pause)
        if answer.breaks == "cut":
            return
        if answer.breaks == "error":
            self._event({"error": {"message": "out of memory", "type": "server_error", "param": None, "code": None}})
        else:
            self._chunk(choices=[{"index": 0, "delta": {}, "finish_reason": answer.finish}])
            details = {"cached_tokens": 3}
            usage = {
                "prompt_tokens": 12,
                "completion_tokens": made,
                "total_tokens": 12 + made,
                "prompt_tokens_details": details,
            }
            self._chunk(choices=[], usage=usage)
        self.wfile.write(b"data: [DONE]\n\n")

    def _chunk(self, **parts: object) -> None:
        self._event(
            {
                "id": "chatcmpl-1",
                "object": "chat.completion.chunk",
                "created": 1,
                "model": self.owner.customization["model"],
                **parts,
            }
        )

    def _event(self, data: object) -> None:
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())
        self.wfile.flush()

    def _key_is_right(self) -> bool:
        right = self.owner.key is None or self.headers.get("Authorization") == f"Bearer {self.owner.key}"
        if not right:
            self._error(Refusal(401, "no key, or a wrong one", "invalid_api_key"))
        return right

    def _error(self, refusal: Refusal) -> None:
        error = {"message": refusal.message, "type": "error", "param": None, "code": refusal.code}
        self._json(refusal.status, {"error": error}, refusal.headers)

    def _json(self, status: int, document: object, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(document).encode()
        self._head(status, "application/json")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _file(self, name: str) -> None:
        path = (STATIC / name).resolve()
        if not path.is_relative_to(STATIC) or not path.is_file():
            self._error(Refusal(404, "there is no such file"))
            return
        data = path.read_bytes()
        self._head(200, TYPES.get(path.suffix, SCRIPT))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _head(self, status: int, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-cache")

    def log_message(self, *_: object) -> None:
        """Says nothing."""
