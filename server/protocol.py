"""JSON objects -> checked requests: what was asked for, in our own words. Knows OpenAI's fields and what goes with
what; neither tokens nor engines.
"""

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from config.errors import UserError
from config.settings import MAX_SEED, SamplingParams
from server.errors import RequestError, invalid, unsupported
from server.fields import Table, read_table
from server.messages import Message, read_messages, read_tools
from server.tables import CHAT, COMPLETION, MAX_CHOICES, MAX_SCHEMA_BYTES, RESPONSE_FORMAT, TOKENIZE

COMPLETION_TOKENS = 16
LEAST_TOP_P = 1e-9
"""As OpenAI's 0: the likeliest token alone."""
SAMPLING = {
    **{name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty")},
    **{name: name for name in ("frequency_penalty", "logit_bias", "ignore_eos", "stop")},
    "min_tokens": "min_new_tokens",
    "stop_token_ids": "stop_token_ids",
}
"""Our name of each sampling field."""


@dataclass(frozen=True)
class Options:
    """What chats and completions have alike. params: of the first answer; the others have the next seeds."""

    params: SamplingParams
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    schema: Mapping[str, Any] | None = None
    """What the answer keeps to; None: anything."""
    ignored: tuple[str, ...] = ()
    """Fields that we do not know."""


@dataclass(frozen=True)
class ChatRequest:
    """tools: those that the model may call now. call: "auto", "required", or the name of the one that it must call as
    {"name"}.
    """

    messages: list[Message]
    options: Options
    tools: list[dict[str, Any]]
    required: tuple[str, ...] = ()
    """One of these must be called; (): as the model likes."""
    parallel: bool = True
    variables: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class CompletionRequest:
    prompts: list[str | list[int]]
    options: Options
    echo: bool = False


def read_chat(body: Mapping[str, Any], defaults: SamplingParams) -> ChatRequest:
    """Raises RequestError that names the field."""
    given = read_table(body, CHAT)
    wanted = given.get("max_completion_tokens", given.get("max_tokens"))
    if "max_tokens" in given and wanted != given["max_tokens"]:
        raise invalid("max_tokens", "'max_tokens' and 'max_completion_tokens' are the same setting and differ")
    logprobs = given.get("logprobs", False)
    if "top_logprobs" in given and not logprobs:
        raise invalid("top_logprobs", "'top_logprobs' needs 'logprobs': true")
    top = given.get("top_logprobs", 0) if logprobs else None
    limit = defaults.max_new_tokens if wanted is None else wanted
    options = _options(given, body, CHAT, defaults, limit, top)
    tools = read_tools(given.get("tools", []))
    choice = given.get("tool_choice")
    if choice not in (None, "none", "auto") and not tools:
        raise invalid("tool_choice", "'tool_choice' needs 'tools'")
    required: tuple[str, ...] = ()
    names = tuple(tool["function"]["name"] for tool in tools)
    if isinstance(choice, dict):
        name = choice["function"]["name"]
        if name not in names:
            raise invalid("tool_choice", f"'tool_choice' names {name!r}, which is none of 'tools'")
        required = (name,)
    elif choice == "required":
        required = names
    if required and options.schema is not None:
        raise invalid("response_format", "an answer that must call a function has no other format")
    return ChatRequest(
        messages=read_messages(given["messages"]),
        options=options,
        tools=[] if choice == "none" else tools,
        required=required,
        parallel=given.get("parallel_tool_calls", True),
        variables=given.get("chat_template_kwargs"),
    )


def read_completion(body: Mapping[str, Any], defaults: SamplingParams) -> CompletionRequest:
    """Raises RequestError that names the field."""
    given = read_table(body, COMPLETION)
    limit = given.get("max_tokens", COMPLETION_TOKENS)
    echo = given.get("echo", False)
    if limit == 0 and not echo:
        raise invalid("max_tokens", "'max_tokens' can be 0 only with 'echo'")
    top = given.get("logprobs")
    if echo and top is not None:
        raise unsupported("logprobs", "with 'echo' the prompt's tokens would need them too, which are not known")
    options = _options(given, body, COMPLETION, defaults, limit, top)
    if (answers := options.n * len(given["prompt"])) > MAX_CHOICES:
        raise invalid("n", f"'n' answers to each prompt are {answers} together; {MAX_CHOICES} are the most")
    return CompletionRequest(given["prompt"], options, echo)


def read_tokenize(body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of /tokenize, messages and tools read. Raises RequestError."""
    given = read_table(body, TOKENIZE)
    if ("prompt" in given) == ("messages" in given):
        raise invalid("prompt", "one of 'prompt' and 'messages' is needed", "missing_required_parameter")
    if "messages" in given:
        given["messages"] = read_messages(given["messages"])
    given["tools"] = read_tools(given.get("tools", []))
    return given


def seeds(params: SamplingParams, count: int) -> list[SamplingParams]:
    """The parameters of each of so many answers."""
    return [replace(params, seed=(params.seed + i) % (MAX_SEED + 1)) for i in range(count)]


def _options(
    given: Mapping[str, Any],
    body: Mapping[str, Any],
    table: Table,
    defaults: SamplingParams,
    limit: int | None,
    top_logprobs: int | None,
) -> Options:
    n = given.get("n", 1)
    if given.get("best_of", n) != n:
        raise unsupported("best_of", "all answers are returned; it can only be n")
    if "stream_options" in given and not given.get("stream", False):
        raise invalid("stream_options", "'stream_options' needs 'stream': true")
    changes = {ours: given[name] for name, ours in SAMPLING.items() if name in given}
    if "top_p" in changes:
        changes["top_p"] = max(changes["top_p"], LEAST_TOP_P)
    if "top_k" in changes:
        changes["top_k"] = max(changes["top_k"], 0)
    if "stop_token_ids" in changes:
        changes["stop_token_ids"] = tuple(changes["stop_token_ids"])
    seed = given.get("seed")
    changes["seed"] = secrets.randbits(63) if seed is None else seed & MAX_SEED
    changes["max_new_tokens"] = None if limit == 0 else limit
    changes["top_logprobs"] = top_logprobs
    if limit is not None and given.get("min_tokens", 0) > limit:
        raise invalid("min_tokens", f"'min_tokens' is {given['min_tokens']}, and the answer has at most {limit}")
    schema = _schema(given["response_format"]) if "response_format" in given else None
    if schema is not None or isinstance(given.get("tool_choice"), dict) or given.get("tool_choice") == "required":
        for name in ("ignore_eos", "min_tokens"):
            if given.get(name):
                raise invalid(name, f"'{name}' does not go with a format, which says itself where the answer ends")
    try:
        params = replace(defaults, **changes)
    except UserError as error:
        raise RequestError(400, str(error)) from None
    return Options(
        params=params,
        n=n,
        stream=given.get("stream", False),
        include_usage=given.get("stream_options", {}).get("include_usage", False),
        schema=schema,
        ignored=tuple(name for name in body if name not in table),
    )


def _schema(value: Mapping[str, Any]) -> Mapping[str, Any] | None:
    given = read_table(value, RESPONSE_FORMAT, "response_format", open=False)
    if given["type"] == "text":
        return None
    if given["type"] == "json_object":
        return {"type": "object"}
    if "json_schema" not in given:
        raise invalid("response_format.json_schema", "'response_format.json_schema' is missing",
                      "missing_required_parameter")  # fmt: skip
    schema: Mapping[str, Any] = given["json_schema"]["schema"]
    if len(json.dumps(schema)) > MAX_SCHEMA_BYTES:
        raise invalid("response_format.json_schema", f"the schema is larger than {MAX_SCHEMA_BYTES >> 10} KiB")
    return schema
