"""Bytes of a request -> a JSON object, within limits of size and nesting. Knows JSON, no fields."""

import json
from typing import Any, NoReturn

from server.errors import RequestError
from server.tables import MAX_DEPTH

MAX_BYTES = 8 << 20


def read_json(data: bytes, content_type: str) -> dict[str, Any]:
    """Raises RequestError: 415 for another type, 413 for too much, 400 for what is no JSON object."""
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise RequestError(
            415, "send JSON, with the header Content-Type: application/json", code="unsupported_media_type"
        )
    if len(data) > MAX_BYTES:
        raise RequestError(413, f"the body is larger than {MAX_BYTES >> 20} MiB", code="body_too_large")
    try:
        value = json.loads(data, parse_constant=_refuse)
        deep = _deeper_than(value, MAX_DEPTH)
    except RecursionError:
        deep = True
    except ValueError as error:  # no UTF-8, no JSON, numbers of thousands of digits
        why = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        where = f" (line {error.lineno}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        raise RequestError(400, f"the body is not valid JSON: {why}{where}", code="invalid_json") from None
    if deep:
        raise RequestError(400, f"the body is nested deeper than {MAX_DEPTH} levels", code="invalid_json")
    if not isinstance(value, dict):
        raise RequestError(400, "the body must be a JSON object", code="invalid_json")
    return value


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON's")


def _deeper_than(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True
