"""Every field of every request: what it may hold, what is refused by name and what is left unheeded. The validation and
/openapi.json are both made from these tables.
"""

from typing import Any

from config.settings import MAX_BIAS, MAX_BIASES, MAX_COUNT, MAX_PENALTY, MAX_STOP_LENGTH, MAX_TOP_LOGPROBS
from server.errors import invalid
from server.fields import Field, Kind, Table, anything, boolean, check_list, choice, listed, number, record, text, whole

MAX_TEXT = 4 << 20
MAX_TOKENS = 1 << 20
MAX_MESSAGES = 4096
MAX_CHOICES = 128
MAX_PROMPTS = 128
MAX_TOOLS = 128
MAX_TOOL_CALLS = 128
MAX_STOPS = 4
MAX_NAME = 256
MAX_DEPTH = 64
MAX_SCHEMA_BYTES = 256 << 10

FUNCTION_NAME = {"type": "string", "pattern": "^[a-zA-Z0-9_.-]{1,64}$"}


def _function_name() -> Kind:
    """Of a function that a model may call."""

    def read(value: Any, param: str) -> str:
        name = text(64, 1).read(value, param)
        if not all(c.isascii() and (c.isalnum() or c in "_-.") for c in name):
            raise invalid(param, f"'{param}' may have letters, digits, '_', '-' and '.' only")
        return str(name)

    return Kind(read, FUNCTION_NAME)


def _stop() -> Kind:
    one = text(MAX_STOP_LENGTH, 1)
    several = listed(one, 0, MAX_STOPS)

    def read(value: Any, param: str) -> tuple[str, ...]:
        return (one.read(value, param),) if isinstance(value, str) else tuple(several.read(value, param))

    return Kind(read, {"oneOf": [one.schema, several.schema]})


def token_ids(least: int) -> Kind:
    """A list of tokens, which may be very long."""
    slowly = listed(whole(0, MAX_COUNT), least, MAX_TOKENS)

    def read(value: Any, param: str) -> list[int]:
        check_list(value, param, least, MAX_TOKENS)
        if all(type(one) is int and 0 <= one <= MAX_COUNT for one in value):
            return list(value)
        return list(slowly.read(value, param))  # which says what is wrong, and where

    return Kind(read, slowly.schema)


def _logit_bias() -> Kind:
    bias = number(-MAX_BIAS, MAX_BIAS)

    def read(value: Any, param: str) -> tuple[tuple[int, float], ...]:
        given = anything("object").read(value, param)
        if len(given) > MAX_BIASES:
            raise invalid(param, f"'{param}' takes at most {MAX_BIASES} tokens, not {len(given)}")
        found = {}
        for key, one in given.items():
            if not (key.isascii() and key.isdigit() and len(key) <= 10):
                raise invalid(param, f"the keys of '{param}' are token ids, such as \"1024\"")
            found[int(key)] = bias.read(one, f"{param}.{key}")
        return tuple(found.items())

    return Kind(read, {"type": "object", "additionalProperties": dict(bias.schema), "maxProperties": MAX_BIASES})


def _prompt() -> Kind:
    """A list of prompts, each a text or token ids."""
    one, ids = text(MAX_TEXT), token_ids(1)

    def read(value: Any, param: str) -> list[str | list[int]]:
        if isinstance(value, str):
            return [one.read(value, param)]
        if not isinstance(value, list):
            raise invalid(param, f"'{param}' must be a text, a list of texts, token ids, or a list of those",
                          "invalid_type")  # fmt: skip
        if value and isinstance(value[0], int) and not isinstance(value[0], bool):
            return [ids.read(value, param)]
        check_list(value, param, 1, MAX_PROMPTS)
        kind = one if isinstance(value[0], str) else ids
        return [kind.read(item, f"{param}[{i}]") for i, item in enumerate(value)]

    several = {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS}
    lists = [{**several, "items": dict(one.schema)}, {**several, "items": dict(ids.schema)}]
    return Kind(read, {"oneOf": [one.schema, ids.schema, *lists]})


def _ignored(kind: Kind, help: str) -> Field:
    return Field(kind, help + " Accepted, and changes nothing here.", ignored=True)


def _refused(why: str, *unless: Any) -> Field:
    return Field(anything("any"), refused=why, unless=unless)


