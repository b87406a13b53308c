"""The command `chat` as a script meets it: messages and commands through a pipe, answers on stdout, the rest on stderr.
"""

import io
import json
import os
import signal
import stat
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from cli import chat_session, console
from cli.main import main
from tests.cli.terminal import Replies, write_chatty_checkpoint
from tests.generate.scripted import StandIn


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("torchchat: error: ")]


Chat = Callable[..., Done]


@pytest.fixture(scope="module")
def chatty(tmp_path_factory) -> Path:
    return write_chatty_checkpoint(tmp_path_factory.mktemp("models") / "chatty")


@pytest.fixture
def chat(chatty, capsys, monkeypatch, tmp_path) -> Chat:
    """Runs a script through `chat` in this process."""
    monkeypatch.setenv("TORCHCHAT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    console.cache_dir_or_say.cache_clear()

    def run(script: str | bytes, *flags: object, model: object = chatty) -> Done:
        data = script.encode() if isinstance(script, str) else script
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        capsys.readouterr()
        code = main(["chat", str(model), "--device", "cpu", "--dtype", "fp32", *map(str, flags)])
        return Done(code, *capsys.readouterr())

    yield run
    console.cache_dir_or_say.cache_clear()


@pytest.fixture
def says(monkeypatch):
    """What the model says, in turn."""
    return lambda *texts, **options: Replies(*texts, **options).install(monkeypatch)


def test_answers_alone_are_on_stdout(chat, says):
    says("one", "two\n", "", "four\n\n**lines**")
    done = chat('hello\n\n"""\nseveral\n\nlines\n"""\nthird\n/show\nfourth\n')
    assert (done.code, done.out) == (0, "one\ntwo\n\nfour\n\n**lines**\n")
    assert "context" in done.err
    assert "\x1b" not in done.err
    assert done.err.startswith("torchchat: ")


def test_an_empty_script_is_no_mistake(chat, says):
    says("never")
    assert chat("")[:2] == (0, "")


def test_what_failed_is_a_line_each_and_all_else_goes_on(chat, says):
    says("one", "two")
    done = chat(b"first\n/compil\n/set temperature high\n\xff\n/load nothing.json\n/undo much\nlast\n")
    assert (done.code, done.out) == (2, "one\ntwo\n")
    assert done.errors == [
        "torchchat: error: unknown command /compil; did you mean '/compile'? (/help lists them; with a space before "
        "the slash it is a message)",
        "torchchat: error: temperature must be a number, or default, not 'high'",
        "torchchat: error: line 4: not UTF-8 text (byte 0)",
        "torchchat: error: nothing.json: No such file or directory",
        "torchchat: error: /undo takes nothing, not 'much'",
    ]


def test_exit_ends_a_script_early(chat, says):
    says("one", "two")
    assert chat("first\n/exit\nsecond\n")[:2] == (0, "one\n")


def test_a_message_may_begin_with_a_slash(chat, says):
    replies = says("one")
    done = chat('/etc/hosts is\n /help\n"""/help"""\n"""\n/tmp\nis full\n"""\n/save said.json\n')
    assert done.code == 0
    assert len(replies.read) == 4
    said = [m["content"] for m in json.loads(Path("said.json").read_text())["messages"] if m["role"] == "user"]
    assert said == ["/etc/hosts is", " /help", "/help", "/tmp\nis full"]


@pytest.mark.parametrize(
    ("script", "says_"),
    [
        ("/system Be brief.\n/system\n", "Be brief.\n"),
        ("/system Be brief.\n/system off\n/system\n", "there is no system text"),
        ("/set\n", "seed                a new one for each answer"),
        ("/set top-k 7\n/set\n", "top_k               7                          set here"),
        ("/set stop User:\n/set\n", '["User:"]'),
        ('/set stop ["a", "\\n"]\n/set\n', '["a", "\\n"]'),
        ("/set temperature 0\n/set seed 3\n", "seed is without effect"),
        ("/set temperature 0\n/set temperature default\n/set\n", "temperature         0.9\n"),
        ("/dtype\n", "/dtype takes fast, fast16, bf16, fp16, fp32"),
        ("/device cpu\n", "nothing to change"),
        ("/quantize\n", "/quantize takes off, cpu"),
        ("/stats\n", "there is no answer yet"),
        ("/help\n", "/quantize [RECIPE|off]"),
        ("/clear\n", "a new conversation"),
        ("/show\n", "of 4,096 tokens used"),
    ],
)
def test_a_command_says(chat, says, script, says_):
    says("one")
    done = chat(script)
    assert (done.code, done.out) == (0, "")
    assert says_ in done.err


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("/", "unknown command /;"),
        ("/set temprature 1", "'temprature' cannot be set; did you mean 'temperature'?"),
        ("/set top_k", "/set top_k to what?"),
        ("/set top_k 1.5", "top_k must be a whole number, or default, not '1.5'"),
        ("/set top_p 7", "top_p must be a number over 0 and at most 1, not 7.0"),
        ("/set seed -1", "seed must be a whole number from 0"),
        ("/set stop [1]", "stop takes texts"),
        ("/set stop [", "stop takes a text, or JSON"),
        ("/stats maybe", "/stats takes on or off"),
        ("/compile maybe", "/compile takes on, prefill, off"),
        ("/dtype bf61", "dtype must be one of"),
        ("/device tpu", "device must be one of"),
        ("/quantize {", "--quantize"),
        ("/model no-such-model", "no-such-model"),
        ("/save", "which file?"),
        ("/save nowhere/a.json", "there is no directory nowhere"),
        ("/load /", "/: Is a directory"),
        ("/retry", "answer"),
        ('"""', "nothing closes it"),
        ("/undo", "there is nothing to undo"),
    ],
)
def test_a_mistake_is_one_line_and_2(chat, says, line, error):
    says("one")
    done = chat(line + "\n")
    assert (done.code, done.out) == (2, "")
    (told,) = done.errors
    assert error in told


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--temperature", "-1"], "temperature must be a number"),
        (["--load", "nothing.json"], "nothing.json: No such file or directory"),
        (["--dtype", "fp8"], "--dtype must be one of"),
        (["--num-samples", "2"], "unknown option --num-samples"),
    ],
)
def test_a_wrong_flag_is_one_line_before_anything_is_loaded(chat, monkeypatch, flags, error):
    monkeypatch.setattr(chat_session, "build", None)
    done = chat("hello\n", *flags)
    assert (done.code, done.out) == (2, "")
    assert error in done.err
    assert done.err.count("\n") == 1


