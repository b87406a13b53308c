"""A process of its own that renders chat templates: code from strangers, with little memory and no way to the caller.

Run as a script, never imported by the program. A line of JSON on stdin asks, {"template", "renders": [variables, …],
"seconds"}; a line on stdout answers, {"texts": […]} or {"error": "says: …" or "failed: …"}. The process ends when an
answer takes more than so many seconds of computing.
"""

import codecs
import importlib
import json
import signal
import sys
import time
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_TEXT_CHARACTERS = 8 << 20
MAX_MEMORY_BYTES = 512 << 20
LATE_IMPORTS = ("html", "jinja2.constants", "jinja2.debug", "pprint", "textwrap")
"""What Jinja imports when it is first needed, and could not any more."""


class _Generation(Extension):
    """{% generation %}: Transformers' mark around what an assistant says; it changes nothing of the text."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _namespace(*args: Any, **kwargs: Any) -> Namespace:
    """{% set ns = namespace(…) %}: without the names by which Python's own things are got at."""
    given = dict(*args, **kwargs)
    for name in given:
        _check_name(name)
    return _Namespace(given)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have {name!r}")


class _Refused(TemplateError):
    """By the template itself, in its own words."""


def _raise_exception(message: str) -> None:
    raise _Refused(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=4)
def _compile(template: str) -> Template:
    """With the settings, filters and functions that templates are written for, those of Transformers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _namespace
    return environment.from_string(template)


def _render(template: Template, variables: dict[str, Any]) -> str:
    pieces: list[str] = []
    size = 0
    for piece in template.generate(**variables):
        size += len(piece)
        if size > MAX_TEXT_CHARACTERS:
            raise TemplateError(f"it makes more than {MAX_TEXT_CHARACTERS} characters")
        pieces.append(piece)
    return "".join(pieces)


def _answer(line: bytes) -> dict[str, Any]:
    request = json.loads(line)
    _limit(request["seconds"])
    try:
        template = _compile(request["template"])
        return {"texts": [_render(template, variables) for variables in request["renders"]]}
    except _Refused as error:
        return {"error": f"says: {error.message}"}
    except TemplateSyntaxError as error:
        return {"error": f"failed: line {error.lineno}: {error.message}"}
    except TemplateError as error:
        return {"error": f"failed: {error.message or type(error).__name__}"}
    except MemoryError:
        return {"error": "failed: it needs too much memory"}
    except RecursionError:
        return {"error": "failed: it is nested too deeply"}
    except Exception as error:  # whatever a stranger's code raises is its answer
        return {"error": f"failed: {type(error).__name__}: {error}"}
    finally:
        _limit(0)


def restrict() -> None:
    """From here on: bounded memory, and no file or connection can be opened, were the templates' sandbox to leak."""
    if sys.platform == "win32":
        return
    import resource

    for name in LATE_IMPORTS:
        importlib.import_module(name)
    codecs.lookup("unicode-escape")
    time.tzset()  # what the C library reads of the time zone
    for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(limit, (0, 0))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    # The timer's signal ends the process also in the middle of one long operation.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)


def _limit(seconds: float) -> None:
    """Of computing from now on; 0: none."""
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_PROF, seconds)


def main() -> None:
    """Answers until stdin ends."""
    restrict()
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(json.dumps(_answer(line)).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
