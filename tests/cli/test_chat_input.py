"""What is typed, or piped: where a message ends, what is a command, what a script's lines are."""

import io

import pytest

from cli.chat_input import MAX_BYTES, Script, Typed, is_open, parse
from config.errors import UserError


@pytest.mark.parametrize(
    ("text", "typed"),
    [
        ("hello", Typed(None, "hello")),
        ("  indented\n", Typed(None, "  indented")),
        ("/help", Typed("help", "")),
        ("/SAVE a file.json ", Typed("save", "a file.json")),
        ("/set  top_k   5", Typed("set", "top_k   5")),
        ("/", Typed("", "")),
        ("/?", Typed("?", "")),
        (" /tmp is full", Typed(None, " /tmp is full")),
        ("/usr/bin is full", Typed(None, "/usr/bin is full")),
        ("// a comment", Typed(None, "// a comment")),
        ("/*", Typed(None, "/*")),
        ('"""one"""', Typed(None, "one")),
        ('"""\none\n two\n"""', Typed(None, "one\n two")),
        ('"""/help"""', Typed(None, "/help")),
        ('""""""', Typed(None, "")),
        ('"""say """ twice"""', Typed(None, 'say """ twice')),
        ('/system """\nBe brief.\nBe kind.\n"""', Typed("system", "Be brief.\nBe kind.")),
        ('he said """so', Typed(None, 'he said """so')),
    ],
)
def test_what_a_text_means(text, typed):
    assert not is_open(text)
    assert parse(text) == typed


@pytest.mark.parametrize("text", ['"""', '"""one', '"""one\ntwo', '  """', '/system """Be', '"""a""" b', '"""""'])
def test_three_quotes_are_open_until_they_end_a_line(text):
    assert is_open(text)
    with pytest.raises(UserError, match="nothing closes it"):
        parse(text)
    assert not is_open(text + '\n"""')


def read_all(data: bytes) -> list[str]:
    script, found = Script(io.BytesIO(data)), []
    while True:
        try:
            found.append(script.read())
        except EOFError:
            return found
        except UserError as error:
            found.append(f"error: {error}")


def test_a_script_s_lines_and_blocks():
    data = b'\xef\xbb\xbfone\r\n\ntwo\n"""\nthree\r\n\n"""\n/system """a\nb"""\nlast'
    assert read_all(data) == ["one", "", "two", '"""\nthree\n\n"""', '/system """a\nb"""', "last"]


def test_a_block_that_the_end_cuts_off_is_refused_where_it_is_parsed():
    (text,) = read_all(b'"""\nnever\nclosed\n')
    with pytest.raises(UserError, match="nothing closes it"):
        parse(text)


def test_a_line_that_cannot_be_read_does_not_take_the_next_along():
    assert read_all(b"a\nb\xff\nc\n") == ["a", "error: line 2: not UTF-8 text (byte 1)", "c"]


def test_a_line_has_a_bound(monkeypatch):
    monkeypatch.setattr("cli.chat_input.MAX_BYTES", 10)
    assert MAX_BYTES > 10
    found = read_all(b"x" * 1000 + b"\nshort\n")
    assert found[0].startswith("error: line 1: more than")
    assert found[1:] == ["short"]
