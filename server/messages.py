"""What was said, as clients send it -> what chat templates take. Knows roles and parts, no template."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from server.errors import invalid, unsupported
from server.fields import check_list, check_object, read_table
from server.tables import MAX_TEXT, MESSAGE, PART

Message = dict[str, Any]
MAX_PARTS = 4096


def read_messages(messages: Sequence[Any]) -> list[Message]:
    """Checked messages with plain texts. Raises RequestError that names the place."""
    return [_read(message, f"messages[{i}]") for i, message in enumerate(messages)]


def read_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Tools as templates know them. Raises RequestError for a name that comes twice."""
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise invalid("tools", f"'tools' has two functions named {twice!r}")
    found = []
    for tool in tools:
        function = dict(tool["function"])
        function.setdefault("parameters", {"type": "object", "properties": {}, "additionalProperties": False})
        function.pop("strict", None)  # always: what a call holds keeps to the schema, or is no call
        found.append({"type": "function", "function": function})
    return found


def _read(value: Any, param: str) -> Message:
    given = read_table(check_object(value, param), MESSAGE, param)
    role = given["role"]
    content = given.get("content")
    message: Message = {"role": "system" if role == "developer" else role}
    if content is not None:
        message["content"] = _text(content, f"{param}.content")
    if "name" in given:
        message["name"] = given["name"]
    if given.get("tool_calls"):
        if role != "assistant":
            raise invalid(f"{param}.tool_calls", "only an assistant's message has tool_calls")
        message["tool_calls"] = [_call(call, f"{param}.tool_calls[{i}]") for i, call in enumerate(given["tool_calls"])]
    if role == "tool":
        if "tool_call_id" not in given:
            raise invalid(f"{param}.tool_call_id", f"'{param}.tool_call_id' is missing", "missing_required_parameter")
        message["tool_call_id"] = given["tool_call_id"]
    if "reasoning_content" in given and role == "assistant":
        message["reasoning_content"] = given["reasoning_content"]
    if content is None:
        if role != "assistant" or not message.get("tool_calls"):
            raise invalid(f"{param}.content", f"'{param}.content' is missing", "missing_required_parameter")
        message["content"] = ""
    return message


def _text(content: Any, param: str) -> str:
    if isinstance(content, str):
        if len(content) > MAX_TEXT:
            raise invalid(param, f"'{param}' must have at most {MAX_TEXT} characters, not {len(content)}")
        return content
    if not isinstance(content, list):
        raise invalid(param, f"'{param}' must be a text or a list of parts", "invalid_type")
    check_list(content, param, 1, MAX_PARTS)
    texts = []
    for i, part in enumerate(content):
        where = f"{param}[{i}]"
        given = read_table(check_object(part, where), PART, where)
        if given["type"] != "text":
            raise unsupported(f"{where}.type", "messages are text")
        if "text" not in given:
            raise invalid(f"{where}.text", f"'{where}.text' is missing", "missing_required_parameter")
        texts.append(given["text"])
    return "".join(texts)


def _call(call: Mapping[str, Any], param: str) -> dict[str, Any]:
    """Arguments as the object that templates write."""
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"]) if function["arguments"].strip() else {}
    except (ValueError, RecursionError):
        raise invalid(f"{param}.function.arguments", "the arguments of a call are a JSON object, as text") from None
    if not isinstance(arguments, dict):
        raise invalid(f"{param}.function.arguments", "the arguments of a call are a JSON object, as text")
    return {"id": call["id"], "type": "function", "function": {"name": function["name"], "arguments": arguments}}
