"""The routes: requests through the door, checks and the service, and what comes back as HTTP. Knows Flask; decides
nothing about answers.
"""

import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flask import Flask, Response, g, jsonify, request, send_from_directory
from werkzeug.exceptions import HTTPException
from werkzeug.routing import PathConverter

from config import __version__
from server.body import MAX_BYTES, read_json
from server.door import Door
from server.errors import RequestError, unavailable
from server.fields import read_table
from server.http import WHEN_GONE
from server.metrics import Metrics
from server.openapi import document
from server.protocol import read_chat, read_completion, read_tokenize
from server.security import ANY, Access
from server.service import Answer, Service
from server.tables import DETOKENIZE
from server.worker import Cancelled

STATIC = Path(__file__).parent / "static"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; frame-ancestors 'none'; form-action 'none'; "
    "require-trusted-types-for 'script'; trusted-types dompurify"  # text becomes HTML through DOMPurify or not at all
)
OPEN_PATHS = ("/health", "/", "/favicon.ico")
CLIENT_GONE = 499


class _Name(PathConverter):
    """A model's name, which may be a path from the root."""

    regex = ".+"
    part_isolating = False


@dataclass(frozen=True)
class Parts:
    """What the routes are made of. log: gets a line for each request."""

    service: Service
    door: Door
    access: Access
    metrics: Metrics
    log: Callable[[str], None] | None = None


def create_app(parts: Parts) -> Flask:
    """The WSGI application."""
    app = Flask("torchchat", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BYTES
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False
    app.url_map.converters["name"] = _Name
    worker = parts.service.worker
    parts.metrics.watch("waiting", "Sequences that wait for a place in the batch.", lambda: worker.waiting)
    parts.metrics.watch("running", "Sequences that are read or answered now.", lambda: worker.running)
    parts.metrics.watch("requests_inside", "Requests that were taken and not answered yet.", lambda: parts.door.inside)
    _guard(app, parts)
    _answer_errors(app)
    _add_answers(app, parts)
    _add_facts(app, parts)
    _add_tokens(app, parts)
    _add_page(app)
    return app


def _guard(app: Flask, parts: Parts) -> None:
    access, door = parts.access, parts.door

    @app.before_request
    def check() -> Response | None:
        g.began = time.perf_counter()
        g.inside, g.cross_origin = False, None
        access.check_host(request.headers.get("Host"))
        origin = request.headers.get("Origin")
        if access.check_origin(origin, request.headers.get("Host")):
            g.cross_origin = origin
            if request.method == "OPTIONS":
                return Response(status=204)
        if not (request.path in OPEN_PATHS or request.path.startswith("/static/")):
            access.check_key(request.headers.get("Authorization"))
        if request.method == "POST":
            if parts.service.worker.death():
                raise unavailable("the engine has failed and the server ends")
            door.enter()
            g.inside = True
        return None

    @app.after_request
    def finish(response: Response) -> Response:
        headers = response.headers
        headers["X-Content-Type-Options"] = "nosniff"
        headers["Referrer-Policy"] = "no-referrer"
        headers["Cross-Origin-Resource-Policy"] = "same-origin"
        headers.setdefault("Cache-Control", "no-store")
        if g.get("cross_origin"):
            headers["Access-Control-Allow-Origin"] = ANY if ANY in access.origins else g.cross_origin
            headers["Vary"] = "Origin"
            headers["Cross-Origin-Resource-Policy"] = "cross-origin"
            headers["Access-Control-Allow-Methods"] = "GET, POST"
            headers["Access-Control-Allow-Headers"] = "Authorization, Content-Type"
            headers["Access-Control-Expose-Headers"] = "Retry-After"
            headers["Access-Control-Max-Age"] = "600"
        response.call_on_close(_leave(parts, response))
        return response


def _leave(parts: Parts, response: Response) -> Callable[[], None]:
    """What happens once a response was sent, or could not be."""
    route = request.url_rule.rule if request.url_rule is not None else "none"
    inside, answer = g.get("inside", False), g.get("answer")
    began, line = g.get("began", 0.0), f"{request.method} {request.path}"

    def leave() -> None:
        if answer is not None:
            answer.close()
        parts.metrics.requests.labels(route, str(response.status_code)).inc()
        if parts.log is not None:
            told = f", {answer.tokens} tokens" if answer is not None else ""
            parts.log(f"{line} {response.status_code} in {time.perf_counter() - began:.3f} s{told}")
        if inside:
            parts.door.leave()

    return leave


def _answer_errors(app: Flask) -> None:
    @app.errorhandler(RequestError)
    def refused(error: RequestError) -> Response:
        response = jsonify(error.body())
        response.status_code = error.status
        response.headers.update(error.headers)
        return response

    @app.errorhandler(Cancelled)
    def gone(error: Cancelled) -> Response:
        return Response(status=CLIENT_GONE)

    @app.errorhandler(HTTPException)
    def http(error: HTTPException) -> Response:
        status = error.code or 500
        messages = {
            404: f"there is no {request.path[:200]} here; GET /openapi.json tells what there is",
            405: f"{request.path[:200]} does not take {request.method}",
            413: f"the body is larger than {MAX_BYTES >> 20} MiB",
        }
        codes = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
        response = refused(RequestError(status, messages.get(status, error.name), code=codes.get(status)))
        for name, value in error.get_headers():
            if name == "Allow":
                response.headers[name] = value
        return response

    @app.errorhandler(Exception)
    def failed(error: Exception) -> Response:
        traceback.print_exception(error, file=sys.stderr)
        return refused(RequestError(500, "the server failed on this request", code="internal_error"))


def _body() -> dict[str, Any]:
    return read_json(request.get_data(cache=False), request.headers.get("Content-Type", ""))


def _check_model(parts: Parts, body: dict[str, Any]) -> None:
    name, ours = body.get("model"), parts.service.served.name
    if name is not None and name != ours:
        shown = str(name)[:200]
        raise RequestError(
            404, f"the model {shown!r} is not served here; {ours!r} is", param="model", code="model_not_found"
        )


def _respond(answer: Answer) -> Response:
    """Begins an answer; a client that goes away ends it."""
    g.answer = answer
    request.environ.get(WHEN_GONE, lambda call: None)(answer.close)
    answer.begin()
    if not answer.options.stream:
        response = jsonify(answer.whole())
    else:
        response = Response(_quietly(answer.events()), mimetype="text/event-stream")
        response.headers["X-Accel-Buffering"] = "no"
    if answer.options.ignored:
        response.headers["Torchchat-Ignored-Fields"] = _header_text(", ".join(answer.options.ignored))
    return response


def _quietly(events: Iterator[bytes]) -> Iterator[bytes]:
    """A stream whose client has gone just ends."""
    try:
        yield from events
    except Cancelled:
        return


def _header_text(text: str) -> str:
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text)[:500]


