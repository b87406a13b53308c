"""Calls of functions in what a model says: the formats that models were taught, and finding calls in text as it comes.
Knows texts and tokens; no engine.
"""

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from config.errors import UserError
from model.chat_template import ChatTemplate
from model.tokenizer import Tokenizer

Delta = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """How a model writes calls. A call is an object with "name" and `arguments`; calls stand between `opening` and
    `closing`, or are the whole answer where there is no opening. is_list: several stand there in a list.
    """

    name: Literal["hermes", "mistral", "llama3"]
    opening: str
    closing: str
    arguments: str
    is_list: bool = False

    def schema(self, tools: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """JSON Schema of one call of one of the tools, as it stands there."""
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool["function"]["name"]},
                    self.arguments: tool["function"]["parameters"],
                },
                "required": ["name", self.arguments],
                "additionalProperties": False,
            }
            for tool in tools
        ]
        call = calls[0] if len(calls) == 1 else {"anyOf": calls}
        return {"type": "array", "items": call, "minItems": 1, "maxItems": 1} if self.is_list else call


HERMES = Format("hermes", "<tool_call>", "</tool_call>", "arguments")
MISTRAL = Format("mistral", "[TOOL_CALLS]", "", "arguments", is_list=True)
LLAMA3 = Format("llama3", "", "", "parameters")

