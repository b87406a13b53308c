"""Calls of functions: found in what models say, however it is cut; and how each model's format is told."""

import json
from pathlib import Path

import jsonschema
import pytest

from model.chat_template import ChatTemplate
from server.guides import Grammars
from server.tools import HERMES, LLAMA3, MISTRAL, ToolParser, ToolTemplate, read_calls

TOOLS = [
    {"type": "function", "function": {"name": "sing", "parameters": {"type": "object", "properties": {}}}},
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "n": {"type": "array"}}},
        },
    },
]
WEATHER = ("get_weather", {"city": "Rome", "n": [1, {"a": "</x>"}]})
CALL = json.dumps({"name": WEATHER[0], "arguments": WEATHER[1]})
LLAMA_CALL = json.dumps({"name": WEATHER[0], "parameters": WEATHER[1]})
SING = '{"name": "sing", "arguments": {}}'


class NoSpecials:
    def special_id(self, piece):
        return None


def parse(format, text, *, size=1, **options):
    """Content and calls of a text that comes in pieces of `size` characters."""
    parser = ToolParser(format, TOOLS, NoSpecials(), **options)
    deltas = []
    for at in range(0, len(text), size):
        deltas += parser.push(text[at : at + size], (), last=False)
    deltas += parser.push("", (), last=True)
    calls = []
    for delta in deltas:
        for one in delta.get("tool_calls", ()):
            if "id" in one:
                assert one["index"] == len(calls)
                assert (one["type"], one["function"]["arguments"]) == ("function", "")
                calls.append([one["function"]["name"], ""])
            else:
                calls[one["index"]][1] += one["function"]["arguments"]
    content = "".join(delta.get("content", "") for delta in deltas)
    assert parser.called == bool(calls)
    return content, [(name, json.loads(arguments)) for name, arguments in calls]


