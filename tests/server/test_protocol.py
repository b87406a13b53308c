"""The tables of fields, and what becomes of them: each limit, above and below; what is refused by name."""

import json
from typing import Any

import jsonschema
import pytest

from config.settings import MAX_SEED, SamplingParams
from server.errors import RequestError
from server.fields import Field, object_schema
from server.openapi import document
from server.protocol import read_chat, read_completion, read_tokenize, seeds
from server.tables import CHAT, COMPLETION, DETOKENIZE, MAX_MESSAGES, MAX_STOPS, MAX_TEXT, MAX_TOOLS, TOKENIZE
from tests.server.running import CHAT as MESSAGES

DEFAULTS = SamplingParams(temperature=0.6, top_k=7, max_new_tokens=99)
NEEDED: dict[str, dict[str, Any]] = {
    "top_logprobs": {"logprobs": True},
    "stream_options": {"stream": True},
    "tool_choice": {"tools": [{"type": "function", "function": {"name": "f"}}]},
}
"""What a field needs beside it."""
ROUTES = {
    "chat": (CHAT, {"messages": MESSAGES}, read_chat),
    "completion": (COMPLETION, {"prompt": "x"}, read_completion),
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def numbers():
    for route, (table, _, _) in ROUTES.items():
        for name, field in table.items():
            if field.kind.schema.get("type") in ("integer", "number"):
                yield pytest.param(route, name, field, id=f"{route} {name}")


def read(route, **fields):
    _, body, reader = ROUTES[route]
    return reader({**body, **fields}, DEFAULTS)


def refused(route, code=None, **fields) -> RequestError:
    with pytest.raises(RequestError) as caught:
        read(route, **fields)
    assert caught.value.status == 400
    assert caught.value.param is None or caught.value.param.partition("[")[0].partition(".")[0] in fields
    assert code in (None, caught.value.code)
    return caught.value


@pytest.mark.parametrize(("route", "name", "field"), [*numbers()])
def test_every_number_has_limits_and_they_hold(route, name, field: Field):
    schema = field.kind.schema
    step = 1 if schema["type"] == "integer" else 1e-6
    low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema["maximum"]
    needed = NEEDED.get(name, {})
    inside = [high, low if "minimum" in schema else low + step]
    for value in inside:
        needs = {"n": value} if name == "best_of" else {"max_tokens": value} if name == "min_tokens" and value else {}
        needs = {"echo": True} if (name, value) == ("max_tokens", 0) else needs
        read(route, **{name: value, **needed, **needs})
    for value in (high + step * max(1, abs(high)), low - step, *([low] if "exclusiveMinimum" in schema else [])):
        assert refused(route, "invalid_value", **{name: value, **needed}).param == name
    for value in ("1", [1], {}, True):
        assert refused(route, "invalid_type", **{name: value, **needed}).param == name
    if step == 1:
        assert refused(route, "invalid_type", **{name: 1.5, **needed}).param == name
    read(route, **{name: None})


@pytest.mark.parametrize("route", ROUTES)
def test_what_we_know_and_have_not_is_refused_by_name(route):
    table = ROUTES[route][0]
    names = [name for name, field in table.items() if field.refused]
    assert len(names) > 10
    for name in names:
        error = refused(route, "unsupported_parameter", **{name: {"some": "thing"}})
        assert error.param == name
        assert name in error.message
        read(route, **{name: None})
        for value in table[name].unless:
            read(route, **{name: value})


@pytest.mark.parametrize("route", ROUTES)
def test_what_changes_nothing_is_taken_and_checked(route):
    ignored = {name: field for name, field in ROUTES[route][0].items() if field.ignored}
    assert "user" in ignored
    for name in ignored:
        refused(route, **{name: 5})
    good: dict[str, Any] = {
        "user": "me", "metadata": {"a": "b"}, "store": True, "safety_identifier": "x", "service_tier": "auto",
        "prompt_cache_key": "k", "prompt_cache_retention": "24h",
    }  # fmt: skip
    given = {name: good[name] for name in ignored}
    assert read(route, **given).options.ignored == ()


def test_what_nobody_knows_is_named():
    assert read("chat", foo=1, temprature=2).options.ignored == ("foo", "temprature")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": "x"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [MESSAGES[0]] * (MAX_MESSAGES + 1)}, "messages"),
        ({"messages": ["x"]}, "messages[0]"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": "x" * (MAX_TEXT + 1)}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "assistant"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}}]}]}, "messages[0].tool_calls"),  # noqa: E501
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "["}}]}]}, "messages[0].tool_calls[0].function.arguments"),  # noqa: E501
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "[]"}}]}]}, "messages[0].tool_calls[0].function.arguments"),  # noqa: E501
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]}, "messages[0].tool_calls[0].id"),  # noqa: E501
        ({"stop": ["a"] * (MAX_STOPS + 1)}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", 5]}, "stop[1]"),
        ({"stop": "x" * 5000}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"logit_bias": []}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"min_tokens": 9, "max_tokens": 5}, "min_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_useage": True}}, "stream_options.include_useage"),
        ({"stream": "yes"}, "stream"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema"),  # noqa: E501
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"a": "x" * (1 << 19)}}}}, "response_format.json_schema"),  # noqa: E501
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
        ({"response_format": {"type": "json_object"}, "min_tokens": 3}, "min_tokens"),
        ({"tools": [TOOL] * 2}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(MAX_TOOLS + 1)]}, "tools"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "x" * 65}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 5}}]}, "tools[0].function.parameters"),
        ({"tools": [{"type": "function", "function": {"name": "f", "params": {}}}]}, "tools[0].function.params"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes", "tools": [TOOL]}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [TOOL]}, "tool_choice"),
        ({"tool_choice": "required", "tools": [TOOL], "response_format": {"type": "json_object"}}, "response_format"),
        ({"tool_choice": "required", "tools": [TOOL], "ignore_eos": True}, "ignore_eos"),
        ({"chat_template_kwargs": 5}, "chat_template_kwargs"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_what_is_wrong_with_a_chat_is_said_of_the_field(fields, param):
    assert refused("chat", **fields).param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": [1, "x"]}, "prompt[1]"),
        ({"prompt": ["x", 1]}, "prompt[1]"),
        ({"prompt": [1, -1]}, "prompt[1]"),
        ({"prompt": [1, True]}, "prompt[1]"),
        ({"prompt": [1.5]}, "prompt[0]"),
        ({"prompt": [[1], []]}, "prompt[1]"),
        ({"prompt": [[1], [[2]]]}, "prompt[1][0]"),
        ({"prompt": ["x"] * 129}, "prompt"),
        ({"prompt": ["x"] * 65, "n": 2}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"echo": True, "logprobs": 1}, "logprobs"),
        ({"suffix": "x"}, "suffix"),
        ({"max_completion_tokens": 5}, "max_completion_tokens"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_completion_is_said_of_the_field(fields, param):
    assert refused("completion", **fields).param == param


def test_what_is_asked_for_is_understood():
    chat = read(
        "chat", temperature=0.25, top_p=0, top_k=-1, min_p=0.5, repetition_penalty=1.5, presence_penalty=-2,
        frequency_penalty=2, logit_bias={"17": -100, "3": 0.5}, min_tokens=2, max_completion_tokens=30, seed=12,
        stop=["a", "b"], ignore_eos=True, stop_token_ids=[4], logprobs=True, top_logprobs=20, n=5,
    )  # fmt: skip
    params = chat.options.params
    assert params == SamplingParams(
        temperature=0.25, top_p=params.top_p, top_k=0, min_p=0.5, repetition_penalty=1.5, presence_penalty=-2,
        frequency_penalty=2, logit_bias=((17, -100.0), (3, 0.5)), min_new_tokens=2, max_new_tokens=30, seed=12,
        stop=("a", "b"), ignore_eos=True, stop_token_ids=(4,), top_logprobs=20,
    )  # fmt: skip
    assert 0 < params.top_p < 1e-6
    assert [one.seed for one in seeds(params, 3)] == [12, 13, 14]
    assert [one.seed for one in seeds(SamplingParams(seed=MAX_SEED), 2)] == [MAX_SEED, 0]
    assert read("chat", seed=-1).options.params.seed == MAX_SEED


def test_what_is_not_asked_for_is_the_models():
    params = read("chat").options.params
    assert (params.temperature, params.top_k, params.max_new_tokens, params.top_logprobs) == (0.6, 7, 99, None)
    assert read("chat").options.params.seed != read("chat").options.params.seed
    assert read("completion").options.params.max_new_tokens == 16


def test_messages_become_what_templates_take():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "short"}]},
        {"role": "user", "content": "x", "name": "Ann", "unheard": "of"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "5", "tool_call_id": "c1"},
    ]
    assert read("chat", messages=messages).messages == [
        {"role": "system", "content": "Be short"},
        {"role": "user", "content": "x", "name": "Ann"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": [1]}}}
        ]},
        {"role": "tool", "content": "5", "tool_call_id": "c1"},
    ]  # fmt: skip