TOOL_CALL: Table = {
    "id": Field(text(MAX_NAME), "", required=True),
    "type": Field(choice("function")),
    "function": Field(
        record({"name": Field(_function_name(), required=True), "arguments": Field(text(MAX_TEXT), required=True)}),
        required=True,
    ),
}
TOOL: Table = {
    "type": Field(choice("function"), required=True),
    "function": Field(
        record(
            {
                "name": Field(_function_name(), required=True),
                "description": Field(text(MAX_TEXT)),
                "parameters": Field(anything("object"), "JSON Schema of the arguments."),
                "strict": Field(boolean()),
            }
        ),
        required=True,
    ),
}
NAMED_TOOL: Table = {
    "type": Field(choice("function"), required=True),
    "function": Field(record({"name": Field(_function_name(), required=True)}), required=True),
}
JSON_SCHEMA: Table = {
    "name": Field(text(64, 1), required=True),
    "description": Field(text(MAX_TEXT)),
    "schema": Field(anything("object"), "What the answer keeps to.", required=True),
    "strict": Field(boolean()),
}
STREAM_OPTIONS: Table = {
    "include_usage": Field(boolean(), "A last chunk tells the usage."),
    "include_obfuscation": _ignored(boolean(), "Nothing is obfuscated."),
}


def _tool_choice() -> Kind:
    word, named = choice("none", "auto", "required"), record(NAMED_TOOL)

    def read(value: Any, param: str) -> Any:
        return (word if isinstance(value, str) else named).read(value, param)

    return Kind(read, {"oneOf": [word.schema, named.schema]})


_RESPONSE_FORMAT = Field(
    anything("object"),
    'What the answer keeps to: {"type": "text"}, {"type": "json_object"}, or {"type": "json_schema", "json_schema": '
    '{"name", "schema"}}.',
)
_TOGETHER = "the grammar of an answer is asked for with response_format"
SHARED: Table = {
    "model": Field(text(4096), "The model that is served; may be left out."),
    "stream": Field(boolean(), "Send the answer as it is made."),
    "stream_options": Field(record(STREAM_OPTIONS)),
    "n": Field(whole(1, MAX_CHOICES), "How many answers; answer i has the seed + i."),
    "seed": Field(whole(-(2**63), 2**63 - 1), "The same seed gives the same answer; by default a new one."),
    "stop": Field(_stop(), "Texts that end the answer, and are no part of it."),
    "temperature": Field(number(0, 2), "0 takes the likeliest token each time; default: the model's."),
    "top_p": Field(number(0, 1), "Keep the likeliest tokens that together have this probability."),
    "top_k": Field(whole(-1, MAX_COUNT), "Keep the k likeliest tokens; 0 and -1 are off."),
    "min_p": Field(number(0, 1), "Keep tokens at least this fraction as likely as the likeliest."),
    "repetition_penalty": Field(number(0, 100, above=True), "Over 1: tokens seen become less likely."),
    "presence_penalty": Field(number(-MAX_PENALTY, MAX_PENALTY)),
    "frequency_penalty": Field(number(-MAX_PENALTY, MAX_PENALTY)),
    "logit_bias": Field(_logit_bias(), "Token id -> what is added to its logit."),
    "min_tokens": Field(whole(0, MAX_COUNT), "The answer does not end before."),
    "ignore_eos": Field(boolean(), "Go on after the end of the text."),
    "stop_token_ids": Field(listed(whole(0, MAX_COUNT), 0, 64), "Tokens that end the answer."),
    "user": _ignored(text(4096), "Who asks."),
    "best_of": Field(whole(1, MAX_CHOICES), "Only as many as n."),
    "length_penalty": _refused("there is no beam search", 1, 1.0),
    "use_beam_search": _refused("there is no beam search", False),
    "prompt_logprobs": _refused("only the answer's tokens have logprobs"),
    "bad_words": _refused("logit_bias can forbid tokens", []),
    "allowed_token_ids": _refused("logit_bias can favour tokens", []),
    "include_stop_str_in_output": _refused("a stop text is no part of an answer", False),
    "skip_special_tokens": _refused("special tokens have no text", True),
    "truncate_prompt_tokens": _refused("a prompt is read whole or refused"),
    "guided_json": _refused(_TOGETHER),
    "guided_regex": _refused(_TOGETHER),
    "guided_choice": _refused(_TOGETHER),
    "guided_grammar": _refused(_TOGETHER),
    "structured_outputs": _refused(_TOGETHER),
    "grammar": _refused(_TOGETHER),
}

