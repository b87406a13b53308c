"""What `server` and `browser` have alike: flags, the model, the engine's thread, the HTTP server and how it ends.
Imports torch and Flask only once the flags are known to be good.
"""

import argparse
import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from socket import socketpair
from typing import TYPE_CHECKING, Any

from cli.console import cache_dir_or_say, describe_build, status, warn
from cli.options import add_model_arguments, build_settings, whole_number
from config.settings import BuildSettings

if TYPE_CHECKING:  # only their names: this module is imported for --help, which must not wait for torch
    import socket

    from cli.builder import Built, Prepared
    from server.security import Access

KEY_VARIABLE = "TORCHCHAT_API_KEY"
MAX_QUEUE = 64
MOST_QUEUED = 1024
PORT = 8000
SWITCH_S = 0.0005
"""So long a thread may keep the interpreter from the one that runs the engine, which issues hundreds of short calls a
step; Python's own 5 ms are a whole step."""
LAST_WORDS_S = 10.0
"""So long the answers that a dead engine leaves may take to be sent."""

OnReady = Callable[[str], None]
"""Is told the address of the page once it can be opened."""


def add_serving_arguments(parser: argparse.ArgumentParser, default_port: str = str(PORT)) -> None:
    """All flags of a command that serves. default_port: which port it takes without --port, in words."""
    add_model_arguments(parser)
    group = parser.add_argument_group("serving")
    group.add_argument(
        "--host", metavar="NAME", default="127.0.0.1", help="where to listen; 0.0.0.0: everywhere (default: 127.0.0.1)"
    )
    group.add_argument(
        "--port",
        metavar="N",
        type=whole_number(0, 65535),
        default=PORT,
        help=f"0: any that is free (default: {default_port})",
    )
    group.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"ask for this key (better set {KEY_VARIABLE}: everybody on this machine sees command lines)",
    )
    group.add_argument(
        "--max-num-seqs",
        metavar="N",
        type=whole_number(1, 1024),
        help="answers that are made at the same time (default: 8, on a GPU 32, if there is room)",
    )
    group.add_argument(
        "--max-queue",
        metavar="N",
        type=whole_number(0, MOST_QUEUED),
        default=MAX_QUEUE,
        help=f"requests that wait beside those; more are refused (429) (default: {MAX_QUEUE})",
    )
    group.add_argument(
        "--cors-origin",
        metavar="URL",
        action="append",
        default=[],
        help="let pages of this site ask, and let it be the server's name; *: all sites; may be given again",
    )
    group.add_argument("--verbose", action="store_true", help="a line on stderr for each request")


def serve(args: argparse.Namespace, environ: Mapping[str, str], on_ready: OnReady | None = None) -> int:
    """Serve until a signal ends it; the exit code. Raises UserError."""
    settings = build_settings(args, environ)
    if args.explain:
        return _explain(settings, args)

    from server.http import bind
    from server.security import Access

    key = args.api_key if args.api_key is not None else environ.get(KEY_VARIABLE) or None
    access = Access.of(args.host, args.cors_origin, key)
    listener = bind(args.host, args.port)
    try:
        built = _build(settings, args)
        built.engine.prepare(built.prepared.sampling, any_request=True)
        return serve_built(built, access, listener, args, on_ready)
    finally:
        listener.close()


def with_room(prepared: "Prepared", max_num_seqs: int | None) -> "tuple[Prepared, str]":
    """The same with room for as many sequences as there can be; why so many, in words. Raises UserError."""
    from cli.room import room_for

    room = room_for(prepared, max_num_seqs, prepared.settings.max_seq_len)
    settings = dataclasses.replace(prepared.settings, max_num_seqs=room.num_seqs, max_seq_len=room.max_seq_len)
    many = f"{room.num_seqs} answers at a time, each" if room.num_seqs > 1 else "one answer at a time,"
    told = f"{many} of {room.max_seq_len} tokens with its prompt: {room.why}"
    return dataclasses.replace(prepared, settings=settings), told


def _explain(settings: BuildSettings, args: argparse.Namespace) -> int:
    from cli.builder import prepare
    from cli.explain_report import show_explanation

    prepared, _ = with_room(prepare(settings), args.max_num_seqs)
    assert prepared.settings.max_seq_len is not None
    return show_explanation(prepared, prepared.settings.max_seq_len, prepared.settings.max_num_seqs, as_json=False)


def _build(settings: BuildSettings, args: argparse.Namespace) -> "Built":
    from cli.builder import build, prepare

    prepared, room = with_room(prepare(settings), args.max_num_seqs)
    built = build(prepared, serves=True)
    status(describe_build(prepared.settings, prepared.device, prepared.dtype, prepared.plan))
    for line in (*prepared.remarks(), room):
        status(line)
    template = prepared.template
    assert template is not None
    if template.plain:
        status(f"{prepared.name} was not made to converse: {template.origin}")
    elif template.origin != "its own":
        status(f"chat format: {template.origin}")
    return built