def test_which_functions_may_and_must_be_called():
    other = {"type": "function", "function": {"name": "g", "strict": True}}
    both = {"tools": [TOOL, other]}
    assert (len(read("chat", **both).tools), read("chat", **both).required) == (2, ())
    assert read("chat", **both, tool_choice="none").tools == []
    assert read("chat", **both, tool_choice="required").required == ("f", "g")
    named = {"type": "function", "function": {"name": "g"}}
    assert read("chat", **both, tool_choice=named).required == ("g",)
    assert not read("chat", **both, parallel_tool_calls=False).parallel


def test_tokens_are_asked_for_of_a_text_or_of_messages():
    for body in ({}, {"prompt": "x", "messages": MESSAGES}):
        with pytest.raises(RequestError) as caught:
            read_tokenize(body)
        assert caught.value.status == 400


def test_the_document_has_what_the_tables_have():
    found = document()
    schemas = found["components"]["schemas"]
    for name, table in [
        ("ChatCompletionsRequest", CHAT),
        ("CompletionsRequest", COMPLETION),
        ("TokenizeRequest", TOKENIZE),
        ("DetokenizeRequest", DETOKENIZE),
    ]:
        jsonschema.Draft202012Validator.check_schema(schemas[name])
        assert set(schemas[name]["properties"]) == {key for key, field in table.items() if not field.refused}
        assert schemas[name] == object_schema(table)
    jsonschema.validate({"messages": MESSAGES, "temperature": 1, "stop": "x"}, schemas["ChatCompletionsRequest"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"messages": MESSAGES, "temperature": 3}, schemas["ChatCompletionsRequest"])
    json.dumps(found)


