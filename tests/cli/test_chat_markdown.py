"""Answers as markdown: what is on the screen at the end does not depend on the pieces in which they came, long ones
scroll as text does, and nothing that a model says steers the terminal.
"""

import random
import re

import pytest

from cli import chat_markdown
from cli.chat_markdown import MarkdownView, split
from tests.cli.terminal import Person

ANSWER = """\
# A title

Some *text*, **bold** and `code`.
The next line stays one: <div>so does HTML</div>, [a link](http://x.example/y) and <http://z.example>.

1. **One**: with
   a line more

2. Two
   - nested

```python
def f(x):
    return "a" * 3  # comment
```

| a | b |
|---|---|
| 1 | 2 |

> quoted
> twice

---

The end."""
SHOWN = """\
A title

Some text, bold and code.
The next line stays one: <div>so does HTML</div>, a link (http://x.example/y)
and http://z.example.

1. One: with
   a line more
2. Two
   • nested

```python
def f(x):
    return "a" * 3  # comment
```

 a  b
 ────
 1  2

▌ quoted
▌ twice
"""
ESCAPE = re.compile(r"\x1b\[([0-9;]*)([A-Za-z])")


@pytest.fixture
def show(monkeypatch):
    """Shows pieces, every one of which is drawn, on a terminal."""
    monkeypatch.setattr(chat_markdown, "LEAST_INTERVAL_S", 0.0)
    monkeypatch.setattr(chat_markdown, "DRAWING_SHARE", float("inf"))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def run(pieces, lines=24, **options):
        person = Person(80, lines)
        with open(person.slave, "w", encoding="utf-8") as stream:
            view = MarkdownView(stream, **options)
            for piece in pieces:
                view.write(piece)
            view.end(whole=True)
            print("END", file=stream, flush=True)
            person.sees("^END$")
        return person

    return run


def in_pieces(text, seed, most=7):
    chance, at = random.Random(seed), 0
    while at < len(text):
        size = chance.randint(1, most)
        yield text[at : at + size]
        at += size


@pytest.mark.parametrize("seed", range(3))
def test_the_pieces_do_not_matter(show, seed):
    person = show(in_pieces(ANSWER, seed))
    assert person.text.startswith(SHOWN)
    assert person.lines[-2:] == ["The end.", "END"]


@pytest.mark.parametrize("pieces", [[ANSWER], list(ANSWER)])
def test_all_at_once_and_letter_by_letter(show, pieces):
    assert show(pieces).text.startswith(SHOWN)


def test_what_no_longer_fits_on_the_screen_is_there_once(show):
    rows = [f"print({i})" for i in range(100)]
    person = show(in_pieces("Before.\n\n```python\n" + "\n".join(rows) + "\n```\nAfter.", 0), lines=10)
    assert person.lines == ["Before.", "", "```python", *rows, "```", "", "After.", "END"]


def test_a_long_paragraph_scrolls_too(show):
    words = [f"word{i}" for i in range(400)]
    person = show(in_pieces(" ".join(words), 0), lines=6)
    assert " ".join(person.lines[:-1]).split() == words


def test_only_what_changed_is_drawn_again(show):
    person = show(list("a line\n" * 50))
    assert len(person.raw) < 50 * 7 * 40  # a row a letter; with all of the block it would be ten times as many


STEERING = "\x1b[2J \x1b]8;;http://evil\x07x\x1b]8;;\x07 \x9b31m \x07 \r \x00 &#27;[2J &#12; &#13; &#155;2J [a](http://e.x/&#7;)"


@pytest.mark.parametrize("wrap", ["{}", "`{}`", "```\n{}\n```", "# {}", "> {}", "| {} |\n|---|\n| {} |", "<think>{}"])
def test_no_control_character_of_a_model_reaches_the_terminal(show, wrap):
    person = show(list(wrap.replace("{}", STEERING)))
    text = person.raw.decode()
    left = ESCAPE.sub("", text)
    assert not [c for c in left if (ord(c) < 32 and c not in "\r\n") or 127 <= ord(c) < 160]
    found = ESCAPE.findall(text)
    assert {letter for _, letter in found} <= {"m", "A", "J"}
    assert {parameters for parameters, letter in found if letter == "J"} == {""}  # 2J would clear the screen


def test_a_thought_is_dimmed_and_not_markdown(show):
    person = show(list("<think>\nIs **it**?\n</think>\n\nIt **is**."))
    assert person.lines == ["Is **it**?", "", "It is.", "END"]
    assert b"\x1b[2;3mIs **it**?" in person.raw


def test_a_thought_that_the_chat_format_opens(show):
    assert show(["Is it?\n</th", "ink>\nIt is."], in_thought=True).lines == ["Is it?", "", "It is.", "END"]


def test_an_empty_answer_leaves_nothing(show):
    assert show([]).lines == ["END"]
    assert show(["", "\n\n"]).lines == ["END"]


@pytest.mark.parametrize(
    ("text", "finished"),
    [
        ("one", ""),
        ("one\n\ntwo", ""),  # half a line may yet become anything
        ("one\n\ntwo\n", "one\n\n"),
        ("1. a\n\n2", ""),
        ("1. a\n\n2. b\n", ""),
        ("* a\n\nb\n", "* a\n\n"),
        ("```\na\n\nb\n", ""),
        ("```\na\n```\nb\n", "```\na\n```\n"),
        ("| a |\n", ""),
        ("<think>a\n\nb\n", ""),
        ("<think>a</think>b", "<think>a</think>"),
    ],
)
def test_what_is_finished(text, finished):
    assert split(text) == (finished, text[len(finished) :])
