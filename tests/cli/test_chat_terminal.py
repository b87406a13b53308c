"""Whole conversations at a terminal with a model that says what is scripted: what a person types, and what the screen
then shows.
"""

import json
import os
import re
import stat
import threading
import time
from pathlib import Path

import pytest

from cli import chat_session, console
from tests.cli.terminal import (
    ALT_ENTER,
    CTRL_C,
    CTRL_D,
    CTRL_X_CTRL_E,
    ENTER,
    TAB,
    UP,
    Person,
    Replies,
    at_terminal,
    write_chatty_checkpoint,
)

pytestmark = pytest.mark.skipif(os.name != "posix", reason="no pseudo-terminals")


@pytest.fixture(scope="module")
def chatty(tmp_path_factory) -> Path:
    return write_chatty_checkpoint(tmp_path_factory.mktemp("models") / "chatty")


@pytest.fixture
def chat(chatty, monkeypatch, tmp_path):
    """Converses at a terminal: the exit code, and the person with all that was on the screen."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("TORCHCHAT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.chdir(tmp_path)
    console.cache_dir_or_say.cache_clear()

    def run(acts, *flags: object, columns: int = 100) -> Person:
        argv = ["chat", chatty, "--device", "cpu", "--dtype", "fp32", *flags]
        person = Person(columns, 30)
        assert at_terminal(monkeypatch, argv, acts, person) == 0, person.text
        return person

    yield run
    console.cache_dir_or_say.cache_clear()


@pytest.fixture
def script(monkeypatch):
    """What the model says, in turn."""
    return lambda *texts, **options: Replies(*texts, **options).install(monkeypatch)


def break_off() -> None:
    """As a second Ctrl-C does in the middle of a step."""
    raise KeyboardInterrupt


def conversation(person: Person) -> list[str]:
    """What is on the screen from the first prompt on, without blank lines."""
    lines = [line for line in person.lines if line]
    return lines[next(i for i, line in enumerate(lines) if line.startswith(">")) :]


def test_a_conversation(chat, script):
    script("Hi, I am **bold**.\n\n- one\n- two", "Again.", "Other.")

    def acts(person):
        person.says("hello")
        person.says("again?")
        person.says("/retry")
        person.says("/undo")
        person.says("/undo")
        person.says("/undo")
        person.says("/bye")

    assert conversation(chat(acts)) == [
        "> hello",
        "Hi, I am bold.",
        "• one",
        "• two",
        "> again?",
        "Again.",
        "> /retry",
        "Other.",
        "> /undo",
        "(forgotten, with its answer: again?)",
        "> /undo",
        "(forgotten, with its answer: hello)",
        "> /undo",
        "torchchat: error: there is nothing to undo",
        "> /bye",
    ]


def test_several_lines_in_every_way(chat, script):
    script("ok")
    seen = []

    def acts(person):
        def answered(times):
            person.waits(lambda: person.lines.count("ok") == times and person.is_asked(), f"answer {times}")

        person.says('"""')
        person.types("one" + ENTER + "  two" + ENTER + '"""' + ENTER)
        answered(1)
        person.types("three" + ALT_ENTER + "four" + ENTER)
        answered(2)
        person.pastes("five\n/help\nsix")
        person.sees("six")
        seen.append(person.text)
        person.types(ENTER)
        answered(3)
        person.says("/save said.json")
        person.sees("saved")
        person.says("/exit")

    chat(acts)
    assert seen[0].endswith("> five\n  /help\n  six")  # one message, which waits for Enter
    said = [m["content"] for m in json.loads(Path("said.json").read_text())["messages"] if m["role"] == "user"]
    assert said == ["one\n  two", "three\nfour", "five\n/help\nsix"]


