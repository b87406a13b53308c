"""Templates of strangers: whatever is in them ends in one line, soon and within bounds."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import model.chat_process
from config.errors import UserError
from model.chat_files import DEFAULT, MAX_TEMPLATE_BYTES, TemplateText
from model.chat_process import Sandbox
from model.chat_sandbox import MAX_MEMORY_BYTES
from model.chat_template import ChatTemplate, load_chat_template
from model.tokenizer import Tokenizer, load_tokenizer
from tests.model.tiny_tokenizers import tiny_config, write_byte_level

SECONDS = 30.0  # two of computing, on a slow machine that does other things too


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return Sandbox()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_byte_level(tmp_path_factory.mktemp("tokenizer")), tiny_config())


def rendered(sandbox: Sandbox, template: str, **variables: object) -> str:
    answer = sandbox.ask(template, [variables])
    assert isinstance(answer, list), answer
    return answer[0]


MESSAGES = [{"role": "user", "content": "x"}]
HUGE_NAMES = "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('Only user and\nassistant roles!') }}", "says: Only user and\nassistant roles!"),
        ("{% for %}", "failed: line 1: "),
        ("a\n{{ 'b }}", "failed: line 2: "),
        ("{% generation %}", "failed: line 1: "),
        ("{{ messages[7].content }}", "failed: list object has no element 7"),
        ("{{ nobody() }}", "failed: 'nobody' is undefined"),
        ("{{ messages | nothing }}", "failed: line 1: No filter named 'nothing'"),
        ("{{ 1 / 0 }}", "failed: ZeroDivisionError: "),
        # A way out.
        ("{{ ''.__class__.__mro__ }}", "failed: "),
        ("{{ (''|attr('__class__')).__mro__ }}", "failed: "),
        ("{{ '{0.__class__.__mro__}'.format('') }}", "failed: "),
        ("{{ strftime_now.__globals__.x }}", "failed: "),
        ("{{ namespace.__init__.__globals__.x }}", "failed: "),
        ("{% set ns = namespace(__class__=1) %}", "failed: a namespace cannot have '__class__'"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "failed: a namespace cannot have '_x'"),
        ("{% include '/etc/passwd' %}", "failed: "),
        ("{% import 'os' as os %}", "failed: "),
        ("{% extends 'x' %}", "failed: "),
        # What it is given is not its own.
        ("{{ messages.append(1) }}", "failed: access to attribute 'append' of 'list' object is unsafe."),
        ("{{ messages[0].update(role='system') }}", "failed: "),
        ("{{ messages.clear() }}", "failed: "),
        # Too much.
        ("{{ 'a' * 10 ** 9 }}", "failed: it needs too much memory"),
        ("{{ [0] * 10 ** 9 }}", "failed: it needs too much memory"),
        (HUGE_NAMES, "failed: it needs too much memory"),
        ("{% for i in range(99999) %}{{ 'x' * 10000 }}{% endfor %}", "failed: it makes more than"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "failed: OverflowError: "),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "failed: it is nested too deeply"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "failed: it is nested too deeply"),
    ],
)  # fmt: skip
def test_what_a_template_does_wrong_is_said(sandbox: Sandbox, template: str, says: str) -> None:
    begin = time.monotonic()
    answer = sandbox.ask(template, [{"messages": MESSAGES}])
    assert isinstance(answer, str), answer
    assert answer.startswith(says), answer
    assert time.monotonic() - begin < SECONDS
    assert rendered(sandbox, "{{ messages }}", messages=MESSAGES) == str(MESSAGES)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 2 ** (10 ** 10) }}",  # one long operation, between whose beginning and end Python hears of nothing
    ],
)
def test_what_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    monkeypatch.setattr(model.chat_process, "MAX_CPU_SECONDS", 0.3)
    sandbox = Sandbox()
    begin = time.monotonic()
    assert sandbox.ask(template, [{}]) == "failed: it took more than 0.3 s"
    assert time.monotonic() - begin < SECONDS
    assert rendered(sandbox, "{{ x }}", x="fine") == "fine"


def test_who_does_not_answer_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the process could not end itself."""
    monkeypatch.setattr(model.chat_process, "MAX_CPU_SECONDS", 1000.0)
    monkeypatch.setattr(model.chat_process, "MAX_SECONDS", 0.5)
    sandbox = Sandbox()
    assert sandbox.ask("{{ 2 ** (10 ** 10) }}", [{}]) == "failed: it took more than 0.5 s"
    assert rendered(sandbox, "{{ x }}", x="fine") == "fine"
    monkeypatch.setattr(model.chat_process, "MAX_SECONDS", 60.0)
    monkeypatch.setattr(model.chat_process, "MAX_RESIDENT_BYTES", 100 << 20)
    slow = "{% set ns = namespace(x=[0]) %}{% for i in range(99999) %}{% set ns.x = ns.x + [0] * 100000 %}{% endfor %}"
    assert sandbox.ask(slow, [{}]) == "failed: it needs too much memory"
    assert rendered(sandbox, "{{ x }}", x="fine") == "fine"


def test_memory_is_bounded(sandbox: Sandbox) -> None:
    rendered(sandbox, "x")
    assert sandbox._process is not None
    process = psutil.Process(sandbox._process.pid)
    if sys.platform == "linux":
        assert process.rlimit(psutil.RLIMIT_AS) == (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES)
    assert process.memory_info().rss < 100 << 20