def test_the_document_has_every_route(server):
    listed = {
        (path.replace("{model}", "<name:name>"), method.upper())
        for path, methods in document()["paths"].items()
        for method in methods
    }
    served = {
        (rule.rule, method)
        for rule in server.app.url_map.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
        if rule.endpoint not in ("page", "static")
    }
    assert listed == served
    assert server.ask("GET", "/openapi.json")[2] == json.loads(json.dumps(document()))


def test_the_context_is_counted(server):
    words = "cat " * 1100
    for path, body, param in [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": words}]}, "messages"),
        ("/v1/completions", {"prompt": words, "max_tokens": 3}, "prompt"),
        ("/v1/completions", {"prompt": "x", "max_tokens": 1024}, "prompt"),
    ]:
        status, found = server.post(path, body)
        error = found["error"]
        assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", param)
        assert "1024" in error["message"]
    ids = [1] + [300] * 1019
    assert server.post("/v1/completions", {"prompt": ids, "max_tokens": 4})[0] == 200
    error = server.post("/v1/completions", {"prompt": ids, "max_tokens": 5})[1]["error"]
    assert all(count in error["message"] for count in ("1020", "5", "1024", "1025"))


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": [5000]}, "prompt"),
        ("/v1/completions", {"prompt": "\ud800"}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        ("/v1/chat/completions", {"messages": MESSAGES, "logit_bias": {"5000": 1}}, "logit_bias"),
        ("/v1/chat/completions", {"messages": [{"role": "tool", "content": "x", "tool_call_id": "a"}]}, "messages"),
        ("/detokenize", {"tokens": [5000]}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
    ],
)
def test_what_only_the_model_knows_is_checked_too(server, path, body, param):
    status, found = server.post(path, body)
    assert (status, found["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nope"},
        {"type": "object", "dependentSchemas": {"a": {}}},
        {"$ref": "#/nowhere"},
        {"type": "string", "pattern": "("},
        {"enum": []},
    ],
    ids=lambda schema: json.dumps(schema)[:40],
)
def test_a_schema_that_cannot_be_held_to_is_refused(server, schema):
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    status, found = server.post("/v1/chat/completions", {"messages": MESSAGES, "response_format": format})
    assert (status, found["error"]["code"], found["error"]["param"]) == (400, "invalid_schema", "response_format")
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    ask = {"messages": MESSAGES, "tools": [tool], "tool_choice": "required"}
    assert server.post("/v1/chat/completions", ask)[1]["error"]["param"] == "tools"