CASES = {
    "no call": (HERMES, "I can <b>not</b> <tool", "I can <b>not</b> <tool", []),
    "one": (HERMES, f"<tool_call>\n{CALL}\n</tool_call>", "", [WEATHER]),
    "words before": (HERMES, f"Let me see. <tool_call>{CALL}</tool_call>", "Let me see. ", [WEATHER]),
    "words after": (HERMES, f"<tool_call>{CALL}</tool_call>\nDone.", "\nDone.", [WEATHER]),
    "two": (HERMES, f"<tool_call>{CALL}</tool_call>\n<tool_call>{SING}</tool_call>\n", "", [WEATHER, ("sing", {})]),
    "not closed": (HERMES, f"<tool_call>{CALL}", "", [WEATHER]),
    "no JSON": (HERMES, "a <tool_call>sing!</tool_call> b", "a <tool_call>sing!</tool_call> b", []),
    "cut off": (HERMES, f"<tool_call>{CALL[:20]}", f"<tool_call>{CALL[:20]}", []),
    "unknown name": (HERMES, '<tool_call>{"name": "rm"}</tool_call>', '<tool_call>{"name": "rm"}</tool_call>', []),
    "arguments as text": (
        HERMES,
        '<tool_call>{"name": "sing", "arguments": "{\\"a\\": 1}"}</tool_call>',
        "",
        [("sing", {"a": 1})],
    ),
    "tags": (
        HERMES,
        "<tool_call>\n<function=get_weather>\n<parameter=city>\n5\n</parameter>\n<parameter=n>\n[1, 2]\n</parameter>\n"
        "<parameter=more>\nno JSON\n</parameter>\n</function>\n</tool_call>",
        "",
        [("get_weather", {"city": "5", "n": [1, 2], "more": "no JSON"})],
    ),
    "mistral": (MISTRAL, f"[TOOL_CALLS][{CALL}, {SING}]", "", [WEATHER, ("sing", {})]),
    "mistral with words": (MISTRAL, f"Well.[TOOL_CALLS] [{CALL}]", "Well.", [WEATHER]),
    "newer mistral": (MISTRAL, '[TOOL_CALLS]sing[ARGS]{"a": 2}', "", [("sing", {"a": 2})]),
    "two of newer mistral": (
        MISTRAL,
        '[TOOL_CALLS]sing[ARGS]{"a": 2}[TOOL_CALLS]sing[ARGS]{}',
        "",
        [("sing", {"a": 2}), ("sing", {})],
    ),
    "mistral without": (MISTRAL, "[TOOL_", "[TOOL_", []),
    "llama": (LLAMA3, LLAMA_CALL, "", [WEATHER]),
    "llama, two": (LLAMA3, f'{LLAMA_CALL}; {{"name": "sing", "parameters": {{}}}}', "", [WEATHER, ("sing", {})]),
    "llama with a tag": (LLAMA3, f"<|python_tag|>{LLAMA_CALL}", "", [WEATHER]),
    "llama, words": (LLAMA3, 'The JSON {"name": "sing"} is short', 'The JSON {"name": "sing"} is short', []),
    "llama, other JSON": (LLAMA3, '{"name": "rm"}', '{"name": "rm"}', []),
    "llama, less than": (LLAMA3, "<b>x", "<b>x", []),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_calls_are_found_however_the_text_is_cut(case, size):
    format, text, content, calls = case
    assert parse(format, text, size=size) == (content, calls)


def test_text_is_shown_as_soon_as_it_is_certain():
    parser = ToolParser(HERMES, TOOLS, NoSpecials())
    assert parser.push("Hello <to", (), last=False) == [{"content": "Hello "}]
    assert parser.push("ys>", (), last=False) == [{"content": "<toys>"}]
    parser = ToolParser(LLAMA3, TOOLS, NoSpecials())
    assert parser.push(" He", (), last=False) == [{"content": " He"}]


def test_a_forced_answer_is_a_call_without_its_opening():
    assert parse(HERMES, CALL, forced=True) == ("", [WEATHER])
    assert parse(MISTRAL, f"[{CALL}]", forced=True) == ("", [WEATHER])
    assert parse(LLAMA3, LLAMA_CALL, forced=True) == ("", [WEATHER])
    assert parse(HERMES, CALL[:-3], forced=True) == (CALL[:-3], [])


def test_at_most_one_call_where_that_was_asked_for():
    text = f"<tool_call>{CALL}</tool_call><tool_call>{SING}</tool_call>"
    assert parse(HERMES, text, parallel=False) == ("", [WEATHER])


def test_openings_that_are_special_tokens_count():
    class Specials:
        def special_id(self, piece):
            return {"[TOOL_CALLS]": 900, "<tool_call>": 901, "</tool_call>": 902}.get(piece)

    parser = ToolParser(MISTRAL, TOOLS, Specials())
    deltas = [*parser.push("", (900,), last=False), *parser.push(f"[{CALL}]", (7,), last=True)]
    assert deltas[0]["tool_calls"][0]["function"]["name"] == "get_weather"
    parser = ToolParser(HERMES, TOOLS, Specials())
    pieces = [("So: ", 1), ("", 901), (CALL, 5), ("", 902)]
    deltas = [delta for text, token in pieces for delta in parser.push(text, (token,), last=False)]
    assert [list(delta) for delta in deltas] == [["content"], ["tool_calls"], ["tool_calls"]]


@pytest.mark.parametrize(
    "text", ["", "x", "[]", "5", '"sing"', '{"name": 5}', '{"name": "sing", "arguments": 5}', "[" * 5000]
)
def test_what_is_no_call(text):
    assert read_calls(text, {"sing": {}}) is None


# ---- Formats ----

TEMPLATES = {
    "hermes": (
        "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% for m in messages %}{{ m.role }}: "
        "{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
        "{% endfor %}",
        HERMES,
    ),
    "mistral": (
        "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.content }}"
        "{% if m.tool_calls %}[TOOL_CALLS]{{ m.tool_calls | tojson }}{% endif %}{% endfor %}",
        MISTRAL,
    ),
    "llama": (
        "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}{{ m.content }}{% for c in "
        'm.tool_calls or [] %}{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}'
        "{% endfor %}{% endfor %}",
        LLAMA3,
    ),
    "a way of its own": (
        "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}{{ m.content }}{% for c in "
        "m.tool_calls or [] %}call:{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}{% endfor %}",
        HERMES,
    ),
    "none": ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", HERMES),
    "refuses": (
        "{% for m in messages %}{% if m.role not in ['user', 'assistant', 'system'] or m.tool_calls %}"
        "{{ raise_exception('no') }}{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
        HERMES,
    ),
}


def template_of(built, text):
    tokenizer = built.prepared.tokenizer
    original = built.prepared.template
    made = object.__new__(ChatTemplate)
    made.__dict__.update(original.__dict__)
    made._templates = {name: type(one)(Path("x"), text) for name, one in original._templates.items()}
    return ToolTemplate(made, tokenizer)


@pytest.mark.parametrize("name", TEMPLATES)
def test_how_a_model_calls_is_told_by_what_its_template_writes(built, name):
    text, format = TEMPLATES[name]
    template = template_of(built, text)
    assert template.format is format
    call = {"id": "a", "type": "function", "function": {"name": "sing", "arguments": {"x": 1}}}
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Sing!"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "la la", "tool_call_id": "a"},
    ]
    shown = built.prepared.tokenizer.decode(template.render(messages, TOOLS[:1], None))
    for words in ("Be short.", "Sing!", "sing", '"x": 1', "la la"):
        assert words in shown
    assert "la la" not in built.prepared.tokenizer.decode(template.render(messages[:2], [], None))