def test_explain_loads_nothing(chat, monkeypatch):
    monkeypatch.setattr(chat_session, "build", None)
    done = chat("hello\n", "--explain")
    assert done.code == 0
    assert "max-seq-len" in done.out


# ---- What is kept ----


def test_save_and_load(chat, says):
    says("one", "two")
    assert chat("first\n/set top_k 5\n/set stop X\n/system Be brief.\n/save a b.json\nsecond\n").code == 0
    saved = json.loads(Path("a b.json").read_text())
    assert saved["messages"] == [{"role": "user", "content": "first"}, {"role": "assistant", "content": "one"}]
    assert (saved["system"], saved["settings"]) == ("Be brief.", {"top_k": 5, "stop": ["X"]})
    assert stat.S_IMODE(Path("a b.json").stat().st_mode) == 0o600

    says("three")
    done = chat("third\n/set\n/save again.json\n", "--load", "a b.json", "--top-k", 6)
    assert (done.code, done.out) == (0, "three\n")
    assert "2 messages are here" in done.err
    again = json.loads(Path("again.json").read_text())
    assert [m["content"] for m in again["messages"]] == ["first", "one", "third", "three"]
    assert (again["system"], again["settings"]) == ("Be brief.", {"top_k": 6, "stop": ["X"]})  # a flag is stronger

    done = chat("other\n/load a b.json\n/save third.json\n")
    assert json.loads(Path("third.json").read_text()) == saved