def test_ctrl_c_stops_an_answer_and_keeps_what_there_is(chat, script):
    script("word " * 400, pause_s=0.01)

    def acts(person):
        person.says("talk")
        person.sees("word word")
        person.interrupts()
        person.sees(r"\(stopped\)")
        person.says("/save kept.json")
        person.says("/exit")

    chat(acts)
    _, answer = json.loads(Path("kept.json").read_text())["messages"]
    assert answer["content"].startswith("word word")
    assert len(answer["content"]) < 2000


def test_ctrl_c_stops_the_reading_of_a_long_message(chat, script):
    replies = script("never", "said", pause_s=0.2)

    def acts(person):
        person.sees("a message")
        person.pastes("long " * 700)
        person.types(ENTER)
        person.waits(lambda: replies.read, "the reading")
        replies.pause_s = 0.05
        person.interrupts()
        person.sees(r"\(stopped\)")
        person.says("/save kept.json")
        person.says("short")
        person.sees("^said")
        person.says("/exit")

    chat(acts)
    assert json.loads(Path("kept.json").read_text())["messages"] == []
    assert len(replies.read[0]) < 3000


def test_a_step_that_is_broken_off_costs_no_more_than_reading_it_anew(chat, script):
    script("half", "whole").when[4] = break_off

    def acts(person):
        person.says("first")
        person.sees(r"\(stopped\)")
        person.says("second")
        person.sees("^whole")
        person.says("/save kept.json")
        person.says("/exit")

    chat(acts)
    messages = json.loads(Path("kept.json").read_text())["messages"]
    assert [message["content"] for message in messages] == ["first", "hal", "second", "whole"]


def test_ctrl_c_at_the_prompt_clears_it_or_says_how_to_leave(chat, script):
    script("never said")

    def acts(person):
        person.sees("a message")
        person.types("half a mess")
        person.sees("half a mess")
        person.types(CTRL_C)
        person.sees(r"> half a mess\n\n> a message")
        person.types(CTRL_C)
        person.sees("Ctrl-D or /exit leaves")
        person.sees(r"leaves\)\n\n> a message")
        person.leaves()

    assert "never said" not in chat(acts).text


def test_what_is_typed_is_kept_for_the_next_time_and_private(chat, script, tmp_path):
    script("yes")

    def first(person):
        person.says("remember\x1b\rme")
        person.says("/exit")

    chat(first)
    history = tmp_path / "cache" / "chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600

    def second(person):
        person.sees("a message")
        person.types(UP)
        person.sees("> /exit")
        person.types(UP)
        person.sees("> remember\n  me")
        person.types(CTRL_C)
        person.sees("a message")
        person.leaves()

    chat(second)
    before = history.read_bytes()

    def third(person):
        person.says("a secret")
        person.says("/exit")

    chat(third, "--no-history")
    assert history.read_bytes() == before


def test_a_history_that_has_grown_too_long_loses_its_older_half(chat, script, tmp_path):
    script("yes")
    (tmp_path / "cache").mkdir(mode=0o700)
    history = tmp_path / "cache" / "chat_history"
    history.write_text("".join(f"\n# 2025-01-01\n+message {i}\n" for i in range(40_000)))

    def acts(person):
        person.sees("a message")
        person.types(UP)
        person.sees("> message 39999")
        person.types(CTRL_C)
        person.sees("a message")
        person.leaves()

    chat(acts)
    assert history.stat().st_size < 2**19
    assert history.read_text().startswith("\n# 2025-01-01\n+message ")


def test_a_history_that_cannot_be_kept_is_said_and_no_hindrance(chat, script, tmp_path):
    script("yes")
    (tmp_path / "cache" / "chat_history").mkdir(parents=True)
    (tmp_path / "cache").chmod(0o700)

    def acts(person):
        person.says("hello")
        person.says("/exit")

    text = chat(acts).text
    assert "what is typed is not kept" in text
    assert "yes" in text