@pytest.mark.parametrize("format", [HERMES, MISTRAL, LLAMA3], ids=lambda format: format.name)
def test_the_schema_of_a_call_lets_calls_pass_and_nothing_else(format):
    schema = format.schema([TOOLS[0], {"function": {"name": "f", "parameters": {"type": "object", "required": ["x"]}}}])
    wrap = (lambda call: [call]) if format.is_list else (lambda call: call)
    jsonschema.validate(wrap({"name": "sing", format.arguments: {}}), schema)
    for wrong in ({"name": "f", format.arguments: {}}, {"name": "g", format.arguments: {}}, {"name": "sing"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrap(wrong), schema)


def test_variables_reach_the_template(built):
    template = template_of(built, "{{ messages[0].content }}{% if enable_thinking is defined %} thinks{% endif %}")
    decode = built.prepared.tokenizer.decode
    assert decode(template.render([{"role": "user", "content": "It"}], [], {"enable_thinking": True})) == "It thinks"
    assert decode(template.render([{"role": "user", "content": "It"}], [], None)) == "It"


# ---- Guides ----


def test_a_guide_lets_pass_what_is_valid_and_its_end(built):
    tokenizer, vocab_size = built.prepared.tokenizer, built.engine.vocab_size
    grammars = Grammars(tokenizer, vocab_size, built.engine.eos_ids)
    guide = grammars.guide({"type": "object", "properties": {"a": {"enum": ["x", "yz"]}}, "required": ["a"]}, "p")
    (end,) = built.engine.eos_ids

    def allowed():
        mask = guide.allowed()
        assert mask.shape == (-(-vocab_size // 32),)
        return {v for v in range(vocab_size) if int(mask[v // 32]) >> (v % 32) & 1}

    vocabulary = {tokenizer.decode_bytes((token,)): token for token in range(vocab_size)}
    for piece in ("{", '"', "a", '"', ":"):
        assert vocabulary[piece.encode()] in allowed()
        assert end not in allowed()
        guide.advance(vocabulary[piece.encode()])
    assert vocabulary[b"b"] not in allowed()
    for piece in (" ", '"', "x", '"', "}"):
        guide.advance(vocabulary[piece.encode()])
    assert allowed() >= {end}
    guide.advance(end)
    assert allowed() == {end}
    assert not guide.failed


def test_a_guide_that_was_not_kept_to_ends_the_text(built):
    grammars = Grammars(built.prepared.tokenizer, built.engine.vocab_size, built.engine.eos_ids)
    guide = grammars.guide({"type": "object"}, "p")
    guide.advance(700)
    assert guide.failed
    guide.advance(701)
    (end,) = built.engine.eos_ids
    assert [int(word) for word in guide.allowed() if word] == [1 << end]