def serve_built(
    built: "Built", access: "Access", listener: "socket.socket", args: argparse.Namespace, on_ready: OnReady | None
) -> int:
    """Serve with an engine that is prepared, from the thread that built it; the exit code. args: with `max_queue` and
    `verbose`.
    """
    from server.app import Parts, create_app
    from server.door import Door
    from server.http import HttpServer
    from server.metrics import Metrics
    from server.service import Served, Service
    from server.worker import Worker

    prepared, engine = built.prepared, built.engine
    assert prepared.tokenizer is not None
    assert prepared.template is not None
    metrics = Metrics()
    door = Door(prepared.settings.max_num_seqs + args.max_queue)
    worker = Worker(engine, metrics)
    served = Served(
        prepared.name, engine, prepared.tokenizer, prepared.template, prepared.sampling, customization(built)
    )
    log = status if args.verbose else None
    app = create_app(Parts(Service(served, worker), door, access, metrics, log))
    http = HttpServer(app, listener, door.limit)

    def end() -> None:
        door.close()
        http.end(lambda: door.is_empty)

    def give_up() -> None:
        threading.Timer(LAST_WORDS_S, os._exit, (1,)).start()
        end()

    def serve_http() -> None:
        http.run()
        worker.stop()

    door.on_empty = http.look
    worker.on_death = give_up
    sys.setswitchinterval(SWITCH_S)
    thread = threading.Thread(target=serve_http, name="http")
    with _signals(end):
        thread.start()
        _announce(args, listener, access, on_ready)
        worker.run()
        thread.join()
    if worker.death():
        warn(f"error: {worker.death()}")
        sys.stderr.flush()
        os._exit(1)  # at once: what a device that failed still holds may not be waited for
    return 0


def _announce(args: argparse.Namespace, listener: "socket.socket", access: "Access", on_ready: OnReady | None) -> None:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    if not host.startswith("127.") and host != "::1" and access.key is None:
        warn(f"whoever reaches {shown}:{port} can use it: {KEY_VARIABLE} sets a key")
    address = f"http://{shown}:{port}"
    status(f"listening on {address}{' (the key is asked for)' if access.key is not None else ''}; Ctrl-C ends it")
    if on_ready is not None:
        on_ready(f"http://{'localhost' if host in ('0.0.0.0', '::') else shown}:{port}/")


@contextmanager
def _signals(end: Callable[[], None]) -> Iterator[None]:
    """While inside, the first SIGTERM or SIGINT calls `end`, in another thread; a second one ends the process at once,
    whatever it does.
    """
    receiver, sender = socketpair()
    receiver.setblocking(True)
    sender.setblocking(False)

    def listen() -> None:
        if receiver.recv(1):
            end()
        if number := receiver.recv(1):
            os._exit(128 + number[0])

    # Python's own handlers run between two instructions of this thread, which may be long apart: they do nothing, and
    # another thread hears of the signal through the socket.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    fd_before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=listen, name="signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(fd_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        sender.close()


def customization(built: "Built") -> dict[str, Any]:
    """What runs the model, as JSON: GET /v1/customization, and what the page shows."""
    from model.device import device_name

    prepared = built.prepared
    settings, sampling, plan = prepared.settings, prepared.sampling, prepared.plan
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    defaults = dataclasses.asdict(sampling)
    return {
        "model": prepared.name,
        "device": prepared.device.device.type,
        "device_name": device_name(prepared.device.device),
        "device_why": prepared.device.why,
        "dtype": prepared.dtype.name,
        "dtype_why": prepared.dtype.why,
        "quantization": None if plan is None else plan.describe(),
        "compiled": settings.compile,
        "compiled_prefill": settings.compile_prefill,
        "bytes_per_token": built.ledger.weight_bytes_per_token,
        "bandwidth": _bandwidth(prepared),
        "context_length": built.engine.cache.max_seq_len,
        "max_num_seqs": settings.max_num_seqs,
        "chat_format": prepared.template.origin if prepared.template is not None else None,
        "sampling": {
            **{name: defaults[name] for name in names},
            "max_tokens": sampling.max_new_tokens,
        },
    }


def _bandwidth(prepared: "Prepared") -> float | None:
    """Bytes a second that the machine reads; None where there is no room to measure it."""
    import torch

    from model.device import known_bandwidth

    try:
        return known_bandwidth(prepared.device.device, cache_dir_or_say(), warn).read_gb_s * 1e9
    except torch.OutOfMemoryError:
        return None