CHAT: Table = {
    "messages": Field(
        listed(anything("object"), 1, MAX_MESSAGES),
        "The conversation: objects with role (system, developer, user, assistant, tool) and content, a text or a list "
        'of parts {"type": "text", "text"}; an assistant\'s may have tool_calls, a tool\'s has tool_call_id.',
        required=True,
    ),
    **SHARED,
    "max_completion_tokens": Field(whole(1, MAX_COUNT), "At most so many tokens; default: until the context is full."),
    "max_tokens": Field(whole(1, MAX_COUNT), "The older name of max_completion_tokens."),
    "logprobs": Field(boolean(), "Tell how likely each token was, by the model alone."),
    "top_logprobs": Field(whole(0, MAX_TOP_LOGPROBS), "And so many of the likeliest; needs logprobs."),
    "response_format": _RESPONSE_FORMAT,
    "tools": Field(listed(record(TOOL), 0, MAX_TOOLS), "Functions that the model may call."),
    "tool_choice": Field(
        _tool_choice(),
        "Whether it calls one; required and a named one give exactly one call.",
    ),
    "parallel_tool_calls": Field(boolean(), "False: at most one call."),
    "chat_template_kwargs": Field(anything("object"), "Variables for the chat template, such as enable_thinking."),
    "metadata": _ignored(anything("object"), ""),
    "store": _ignored(boolean(), "Nothing is stored."),
    "safety_identifier": _ignored(text(4096), ""),
    "prompt_cache_key": _ignored(text(4096), "Prompts are cached without it."),
    "prompt_cache_retention": _ignored(text(64), ""),
    "service_tier": _ignored(choice("auto", "default"), "There is one tier."),
    "modalities": _refused("answers are text", ["text"]),
    "audio": _refused("answers are text"),
    "prediction": _refused("there is no predicted output"),
    "reasoning_effort": _refused("chat_template_kwargs has what a template knows of reasoning", "none"),
    "verbosity": _refused("the model knows no verbosity", "medium"),
    "web_search_options": _refused("there is no web search"),
    "functions": _refused("use tools"),
    "function_call": _refused("use tool_choice"),
    "echo": _refused("only /v1/completions repeats the prompt", False),
    "add_generation_prompt": _refused("an answer begins with the template's prompt for it", True),
    "continue_final_message": _refused("an answer begins anew", False),
}

COMPLETION: Table = {
    "prompt": Field(_prompt(), "A text, token ids, or a list of either.", required=True),
    **SHARED,
    "max_tokens": Field(whole(0, MAX_COUNT), "At most so many tokens; default: 16. 0 only with echo."),
    "logprobs": Field(whole(0, MAX_TOP_LOGPROBS), "Tell how likely each token was, and so many of the likeliest."),
    "echo": Field(boolean(), "Begin the answer with the prompt."),
    "response_format": _RESPONSE_FORMAT,
    "tools": _refused("functions are called in conversations: use /v1/chat/completions", []),
    "suffix": _refused("no model here writes in the middle of a text", ""),
    "max_completion_tokens": _refused("of /v1/completions it is called max_tokens"),
}

MESSAGE: Table = {
    "role": Field(choice("system", "developer", "user", "assistant", "tool"), required=True),
    "content": Field(anything("any")),
    "name": Field(text(MAX_NAME)),
    "tool_calls": Field(listed(record(TOOL_CALL), 0, MAX_TOOL_CALLS)),
    "tool_call_id": Field(text(MAX_NAME)),
    "reasoning_content": Field(text(MAX_TEXT)),
    "refusal": _ignored(text(MAX_TEXT), ""),
    "function_call": _refused("use tool_calls"),
    "audio": _refused("answers are text"),
}
PART: Table = {
    "type": Field(text(64), required=True),
    "text": Field(text(MAX_TEXT)),
}
RESPONSE_FORMAT: Table = {
    "type": Field(choice("text", "json_object", "json_schema"), required=True),
    "json_schema": Field(record(JSON_SCHEMA)),
}

TOKENIZE: Table = {
    "prompt": Field(text(MAX_TEXT), "A text; or messages."),
    "messages": Field(listed(anything("object"), 1, MAX_MESSAGES), "A conversation, as for /v1/chat/completions."),
    "tools": Field(listed(record(TOOL), 0, MAX_TOOLS)),
    "chat_template_kwargs": Field(anything("object")),
    "model": Field(text(4096)),
    "add_special_tokens": Field(boolean(), "Whether a text begins as texts of this model do; default: true."),
    "add_generation_prompt": Field(boolean(), "Whether the answer's beginning is there; default: true."),
}
DETOKENIZE: Table = {
    "tokens": Field(token_ids(0), required=True),
    "model": Field(text(4096)),
}