def test_commands_and_what_comes_after_them_complete(chat, script):
    script("yes")
    Path("a conversation.json").touch()

    def acts(person):
        person.sees("a message")
        person.types("/sa")
        person.sees("write the conversation")
        person.types(TAB)
        person.sees("> /save")
        person.types(" a con")
        person.sees("a conversation.json")
        person.types(CTRL_C)
        person.sees("> a message")
        person.types("/dtype b")
        person.sees("bf16")
        person.types(TAB)
        person.sees("> /dtype bf16")
        person.types(ENTER)  # takes what was chosen
        person.types(CTRL_C)
        person.sees("> a message")
        person.types("/quantize cpu-")
        person.sees("cpu-small")
        person.types(CTRL_C)
        person.sees("> a message")
        person.leaves()

    assert "bf16 (--dtype)" not in chat(acts).text


def test_an_editor(chat, script, monkeypatch, tmp_path):
    script("yes")
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\nprintf "\\nedited\\nlines\\n" >> "$1"\n')
    editor.chmod(0o755)
    monkeypatch.setenv("VISUAL", str(editor))

    def acts(person):
        person.sees("a message")
        person.types("draft" + CTRL_X_CTRL_E)
        person.sees("yes")
        person.says("/save edited.json")
        person.says("/exit")

    chat(acts)
    assert json.loads(Path("edited.json").read_text())["messages"][0]["content"] == "draft\nedited\nlines"


def test_the_history_stays_when_the_model_is_built_anew(chat, script):
    replies = script("one", "two", "three")

    def acts(person):
        person.says("first question")
        person.says("/dtype bf16")
        person.sees(r"bf16 \(--dtype\)")
        person.says("second question")
        person.says("/dtype half")
        person.sees("dtype must be one of")
        person.says("/quantize nonsense")
        person.sees("error: --quantize nonsense")
        person.says("third question")
        person.says("/exit")

    person = chat(acts)
    answers = [line for line in conversation(person) if line in ("one", "two", "three")]
    assert answers == ["one", "two", "three"]
    # The new model has read all of it; of the third turn, after two mistakes, only what was new.
    assert len(replies.read[1]) > len("first question" "one" "second question") + len("<user: assistant: user: ")
    assert len(replies.read[2]) < len("third question") + len("<user: <assistant: ") + 2


def test_a_model_that_cannot_be_built_leaves_the_old_one(chat, script, monkeypatch):
    script("one", "two")
    real = chat_session.build
    built = []

    def fail_the_second_time(prepared):
        built.append(prepared)
        if len(built) == 2:
            raise chat_session.UserError("it does not fit")
        if len(built) == 4:
            raise KeyboardInterrupt
        return real(prepared)

    monkeypatch.setattr(chat_session, "build", fail_the_second_time)

    def acts(person):
        person.says("first")
        person.says("/dtype bf16")
        person.sees("it does not fit; it goes on as before")
        person.says("second")
        person.sees("^two")
        person.says("/dtype bf16")
        person.sees("interrupted; it goes on as before")
        person.says("/exit")

    chat(acts)
    assert [prepared.dtype.name for prepared in built] == ["fp32", "bf16", "fp32", "bf16", "fp32"]