HERMES_SYSTEM = """\
You may call functions to help the user. These are their signatures:
<tools>
{tools}
</tools>
For each call, write a JSON object with the function's name and its arguments between these tags:
<tool_call>
{{"name": "NAME", "arguments": {{…}}}}
</tool_call>"""
PYTHON_TAG = "<|python_tag|>"
"""Llama 3 may write this before a call."""
ARGS = "[ARGS]"
FUNCTION = re.compile(r"<function=([^>]+)>(.*?)</function>", re.DOTALL)
PARAMETER = re.compile(r"<parameter=([^>]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_PROBE = "probe_of_format"


class ToolTemplate:
    """A chat template with its model's way of calling functions, which is found by having it write a call."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self._template, self._tokenizer = template, tokenizer
        self._found: tuple[Format, bool] | None = None

    @property
    def format(self) -> Format:
        return self._known()[0]

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: list[dict[str, Any]], variables: Mapping[str, Any] | None
    ) -> list[int]:
        """The prompt. Where the template leaves tools out, a system text tells of them. Raises UserError."""
        if tools and not self._known()[1]:
            told = HERMES_SYSTEM.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
            first, rest = messages[0], list(messages[1:])
            if first["role"] == "system":
                told = f"{first['content']}\n\n{told}"
            else:
                rest = list(messages)
            messages, tools = [{"role": "system", "content": told}, *map(_spelled_out, rest)], []
        return self._template.render(messages, tools=tools or None, variables=variables)

    def _known(self) -> tuple[Format, bool]:
        """The format, and whether the template tells of tools by itself."""
        if self._found is None:
            self._found = self._find()
        return self._found

    def _find(self) -> tuple[Format, bool]:
        tool = {
            "type": "function",
            "function": {"name": _PROBE, "description": "x", "parameters": {"type": "object", "properties": {}}},
        }
        call = {"id": "call12345", "type": "function", "function": {"name": _PROBE, "arguments": {"x": 1}}}
        asked: dict[str, Any] = {"role": "user", "content": "x"}
        called = [asked, {"role": "assistant", "content": "", "tool_calls": [call]}]
        if _PROBE not in self._shown([asked], [tool]):
            return HERMES, False
        text = self._shown(called, [tool])
        if MISTRAL.opening in text:
            return MISTRAL, True
        if re.search(rf"{HERMES.opening}\s*(\{{[^<]*|<function=){_PROBE}", text):
            return HERMES, True
        if re.search(rf'"name":\s*"{_PROBE}",\s*"{LLAMA3.arguments}":\s*\{{\s*"x"', text):
            return LLAMA3, True
        return HERMES, False  # a way of its own, which we could not read

    def _shown(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        """What the template writes, special tokens spelled out; "" if it refuses."""
        try:
            ids = self._template.render(messages, add_generation_prompt=False, tools=tools)
        except UserError:
            return ""
        markers = special_markers(self._tokenizer)
        pieces = (markers[one].encode() if one in markers else self._tokenizer.decode_bytes((one,)) for one in ids)
        return b"".join(pieces).decode(errors="replace")


def _spelled_out(message: Mapping[str, Any]) -> dict[str, Any]:
    """Calls and their results as text, for a template that knows none."""
    said = dict(message)
    if calls := said.pop("tool_calls", None):
        texts = [said["content"]] if said["content"] else []
        bodies = (json.dumps(call["function"], ensure_ascii=False) for call in calls)
        texts += [f"{HERMES.opening}\n{body}\n{HERMES.closing}" for body in bodies]
        said["content"] = "\n".join(texts)
    if said["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{said['content']}\n</tool_response>"}
    return said


class ToolParser:
    """Finds calls in one answer as it comes: text -> deltas with content or tool_calls.

    What only looks like a call (no JSON, another function's name) is text. forced: the answer is a call and nothing
    else, without its opening.
    """

    def __init__(
        self,
        format: Format,
        tools: Sequence[Mapping[str, Any]],
        tokenizer: Tokenizer,
        *,
        forced: bool = False,
        parallel: bool = True,
    ) -> None:
        self._format, self.forced = format, forced
        self._tools = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
        self._most = None if parallel and not forced else 1
        self._markers = special_markers(tokenizer)
        self._text = ""
        self._talks = False
        self.calls = 0

    @property
    def called(self) -> bool:
        return self.calls > 0

    def push(self, text: str, token_ids: Sequence[int], *, last: bool) -> list[Delta]:
        """The deltas that this makes certain. last: nothing comes after it."""
        self._text += text + "".join(self._markers.get(token, "") for token in token_ids)
        deltas: list[Delta] = []
        if self.forced or not self._format.opening:
            self._take_whole(deltas, last)
        else:
            while self._take(deltas, last):
                pass
        return deltas

    def _take_whole(self, deltas: list[Delta], last: bool) -> None:
        """Where an answer is calls or text as a whole."""
        text = self._text.lstrip()
        may_call = self.forced or text.startswith(("{", PYTHON_TAG)) or PYTHON_TAG.startswith(text)
        if self._talks or not may_call:
            self._talks = True
            self._say(deltas, len(self._text))
        elif last:
            whole, self._text = self._text, ""
            self._call(deltas, text.removeprefix(PYTHON_TAG), otherwise=whole)

    def _take(self, deltas: list[Delta], last: bool) -> bool:
        """Where calls stand between marks: text, or one mark and what belongs to it. Whether there may be more."""
        opening, closing = self._format.opening, self._format.closing
        at = self._text.find(opening)
        if at < 0:
            certain = len(self._text) - (0 if last else _beginning(self._text, opening))
            if not self.calls or self._text[:certain].strip():  # white space after a call may be nothing
                self._say(deltas, certain)
            return False
        if self.calls and not self._text[:at].strip():
            self._text = self._text[at:]
        else:
            self._say(deltas, at)
        body = self._text[len(opening) :]
        end = body.find(closing or opening)
        if end < 0 and not last:
            return False
        end = len(body) if end < 0 else end
        inner, mark = body[:end], body[end : end + len(closing)]
        self._text = body[end + len(mark) :]
        self._call(deltas, inner, otherwise=opening + inner + mark)
        return bool(self._text)

    def _say(self, deltas: list[Delta], length: int) -> None:
        said, self._text = self._text[:length], self._text[length:]
        if said:
            deltas.append({"content": said})

    def _call(self, deltas: list[Delta], text: str, *, otherwise: str) -> None:
        found = read_calls(text, self._tools)
        if found is None:
            if otherwise:
                deltas.append({"content": otherwise})
            return
        for name, arguments in found:
            if self._most is not None and self.calls >= self._most:
                return
            head = {"index": self.calls, "id": f"call_{secrets.token_hex(12)}", "type": "function"}
            deltas.append({"tool_calls": [{**head, "function": {"name": name, "arguments": ""}}]})
            deltas.append({"tool_calls": [{"index": self.calls, "function": {"arguments": arguments}}]})
            self.calls += 1


def special_markers(tokenizer: Tokenizer) -> dict[int, str]:
    """The marks around calls that are special tokens of a model, which have no text."""
    pieces = (HERMES.opening, HERMES.closing, MISTRAL.opening, ARGS, "[CALL_ID]", PYTHON_TAG)
    found = ((tokenizer.special_id(piece), piece) for piece in pieces)
    return {token: piece for token, piece in found if token is not None}


def read_calls(text: str, tools: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]] | None:
    """Name and arguments, as JSON, of each call in `text`; None where it is something else. tools: the schema of the
    arguments by name.

    A call is a JSON object; there may be a list of them, or several after each other. Newer Mistral write
    NAME[ARGS]{…}, newer Qwen <function=NAME><parameter=KEY>VALUE</parameter></function>.
    """
    values: list[Any] | None
    if ARGS in text:
        head, _, rest = text.strip().partition(ARGS)
        values = [{"name": head.partition("[CALL_ID]")[0].strip(), "arguments": _loaded(rest)}]
    elif tagged := FUNCTION.findall(text):
        values = [{"name": name, "arguments": _parameters(body, tools.get(name, {}))} for name, body in tagged]
    else:
        values = _values(text.strip())
    calls = []
    for value in values or []:
        if not isinstance(value, dict) or not isinstance(name := value.get("name"), str) or name not in tools:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        arguments = _loaded(arguments) if isinstance(arguments, str) else arguments
        if not isinstance(arguments, dict):
            return None
        calls.append((name, json.dumps(arguments, ensure_ascii=False)))
    return calls or None


def _values(text: str) -> list[Any] | None:
    """The JSON values in a text, one after the other; those of lists singly. None where there is something else."""
    values, at = [], 0
    decoder = json.JSONDecoder()
    try:
        while at < len(text):
            value, at = decoder.raw_decode(text, at)
            values += value if isinstance(value, list) else [value]
            while at < len(text) and text[at] in " \n\t;,":
                at += 1
    except (ValueError, RecursionError):
        return None
    return values


def _parameters(body: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """Values between tags: texts where the schema says so, else JSON if they are that."""
    properties = schema.get("properties", {})
    found: dict[str, Any] = {}
    for key, value in PARAMETER.findall(body):
        told = properties.get(key, {}) if isinstance(properties, Mapping) else {}
        is_text = isinstance(told, Mapping) and told.get("type") == "string"
        loaded = None if is_text else _loaded(value)
        found[key] = value if loaded is None and value.strip() != "null" else loaded
    return found


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _beginning(text: str, marker: str) -> int:
    """Length of the longest end of `text` with which `marker` begins."""
    return next((n for n in range(min(len(marker) - 1, len(text)), 0, -1) if marker.startswith(text[-n:])), 0)