def test_a_file_that_is_no_conversation_is_not_written_over(chat, says):
    says("one")
    Path("notes.txt").write_text("mine")
    done = chat("hello\n/save notes.txt\n/save new.json\n/save new.json\n")
    assert done.code == 2
    assert done.errors == [
        "torchchat: error: notes.txt is there and is no conversation, so it stays as it is: choose another"
    ]
    assert Path("notes.txt").read_text() == "mine"


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("document", "error"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ([], "is no conversation"),
        ({"messages": 1}, "is no conversation"),
        ({"messages": [], "sytem": "x"}, "unknown key 'sytem'; did you mean 'system'?"),
        ({"messages": [{"role": "user"}]}, "message 1 must be"),
        ({"messages": [{"role": "user", "content": 1}]}, "message 1 must be"),
        ({"messages": [ASSISTANT, USER]}, "message 1 is of 'assistant', and 'user' comes there"),
        ({"messages": [USER, USER]}, "message 2 is of 'user', and 'assistant' comes there"),
        ({"messages": [USER]}, "the last message has no answer"),
        ({"messages": [], "system": 3}, '"system" and "model" must be texts'),
        ({"messages": [], "settings": {"temprature": 1}}, "unknown setting 'temprature'; did you mean 'temperature'?"),
        ({"messages": [], "settings": {"top_p": 9}}, "top_p must be"),
        ({"messages": [], "settings": {"top_k": "5"}}, "top_k must be"),
        ({"messages": [], "settings": {"stop": 5}}, "stop must be a text or a list of texts"),
        ({"messages": [], "settings": {"stop": [5]}}, "stop takes texts"),
    ],
)
def test_a_bad_file_is_one_line_and_changes_nothing(chat, says, document, error):
    says("one", "two")
    Path("bad.json").write_text(document if isinstance(document, str) else json.dumps(document))
    done = chat("hello\n/load bad.json\nagain\n/save after.json\n")
    assert (done.code, done.out) == (2, "one\ntwo\n")
    (told,) = done.errors
    assert told.startswith("torchchat: error: bad.json: ")
    assert error in told
    assert len(json.loads(Path("after.json").read_text())["messages"]) == 4


def test_a_file_that_somebody_wrote_by_hand(chat, says):
    says("c")
    messages = [{"role": "system", "content": "s"}, USER, ASSISTANT]
    Path("hand.json").write_text(json.dumps({"messages": messages}))
    assert chat("hello\n/save after.json\n", "--load", "hand.json")[:2] == (0, "c\n")
    after = json.loads(Path("after.json").read_text())
    assert after["system"] == "s"
    assert after["messages"][:2] == [USER, ASSISTANT]


# ---- How it is sampled, with the tiny model's own words ----


def test_a_seed_fixes_the_answer_and_without_one_each_is_another(chat):
    flags = ("--max-new-tokens", 12)
    one, two = (chat("hello\n/retry\n/retry\n", "--seed", 3, *flags).out for _ in range(2))
    assert one == two
    whole = len(one) // 3
    assert one == one[:whole] * 3
    free = [chat("hello\n", *flags).out for _ in range(3)]
    assert len(set(free)) == 3


def test_a_fixed_seed_is_told_when_it_keeps_the_answer_as_it_was(chat):
    done = chat("hello\n/set seed 3\n/retry\n", "--max-new-tokens", 4)
    assert "the seed is set, so that the answer is the same" in done.err
    assert "cut after 4 tokens" in done.err


def test_changing_the_customization_keeps_the_history_and_the_answers(chat):
    """float32 again after bfloat16: what is said then is what is said without the change."""
    flags = ("--max-new-tokens", 8, "--temperature", 0)
    plain = chat("hello\nagain\n", *flags)
    changed = chat("hello\n/dtype bf16\n/dtype fp32\nagain\n", *flags)
    assert changed.code == 0
    assert changed.out == plain.out
    assert "bf16 (--dtype)" in changed.err


def test_the_old_weights_are_gone_before_the_new_ones_are_read(chat, monkeypatch):
    real, old = chat_session.build, []

    def build(prepared):
        assert [weights for weights in old if weights() is not None] == []
        built = real(prepared)
        old.extend(weakref.ref(parameter) for parameter in built.model.parameters())
        old.extend(weakref.ref(keys) for keys in built.engine.cache.keys)
        return built

    monkeypatch.setattr(chat_session, "build", build)
    done = chat("hello\n/dtype bf16\nagain\n/dtype fp32\nlast\n", "--max-new-tokens", 2)
    assert done.code == 0, done.err
    assert len(old) > 30


def test_quantize_and_off(chat):
    done = chat(
        'hello\n/quantize {"linear:int8": {}}\nagain\n/quantize off\n/quantize off\nlast\n', "--max-new-tokens", 3
    )
    assert done.code == 0, done.err
    assert "quantized: linear:int8" in done.err
    assert done.err.count("· unquantized") == 3  # at first, after the first "off", and "nothing to change"


