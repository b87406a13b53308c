"""The prompt: from a flag, a file or standard input, never by waiting in silence."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli.prompt import DEFAULT_MESSAGE, DEFAULT_PROMPT, add_prompt_arguments, read_prompt
from config.errors import UserError

PROJECT = Path(__file__).parent.parent.parent

READ = """
import argparse
from cli.prompt import add_prompt_arguments, read_prompt
parser = argparse.ArgumentParser()
add_prompt_arguments(parser)
print(repr(read_prompt(parser.parse_args())))
"""


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_prompt_arguments(parser)
    return parser.parse_args(argv)


def start(*argv: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", READ, *argv],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        **options,
    )


def test_a_flag_is_taken_as_it_is() -> None:
    assert read_prompt(parse("--prompt", " two\n lines\n")) == " two\n lines\n"
    assert read_prompt(parse("--prompt", "")) == ""


@pytest.mark.parametrize(
    ("content", "text"),
    [(b"a\nb\n", "a\nb"), (b"a\r\n", "a"), (b"a\n\n", "a\n"), (b"\xef\xbb\xbfa\r", "a\r"), (b"", "")],
)
def test_a_file_loses_one_line_break(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "p").write_bytes(content)
    assert read_prompt(parse("--prompt-file", str(tmp_path / "p"))) == text


def test_what_cannot_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for argv, words in [
        (["--prompt-file", str(tmp_path / "none")], "No such file"),
        (["--prompt-file", str(tmp_path)], "Is a directory"),
        (["--prompt-file", str(tmp_path / "latin")], "not UTF-8 text .byte 3"),
        (["--prompt", "caf\udce9"], "not valid UTF-8"),
        (["--prompt", "a", "--prompt-file", "b"], "leave one out"),
    ]:
        with pytest.raises(UserError, match=words):
            read_prompt(parse(*argv))
    monkeypatch.setattr("cli.prompt.MAX_BYTES", 3)
    with pytest.raises(UserError, match="is no prompt"):
        read_prompt(parse("--prompt-file", str(tmp_path / "latin")))


@pytest.mark.parametrize("argv", [[], ["--prompt", "-"]])
def test_a_pipe_is_read(argv: list[str]) -> None:
    out, err = start(*argv, stdin=subprocess.PIPE).communicate("Es war einmal ein Bär\n")
    assert (out, err) == ("'Es war einmal ein Bär'\n", "")


def test_a_file_on_standard_input_is_read(tmp_path: Path) -> None:
    (tmp_path / "p").write_text("from a file\n")
    with (tmp_path / "p").open() as file:
        out, _ = start(stdin=file).communicate()
    assert out == "'from a file'\n"


def test_a_silent_pipe_is_waited_for_aloud() -> None:
    process = start(stdin=subprocess.PIPE)
    assert process.stderr is not None
    assert "reading the prompt from standard input" in process.stderr.readline()
    out, _ = process.communicate("late")
    assert out == "'late'\n"


def test_input_that_nobody_gives_is_not_waited_for() -> None:
    import socket

    here, there = socket.socketpair()
    with here, there:
        for options in ({"stdin": subprocess.DEVNULL}, {"stdin": there}, {"preexec_fn": lambda: os.close(0)}):
            out, err = start(**options).communicate(timeout=60)
            assert out == f"{DEFAULT_PROMPT!r}\n"
            assert "no --prompt given" in err
    out, err = start("--chat", stdin=subprocess.PIPE).communicate("")  # an empty pipe gives no prompt
    assert out == f"{DEFAULT_MESSAGE!r}\n"


def test_a_dash_with_nothing_to_read_is_refused() -> None:
    for options in ({"stdin": subprocess.DEVNULL}, {"preexec_fn": lambda: os.close(0)}):
        _, err = start("--prompt", "-", **options).communicate()
        assert "UserError: --prompt -:" in err
