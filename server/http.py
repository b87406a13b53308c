"""waitress, made to serve streams: clients that go away are noticed at once, its errors are JSON, and it drains before
it ends. Knows sockets and WSGI, no routes.
"""

import errno
import json
import logging
import socket
import threading
from collections.abc import Callable
from typing import Any

from waitress import wasyncore
from waitress.adjustments import Adjustments
from waitress.channel import HTTPChannel
from waitress.server import TcpWSGIServer
from waitress.task import ErrorTask, ThreadedTaskDispatcher, WSGITask

from config.errors import UserError
from server.body import MAX_BYTES
from server.errors import RequestError

WHEN_GONE = "torchchat.when_gone"
"""In the WSGI environment: a function that takes another one, which is called once the client is gone."""
SPARE_THREADS = 8
"""Beside those that wait for answers: for what takes no time."""
MAX_HEADER_BYTES = 32 << 10
MAX_CONNECTIONS = 4096
OTHER_FILES = 128
IDLE_S = 120
"""A connection on which nothing moves for so long is closed."""
STACK_BYTES = 1 << 20

OnGone = Callable[[], None]


class _ErrorTask(ErrorTask):  # type: ignore[misc]
    """What waitress refuses by itself, in OpenAI's shape."""

    def execute(self) -> None:
        error = self.request.error
        codes = {413: "body_too_large", 431: "headers_too_large"}
        message = "the server failed" if error.code >= 500 else str(error.body)
        body = json.dumps(RequestError(error.code, message, code=codes.get(error.code)).body()).encode()
        self.status = f"{error.code} {error.reason}"
        self.response_headers.append(("Content-Type", "application/json"))
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class _Task(WSGITask):  # type: ignore[misc]
    def get_environment(self) -> dict[str, Any]:
        environ: dict[str, Any] = super().get_environment()
        environ[WHEN_GONE] = self.channel.when_gone
        return environ


class _Channel(HTTPChannel):  # type: ignore[misc]
    """A connection."""

    task_class = _Task
    error_task_class = _ErrorTask
    _on_gone: OnGone | None = None
    _gone = False

    def when_gone(self, call: OnGone) -> None:
        """Have `call` called when the client goes, or now if it has gone. It replaces the one before."""
        with self.outbuf_lock:
            self._on_gone = call
            gone = self._gone
        if gone:
            call()

    def handle_close(self) -> None:
        super().handle_close()
        with self.outbuf_lock:
            call, self._on_gone, self._gone = self._on_gone, None, True
        if call is not None:
            call()

    @property
    def is_quiet(self) -> bool:
        return not self.requests and not self.total_outbufs_len


class HttpServer(TcpWSGIServer):  # type: ignore[misc]
    """Serves one WSGI application on a socket that is bound. `run` in one thread; the rest from any."""

    channel_class = _Channel

    def __init__(self, application: Any, listener: socket.socket, streams: int) -> None:
        """streams: so many requests may take long at the same time; each has a thread."""
        logging.getLogger("waitress").setLevel(logging.CRITICAL)  # the application answers for what goes wrong
        adjustments = Adjustments(
            channel_request_lookahead=1,  # else nobody listens for a client that goes while it is answered
            asyncore_use_poll=True,
            connection_limit=_most_connections(),
            channel_timeout=IDLE_S,
            max_request_body_size=MAX_BYTES + 1,
            max_request_header_size=MAX_HEADER_BYTES,
            backlog=1024,
            ident="torchchat",
            threads=streams + SPARE_THREADS,
        )
        before = threading.stack_size(STACK_BYTES)
        try:
            dispatcher = ThreadedTaskDispatcher()
            dispatcher.set_thread_count(adjustments.threads)
        finally:
            threading.stack_size(before)
        name = listener.getsockname()
        self._ending: Callable[[], bool] | None = None
        self._guard, self._over = threading.RLock(), False  # a signal may come while this thread has the lock
        super().__init__(
            application,
            map={},
            _sock=listener,
            dispatcher=dispatcher,
            adj=adjustments,
            bind_socket=False,
            sockinfo=(listener.family, listener.type, listener.proto, name),
        )

    def run(self) -> None:
        """Serve until `end` was called and what it waits for has come."""
        while not (self._ending is not None and self._ending() and all(c.is_quiet for c in self._channels())):
            wasyncore.loop(timeout=1, use_poll=True, map=self._map, count=1)
        with self._guard:
            self._over = True
        self.task_dispatcher.shutdown(timeout=1)
        wasyncore.close_all(self._map)

    def end(self, once: Callable[[], bool] = lambda: True) -> None:
        """End once `once()` is true and all that was written has been sent. A signal handler may call this."""
        self._ending = once
        self.look()

    def look(self) -> None:
        """Look now whether it is time to end."""
        if self._ending is not None:
            self.pull_trigger()

    def pull_trigger(self, thunk: Callable[[], None] | None = None) -> None:
        """Have the loop look around, and call `thunk`. Nothing once it is over."""
        with self._guard:
            if not self._over:
                self.trigger.pull_trigger(thunk)

    def maintenance(self, now: float) -> None:
        """Close connections on which nothing moves, those too whose client does not read what it asked for."""
        super().maintenance(now)
        for channel in self._channels():
            if channel.total_outbufs_len and channel.last_activity < now - IDLE_S:
                channel.handle_close()  # waitress would wait until it can be written to, which may be never

    def _channels(self) -> list[_Channel]:
        return list(self.active_channels.values())


def _most_connections() -> int:
    """As many as there may be open files, less those that we need otherwise."""
    try:
        import resource
    except ImportError:  # Windows, where sockets are no files
        return MAX_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else max(1, min(MAX_CONNECTIONS, soft - OTHER_FILES))


def bind(host: str, port: int) -> socket.socket:
    """A socket on an address, not listening yet. Raises UserError when it cannot be had."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host}: is no address of this machine: {error}") from None
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"--port {port}: something else listens on {host} there already: end it, or take another port (0: any "
                "that is free)"
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM):
            raise UserError(f"--port {port}: may not be used without more rights: take one above 1023") from None
        raise UserError(f"--host {host}: cannot be listened on: {error.strerror}") from None
    return listener