def _add_answers(app: Flask, parts: Parts) -> None:
    service = parts.service

    @app.post("/v1/chat/completions")
    def chat() -> Response:
        body = _body()
        _check_model(parts, body)
        return _respond(service.chat(read_chat(body, service.served.sampling)))

    @app.post("/v1/completions")
    def completions() -> Response:
        body = _body()
        _check_model(parts, body)
        return _respond(service.complete(read_completion(body, service.served.sampling)))


def _add_facts(app: Flask, parts: Parts) -> None:
    served, worker = parts.service.served, parts.service.worker
    model = {"id": served.name, "object": "model", "created": served.created, "owned_by": "torchchat"}
    model["max_model_len"] = served.context

    @app.get("/v1/models")
    def models() -> Response:
        return jsonify({"object": "list", "data": [model]})

    @app.get("/v1/models/<name:name>")
    def one_model(name: str) -> Response:
        _check_model(parts, {"model": name})
        return jsonify(model)

    @app.get("/v1/customization")
    def customization() -> Response:
        return jsonify(dict(served.facts))

    @app.get("/health")
    def health() -> Response:
        status = "dead" if worker.death() else "draining" if parts.door.closed else "ok"
        response = jsonify({"status": status})
        response.status_code = 200 if status == "ok" else 503
        return response

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(parts.metrics.page(), content_type=parts.metrics.CONTENT_TYPE)

    @app.get("/version")
    def version() -> Response:
        return jsonify({"version": __version__})

    @app.get("/openapi.json")
    def openapi() -> Response:
        return jsonify(document())


def _add_tokens(app: Flask, parts: Parts) -> None:
    service = parts.service

    @app.post("/tokenize")
    def tokenize() -> Response:
        body = _body()
        _check_model(parts, body)
        tokens = service.render(read_tokenize(body))
        return jsonify({"tokens": tokens, "count": len(tokens), "max_model_len": service.served.context})

    @app.post("/detokenize")
    def detokenize() -> Response:
        body = _body()
        _check_model(parts, body)
        tokens = read_table(body, DETOKENIZE)["tokens"]
        return jsonify({"prompt": service.decode(tokens)})


def _add_page(app: Flask) -> None:
    if not (STATIC / "index.html").is_file():
        return

    def page(name: str) -> Response:
        response = send_from_directory(STATIC, name)
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Frame-Options"] = "DENY"
        response.headers["Cache-Control"] = "no-cache"  # it is asked for again, and is short where nothing changed
        return response

    app.add_url_rule("/", view_func=lambda: page("index.html"), endpoint="page")
    app.add_url_rule("/static/<path:name>", view_func=page, endpoint="static")
