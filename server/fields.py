"""What a field of a request may hold: each kind checks a value and describes itself in JSON Schema. Knows no field."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from config.settings import shorten
from server.errors import RequestError, invalid, unsupported

Read = Callable[[Any, str], Any]
"""A JSON value and the name of its field -> what it means. Raises RequestError."""


@dataclass(frozen=True)
class Kind:
    """One kind of value. schema: JSON Schema of what `read` accepts."""

    read: Read
    schema: Mapping[str, Any]


@dataclass(frozen=True)
class Field:
    """A field of a request. `refused`: we know it and do not have it; only `unless` (what it means anyway) passes.
    `ignored`: it changes no answer. A field that is null is as good as absent.
    """

    kind: Kind
    help: str = ""
    required: bool = False
    refused: str = ""
    unless: tuple[Any, ...] = ()
    ignored: bool = False


Table = Mapping[str, Field]


def whole(low: int, high: int) -> Kind:
    """A whole number from `low` to `high`."""

    def read(value: Any, param: str) -> int:
        if isinstance(value, float) and value.is_integer():  # JSON does not tell 1 from 1.0
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise _wrong_type(param, f"a whole number from {low} to {high}", value)
        if not low <= value <= high:
            raise invalid(param, f"'{param}' must be a whole number from {low} to {high}, not {_shown(value)}")
        return value

    return Kind(read, {"type": "integer", "minimum": low, "maximum": high})


def number(low: float, high: float, *, above: bool = False) -> Kind:
    """A number from `low` (above: beyond it) to `high`."""
    span = f"over {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"

    def read(value: Any, param: str) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise _wrong_type(param, f"a number {span}", value)
        if not low <= value <= high or (above and value == low):
            raise invalid(param, f"'{param}' must be a number {span}, not {_shown(value)}")
        return float(value)

    return Kind(read, {"type": "number", "exclusiveMinimum" if above else "minimum": low, "maximum": high})


def boolean() -> Kind:
    def read(value: Any, param: str) -> bool:
        if not isinstance(value, bool):
            raise _wrong_type(param, "true or false", value)
        return value

    return Kind(read, {"type": "boolean"})


def text(most: int, least: int = 0) -> Kind:
    """A string of so many characters."""

    def read(value: Any, param: str) -> str:
        if not isinstance(value, str):
            raise _wrong_type(param, "a string", value)
        if not least <= len(value) <= most:
            raise invalid(param, f"'{param}' must have {least} to {most} characters, not {len(value)}")
        return value

    return Kind(read, {"type": "string", "minLength": least, "maxLength": most})


def choice(*words: str) -> Kind:
    def read(value: Any, param: str) -> str:
        if not isinstance(value, str) or value not in words:
            raise invalid(param, f"'{param}' must be one of {', '.join(words)}, not {_shown(value)}")
        return value

    return Kind(read, {"type": "string", "enum": list(words)})


def listed(item: Kind, least: int, most: int) -> Kind:
    """A list of so many."""

    def read(value: Any, param: str) -> list[Any]:
        check_list(value, param, least, most)
        return [item.read(one, f"{param}[{i}]") for i, one in enumerate(value)]

    return Kind(read, {"type": "array", "items": dict(item.schema), "minItems": least, "maxItems": most})


def record(table: Table, *, open: bool = False) -> Kind:
    """An object with the fields of a table; open: and others, which are left out."""

    def read(value: Any, param: str) -> dict[str, Any]:
        return read_table(check_object(value, param), table, param, open=open)

    return Kind(read, object_schema(table))


def anything(kind: str, schema: Mapping[str, Any] | None = None) -> Kind:
    """A value that is taken as it is, if it is of this JSON type ("object", "array", "any")."""

    def read(value: Any, param: str) -> Any:
        if kind == "object":
            check_object(value, param)
        elif kind == "array" and not isinstance(value, list):
            raise _wrong_type(param, "a list", value)
        return value

    return Kind(read, schema or ({} if kind == "any" else {"type": kind}))


def read_table(value: Mapping[str, Any], table: Table, param: str = "", *, open: bool = True) -> dict[str, Any]:
    """The fields that are there, read. open: others may be there too. Raises RequestError."""
    prefix = f"{param}." if param else ""
    for name in value:
        if name not in table and not open:
            near = get_close_matches(str(name), list(table), n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise invalid(prefix + shorten(str(name)), f"unknown field '{prefix}{shorten(str(name))}'{hint}",
                          "unknown_parameter")  # fmt: skip
    found = {}
    for name, field in table.items():
        given = value.get(name)
        if given is None:
            if field.required:
                raise invalid(prefix + name, f"'{prefix}{name}' is missing", "missing_required_parameter")
            continue
        if field.refused:
            if not any(given == one and type(given) is type(one) for one in field.unless):
                raise unsupported(prefix + name, field.refused)
            continue
        read = field.kind.read(given, prefix + name)
        if not field.ignored:
            found[name] = read
    return found


def object_schema(table: Table) -> dict[str, Any]:
    """JSON Schema of an object with these fields. What is refused is not in it."""
    shown = {name: field for name, field in table.items() if not field.refused}
    properties = {
        name: {**field.kind.schema, **({"description": field.help} if field.help else {})}
        for name, field in shown.items()
    }
    required = [name for name, field in shown.items() if field.required]
    return {"type": "object", "properties": properties, **({"required": required} if required else {})}


def check_object(value: Any, param: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong_type(param, "an object", value)
    return value


def check_list(value: Any, param: str, least: int, most: int) -> None:
    if not isinstance(value, list):
        raise _wrong_type(param, "a list", value)
    if not least <= len(value) <= most:
        raise invalid(param, f"'{param}' must have {least} to {most} entries, not {len(value)}")


def _wrong_type(param: str, wanted: str, value: Any) -> RequestError:
    return invalid(param, f"'{param}' must be {wanted}, not {_shown(value)}", "invalid_type")


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    try:
        return shorten(repr(value), 60)
    except ValueError:  # an integer of thousands of digits
        return "a number of thousands of digits"
