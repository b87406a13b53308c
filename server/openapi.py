"""/openapi.json, made from the tables that requests are checked by."""

from functools import lru_cache
from typing import Any

from config import __version__
from server.fields import Table, object_schema
from server.tables import CHAT, COMPLETION, DETOKENIZE, TOKENIZE

POSTS: dict[str, tuple[str, Table]] = {
    "/v1/chat/completions": ("Answer a conversation; with stream as server-sent events.", CHAT),
    "/v1/completions": ("Continue a text.", COMPLETION),
    "/tokenize": ("The tokens of a text or of a conversation.", TOKENIZE),
    "/detokenize": ("The text of tokens.", DETOKENIZE),
}
GETS = {
    "/v1/models": "The model that is served.",
    "/v1/models/{model}": "It alone.",
    "/v1/customization": "What runs it: device, dtype, quantization, compilation, and what that costs.",
    "/health": "200 while requests are taken, else 503.",
    "/metrics": "Counters and histograms for Prometheus.",
    "/version": "The version of torchchat.",
    "/openapi.json": "This document.",
}
ERRORS = {
    "400": "Something in the request is wrong; error.param names it.",
    "401": "The API key is missing or wrong.",
    "403": "The host, or the page that asks, is not known.",
    "404": "The model is not served here.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "429": "The server has as many requests as it takes; Retry-After tells when to try again.",
    "500": "The request failed.",
    "503": "The server takes no requests now.",
}


@lru_cache(maxsize=1)
def document() -> dict[str, Any]:
    """OpenAPI 3.1."""
    errors = {status: {"description": why, "content": _json(_ref("Error"))} for status, why in ERRORS.items()}
    paths: dict[str, Any] = {}
    schemas: dict[str, Any] = {"Error": _error()}
    for path, (summary, table) in POSTS.items():
        name = "".join(part.capitalize() for part in path.strip("/").replace("v1/", "").split("/")) + "Request"
        schemas[name] = object_schema(table)
        body = {"required": True, "content": _json(_ref(name))}
        responses = {"200": {"description": "Done.", "content": _json({"type": "object"})}, **errors}
        paths[path] = {"post": {"summary": summary, "requestBody": body, "responses": responses}}
    for path, summary in GETS.items():
        get: dict[str, Any] = {"summary": summary, "responses": {"200": {"description": "Done."}}}
        if "{model}" in path:
            get["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
        paths[path] = {"get": get}
    return {
        "openapi": "3.1.0",
        "info": {"title": "torchchat", "version": __version__, "description": "OpenAI's API in front of one model."},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "If one was set."}},
        },
        "security": [{}, {"key": []}],
    }


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _error() -> dict[str, Any]:
    nullable = {"type": ["string", "null"]}
    properties = {"message": {"type": "string"}, "type": {"type": "string"}, "param": nullable, "code": nullable}
    return {"type": "object", "properties": {"error": {"type": "object", "properties": properties}}}