def test_what_a_model_says_does_not_steer_the_terminal(chat, script):
    script("\x1b]0;owned\x07\x1b[31mred\x1b[2J \x9b5m &#27;[31m")

    def acts(person):
        person.says("attack")
        person.sees("red")
        person.says("/exit")

    person = chat(acts)
    assert b"\x1b[31m" not in person.raw
    assert b"\x1b]" not in person.raw
    assert b"\x1b[2J" not in person.raw
    assert b"\x9b" not in person.raw.replace("�".encode(), b"")
    assert "�]0;owned��[31mred�[2J" in person.text


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_without_colours_it_is_plain_text(chat, script, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    script("It is **so**.\n\n```python\nx = 1\n```\x1b[31m\n")

    def acts(person):
        person.sees("^> ")
        person.types("hello" + ENTER)
        person.sees("31m")
        person.sees(r"31m\n+> ")
        person.types(CTRL_D)

    person = chat(acts)
    assert "It is **so**.\n\n```python\nx = 1\n```�[31m\n" in person.text
    answer = person.raw[person.raw.index(b"It is") : person.raw.index(b"31m")]
    assert b"\x1b" not in answer


def test_what_is_typed_while_an_answer_is_shown_waits(chat, script):
    script("word " * 30, "second", pause_s=0.01)

    def acts(person):
        person.says("talk")
        person.sees("word word")
        person.types("typed ahead" + ENTER)
        person.sees("^second")
        person.sees("a message")
        person.leaves()

    lines = conversation(chat(acts))
    assert re.fullmatch(r"(word ?)+", lines[1])
    assert "typed ahead" in lines[3]


def test_what_is_typed_while_the_model_is_built_waits_unseen(chat, script, monkeypatch):
    script("Hi.")
    typed = threading.Event()
    person_of: list[Person] = []
    real = chat_session.build

    def build(*args, **options):
        if typed.is_set():  # anew, while somebody types
            person_of[0].types("typed ahead")
            time.sleep(0.2)
        return real(*args, **options)

    monkeypatch.setattr(chat_session, "build", build)

    def acts(person):
        person_of.append(person)
        person.says("hello")
        person.sees("Hi")
        typed.set()
        person.says("/dtype bf16")
        person.sees(r"^> typed ahead")
        person.types(CTRL_C + CTRL_D)

    assert chat(acts).text.count("typed ahead") == 1


def test_on_a_narrow_terminal_lines_end_between_words(chat, script):
    script("Hi.")

    def acts(person):
        person.says("/help")
        person.says("/nope")
        person.says("/show")
        person.sees("messages +0")
        person.says("/exit")

    lines = chat(acts, columns=62).lines
    assert all(len(line) <= 62 for line in lines)
    whole = re.sub(r"\s+", " ", " ".join(lines))
    for text in (
        "begins a text of several lines, which the same ends; Alt-Enter begins a line anywhere",
        "unknown command /nope; did you mean '/compile'? (/help lists them; with a space before the slash it is a ",
        "cpu (--device) · fp32 (--dtype) · eager · unquantized",
    ):
        assert text in whole
    below = next(i for i, line in enumerate(lines) if "begins a text" in line)
    assert lines[below + 1].startswith(" " * lines[below].index("begins"))


def test_what_is_set_is_said(chat, script):
    script("Hi.")

    def acts(person):
        for line in ("/set temperature 0.50", "/set stop User:", "/set temperature default", "/system Be kind."):
            person.says(line)
        person.says("/stats on")
        person.sees("figures: on")
        person.says("/exit")

    notes = [line for line in conversation(chat(acts)) if line.startswith("(")]
    assert notes == [
        "(temperature: 0.5)", '(stop: ["User:"])', "(temperature: 0.9)", "(the model is told that from now on)",
        "(figures: on)",
    ]  # fmt: skip


def test_the_last_figures_outlive_the_model(chat, script):
    script("Hi.")

    def acts(person):
        person.says("hello")
        person.says("/dtype bf16")
        person.says("/stats")
        person.sees("made at")
        person.says("/exit")

    assert "there is no answer yet" not in chat(acts).text


def test_figures(chat, script):
    script("a" * 20, "b" * 20, pause_s=0.002)

    def acts(person):
        person.says("one")
        person.says("/set seed 5")
        person.says("two")
        person.says("/stats off")
        person.says("three")
        person.says("/stats")
        person.says("/show")
        person.sees("messages +6")
        person.says("/exit")

    figures = re.findall(
        r"(\d+) new tokens read, (\d+) reused · first token after \d+ m?s · (\d+) made at [\d.,]+ tok/s · "
        r"context (\d+) of 4,096 · seed (\d+)",
        chat(acts, "--stats", columns=200).text,
    )
    assert len(figures) == 3
    assert [int(row[2]) for row in figures] == [21, 21, 21]
    assert figures[1][4] == figures[2][4] == "5" != figures[0][4]
    assert int(figures[1][1]) > 20  # a turn reads its own tokens only
