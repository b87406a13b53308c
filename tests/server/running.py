"""Servers in this process, on real sockets, and what tests say to them. Real engines, whose steps can be held up."""

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import openai
from flask import Flask

from cli.builder import Built, make_engine
from cli.serving import customization
from config.settings import SamplingParams
from generate.engine import Engine
from server.app import Parts, create_app
from server.door import Door
from server.http import HttpServer, bind
from server.metrics import Metrics
from server.security import Access
from server.service import Served, Service
from server.worker import Worker

PATIENCE_S = 240  # of tests that would otherwise hang; nothing takes that long
CHAT = [{"role": "user", "content": "Tell me a story about a cat"}]


class Gate:
    """Stands before an engine's steps. Closed, they wait; `step` lets so many through."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._step = engine, engine.step
        self._changed = threading.Condition()
        self._left: float = float("inf")
        self._arrived = False
        engine.step = self._wait  # type: ignore[method-assign]

    def _wait(self) -> Any:
        with self._changed:
            self._arrived = True
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._left > 0, PATIENCE_S)
            self._left -= 1
            self._arrived = False
        return self._step()

    def close(self) -> None:
        with self._changed:
            self._left = 0

    def open(self, steps: float = float("inf")) -> None:
        with self._changed:
            self._left = steps
            self._changed.notify_all()

    def step(self, count: int = 1) -> None:
        """Let so many steps through, and return when they are done: the next one waits."""
        self.open(count)
        self.wait()

    def wait(self) -> None:
        """Until a step waits at the closed gate."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._arrived and self._left == 0, PATIENCE_S)


@dataclass
class Running:
    """A server that runs. Its address, and the parts that tests look into."""

    port: int
    engine: Engine
    worker: Worker
    door: Door
    gate: Gate
    app: Flask
    http: HttpServer
    thread: threading.Thread
    lines: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def openai(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE_S)

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers (names in lower case) and body, read as JSON where it is that. body: bytes as they are."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        with contextlib.closing(connection):
            given = {} if body is None else {"Content-Type": "application/json"}
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, data, {**given, **(headers or {})})
            response = connection.getresponse()
            data, told = response.read(), {name.lower(): value for name, value in response.getheaders()}
        is_json = told.get("content-type", "").startswith("application/json")
        return response.status, told, json.loads(data) if is_json else data

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        status, _, found = self.ask("POST", path, body, headers)
        return status, found

    def connect(self, path: str, body: Any) -> socket.socket:
        """A connection on which this was asked and nothing was read."""
        data = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
        )
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)
        connection.sendall(f"{head}\r\n\r\n".encode() + data)
        return connection

    def until(self, true: Callable[[], bool]) -> None:
        """Returns once this is true."""
        deadline = threading.Event()
        for _ in range(PATIENCE_S * 100):
            if true():
                return
            deadline.wait(0.01)
        raise AssertionError("it never came true")


def read_events(data: bytes) -> list[Any]:
    """The documents of a stream that has ended, and None for its [DONE]."""
    lines = [line for line in data.decode().split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [None if line == "data: [DONE]" else json.loads(line.removeprefix("data: ")) for line in lines]


@contextlib.contextmanager
def running(
    built: Built,
    *,
    name: str | None = None,
    queue: int = 4,
    key: str | None = None,
    origins: tuple[str, ...] = (),
    sampling: SamplingParams | None = None,
    max_seq_len: int = 1024,
) -> Iterator[Running]:
    """A server with an engine of its own around the weights of `built`."""
    prepared = built.prepared
    engine = make_engine(prepared, built.model, max_seq_len, None, serves=True)
    gate = Gate(engine)
    metrics, door = Metrics(), Door(prepared.settings.max_num_seqs + queue)
    worker = Worker(engine, metrics)
    served = Served(
        name or prepared.name,
        engine,
        prepared.tokenizer,
        prepared.template,
        sampling or prepared.sampling,
        customization(built),
    )
    listener = bind("127.0.0.1", 0)
    lines: list[str] = []
    app = create_app(Parts(Service(served, worker), door, Access.of("127.0.0.1", origins, key), metrics, lines.append))
    server = HttpServer(app, listener, door.limit)
    door.on_empty = server.look
    engine_thread = threading.Thread(target=worker.run)
    thread = threading.Thread(target=server.run)
    engine_thread.start()
    thread.start()
    try:
        yield Running(listener.getsockname()[1], engine, worker, door, gate, app, server, thread, lines)
    finally:
        gate.open()
        worker.stop()
        server.end()
        for one in (engine_thread, thread):
            one.join(PATIENCE_S)
            assert not one.is_alive()