def test_nothing_can_be_opened_where_templates_are_rendered() -> None:
    """Were there a way out of Jinja's sandbox."""
    script = (
        "import os, socket\n"
        "from model.chat_sandbox import restrict\n"
        "restrict()\n"
        "for act in (lambda: open('/etc/passwd'), lambda: open('x', 'w'), socket.socket, os.pipe):\n"
        "    try:\n"
        "        act()\n"
        "    except OSError:\n"
        "        print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "refused\n" * 4, done


def test_nothing_that_templates_use_has_to_be_opened(sandbox: Sandbox) -> None:
    """What Jinja and Python import late is there."""
    used = "{{ 'a b' | wordwrap(1) }}{{ [1] | pprint }}{{ '<b>x' | striptags }}{{ 'a b' | urlencode }}{{ 'x' | e }}"
    used += "{{ strftime_now('%A %d %B %Y %H:%M %Z %c %x') }}{{ '\\u00e9\\n' }}{{ 3 | filesizeformat }}{{ lipsum() }}"
    used += "{{ [{'a': 1}] | groupby('a') }}{{ {'a': 1} | xmlattr }}{{ 'x' | center }}{{ [1, 2] | random }}"
    assert rendered(sandbox, used).startswith("a\nb[1]xa%20bx")
    answer = sandbox.ask("{{ x.y.z }}", [{}])
    assert answer == "failed: 'x' is undefined"


def test_a_template_has_what_templates_count_on(sandbox: Sandbox) -> None:
    text = """\
{%- set ns = namespace(n=0) -%}
{%- for m in messages -%}
    {%- if loop.index == 2 %}{% continue %}{% elif loop.index == 4 %}{% break %}{% endif -%}
    {%- set ns.n = ns.n + 1 -%}
    {%- generation %}{{ m }}{% endgeneration -%}
{%- endfor -%}
{{ ns.n }}{{ dict(a=1) }}{{ {'b': '<é"\\n>', 'a': [1.5, none, true]} | tojson }}
    {% if true %}
x
    {% endif %}
{{ {'b': 1, 'a': {}} | tojson(indent=2, sort_keys=true) }}{{ ['é'] | tojson(ensure_ascii=true, separators=(',', ':')) }}
"""
    expected = 'ac2{\'a\': 1}{"b": "<é\\"\\n>", "a": [1.5, null, true]}\nx\n'
    expected += '{\n  "a": {},\n  "b": 1\n}["\\u00e9"]'
    assert rendered(sandbox, text, messages=["a", "b", "c", "d"]) == expected
    assert rendered(sandbox, "{{ strftime_now('%Y') }}") == time.strftime("%Y")


def template_of(tokenizer: Tokenizer, text: str) -> ChatTemplate:
    return ChatTemplate({DEFAULT: TemplateText(Path("that/template.jinja"), text)}, tokenizer)


def test_an_error_is_one_short_line_without_controls(tokenizer: Tokenizer) -> None:
    for words in ("a\\nb", "a\\x1b[2Jb", "a\\rb", "x" * 2000):
        with pytest.raises(UserError) as caught:
            template_of(tokenizer, f"{{{{ raise_exception('{words}') }}}}").render(MESSAGES)
        line = str(caught.value)
        assert line.startswith("that/template.jinja: the chat template says: ")
        assert line.isprintable()
        assert len(line) < 500


def test_messages_that_are_nested_too_deeply_are_refused(tokenizer: Tokenizer) -> None:
    nested: object = "x"
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(UserError, match="nested too deeply"):
        template_of(tokenizer, "x").render([{"role": "user", "content": nested}])


RAG_ONLY = [{"name": "rag", "template": "x"}]


def test_a_file_that_is_no_template_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_byte_level(tmp_path), tiny_config())
    file, settings = tmp_path / "chat_template.jinja", tmp_path / "tokenizer_config.json"

    def refused(says: str) -> None:
        begin = time.monotonic()
        with pytest.raises(UserError, match=says) as caught:
            load_chat_template(tmp_path, tokenizer, tiny_config()).render(MESSAGES)
        assert "\n" not in str(caught.value)
        assert time.monotonic() - begin < SECONDS

    for data, says in (
        (b"x" * (MAX_TEMPLATE_BYTES + 1), "larger than 256 KiB"),
        (b"x" * 10_000_000, "larger than 256 KiB"),
        (b"\xff\xfe", "not UTF-8"),
        (b"\x7fELF\x02\x01\x01" + bytes(range(128, 256)), "not UTF-8"),
        (b"{{", "the chat template failed: line 1: "),
    ):
        file.write_bytes(data)
        refused(says)
    file.unlink()
    file.mkdir()
    refused("cannot be read: ")
    file.rmdir()
    for template in ("x" * (MAX_TEMPLATE_BYTES + 1), 7, ["x"], [{"name": "default"}], RAG_ONLY):
        settings.write_text(json.dumps({"chat_template": template}))
        refused("tokenizer_config.json: ")


def test_the_process_ends_with_the_template(tokenizer: Tokenizer) -> None:
    template = template_of(tokenizer, "x")
    template.render([])
    process = template._sandbox._process
    assert process is not None
    assert process.poll() is None
    del template
    assert process.poll() is not None