def test_compile_keeps_the_weights(chat, monkeypatch):
    backend = StandIn.install(monkeypatch)
    real, loads = chat_session.build, []
    monkeypatch.setattr(chat_session, "build", lambda prepared: loads.append(1) or real(prepared))
    done = chat("hello\n/compile\nagain\n/compile prefill\n/compile off\nlast\n", "--max-new-tokens", 3)
    assert done.code == 0, done.err
    assert len(loads) == 1
    assert len(backend.functions) > 0
    assert "· compiled decode ·" in done.err
    assert "compiled decode and prefill" in done.err


def test_compile_is_done_before_the_first_message(chat, monkeypatch):
    StandIn.install(monkeypatch)
    done = chat("/show\nhello\n", "--compile", "--max-new-tokens", 2)
    assert done.code == 0, done.err
    assert done.err.index("decode: ") < done.err.index("context ")
    assert "decode: " not in done.err[done.err.index("context ") :]


def test_a_variable_can_be_taken_back(chat, monkeypatch):
    monkeypatch.setenv("TORCHCHAT_QUANTIZE", '{"linear:int8": {}}')
    done = chat("/quantize off\nhello\n", "--max-new-tokens", 2)
    assert done.code == 0, done.err
    assert "· unquantized" in done.err


# ---- Models and templates ----


def test_another_model_in_the_middle(chat, tmp_path):
    write_chatty_checkpoint(tmp_path / "other", context=512)
    done = chat("hello\n/model ./other\nagain\n/show\n/model ./none\nlast\n", "--max-new-tokens", 3)
    assert done.code == 2
    assert "of 512 tokens used" in done.err
    assert done.out.count("\n") >= 3


def test_a_model_without_a_template_says_so_and_converses(chat, tmp_path):
    model = write_chatty_checkpoint(tmp_path / "plain", chat=False)
    done = chat("hello\nagain\n", "--max-new-tokens", 3, model=model)
    assert done.code == 0, done.err
    assert "was not made to converse" in done.err
    assert done.out.count("\n") >= 2


def test_a_full_context_is_said_and_it_goes_on(chat, tmp_path):
    model = write_chatty_checkpoint(tmp_path / "small", context=128)
    done = chat("a message\n" * 8, "--max-new-tokens", 8, model=model)
    assert done.code == 0, done.err
    assert done.out.count("\n") >= 8
    assert "messages are no longer seen" in done.err


def test_a_message_that_does_not_fit_is_a_mistake(chat, tmp_path):
    model = write_chatty_checkpoint(tmp_path / "small", context=128)
    done = chat("x" * 500 + "\nhello\n", "--max-new-tokens", 4, model=model)
    assert done.code == 2
    assert len(done.errors) == 1


def test_a_system_text_that_the_format_leaves_out_is_said(chat, tmp_path):
    model = write_chatty_checkpoint(tmp_path / "deaf")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    users = "{% for m in messages if m.role != 'system' %}<|turn|>{{ m.role }}: {{ m.content }}{% endfor %}"
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": users}))
    done = chat("/system Be kind.\nhello\n", "--system", "Be brief.", "--max-new-tokens", 2, model=model)
    assert done.code == 0, done.err
    assert done.err.count("leaves the system text out") == 2


def test_a_format_that_refuses_a_system_text(chat, tmp_path):
    model = write_chatty_checkpoint(tmp_path / "strict")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": refuse}))
    done = chat("hello\n", "--system", "Be brief.", model=model)
    assert done.code == 2
    assert "no system role" in done.err
    done = chat("/system Be brief.\nhello\n", "--max-new-tokens", 2, model=model)
    assert (done.code, len(done.errors)) == (2, 1)


# ---- Ends ----


def test_ctrl_c_ends_a_script_and_leaves_what_there_is(chat, says):
    says("word " * 1000).when[20] = lambda: os.kill(os.getpid(), signal.SIGINT)
    done = chat("talk\nnever\n")
    assert done.code == 130
    assert done.out.startswith("word word")
    assert len(done.out) < 50


def test_closed_input_is_one_line(chatty, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["chat", str(chatty)]) == 2
    assert "standard input is closed" in capsys.readouterr().err


def test_when_the_old_model_cannot_come_back_it_ends(chat, says, monkeypatch):
    says("one")
    real, built = chat_session.build, []

    def once(prepared):
        built.append(prepared)
        if len(built) > 1:
            raise chat_session.UserError("no memory")
        return real(prepared)

    monkeypatch.setattr(chat_session, "build", once)
    done = chat("hello\n/dtype bf16\nnever\n")
    assert (done.code, done.out) == (2, "one\n")
    assert done.errors == ["torchchat: error: no memory"]
