"""What reaches a terminal, a pipe, and a terminal without colours."""

import io
from types import SimpleNamespace

import pytest
import torch

from cli import console
from cli.console import Progress, TextWriter, cache_dir_or_say, describe_build, has_colour, human_bytes, status, warn
from config.settings import BuildSettings
from model.device import DeviceChoice, DtypeChoice


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """A terminal with colours in the place of stderr. (pytest sets the real sys.stderr anew after the fixtures.)"""
    stream = Terminal()
    monkeypatch.setattr(console, "sys", SimpleNamespace(stderr=stream))
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    return stream


def test_a_model_cannot_steer_a_terminal_and_a_pipe_gets_what_it_said():
    text = "a\x1b[2Jb\r\x9bc\n\tü€😀"
    terminal, pipe = Terminal(), io.StringIO()
    TextWriter(terminal).write(text)
    TextWriter(pipe).write(text)
    assert terminal.getvalue() == "a�[2Jb��c\n\tü€😀"
    assert pipe.getvalue() == text


def test_a_line_is_ended_once():
    stream = io.StringIO()
    writer = TextWriter(stream)
    writer.end_line()
    for piece in ("one", "", "\n"):
        writer.write(piece)
    writer.end_line()
    writer.write("two")
    writer.end_line()
    writer.end_line()
    assert stream.getvalue() == "one\ntwo\n"


def test_lines_for_a_person_are_single_lines(terminal):
    warn("a\nb\x1b")
    assert terminal.getvalue() == "torchchat: a b�\n"


def test_colours_only_where_they_are_welcome(terminal, monkeypatch):
    status("x")
    assert terminal.getvalue() == "\x1b[2mtorchchat: x\x1b[0m\n"
    assert not has_colour(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not has_colour(terminal)
    monkeypatch.setenv("NO_COLOR", "")
    assert has_colour(terminal)
    monkeypatch.setenv("TERM", "dumb")
    assert not has_colour(terminal)


def test_a_missing_cache_is_said_once(terminal, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHCHAT_CACHE_DIR", str(tmp_path / "file"))
    cache_dir_or_say.cache_clear()
    assert cache_dir_or_say() is cache_dir_or_say() is None
    assert terminal.getvalue().count("nothing is kept between runs: ") == 1
    monkeypatch.setenv("TORCHCHAT_CACHE_DIR", str(tmp_path))
    cache_dir_or_say.cache_clear()
    assert cache_dir_or_say() == tmp_path
    cache_dir_or_say.cache_clear()


def test_progress_is_one_line_that_is_gone_at_the_end(terminal, monkeypatch):
    clock = iter([0.0, 0.05, 0.2, 0.25, 1.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with Progress("loading", 4) as progress:
        for _ in range(4):
            progress.advance()
    shown = terminal.getvalue()
    assert [part.split("\x1b")[0] for part in shown.split("\r")[1:]] == [
        "loading ████████████░░░░░░░░░░░░ 2/4",
        "loading ████████████████████████ 4/4",
        "",
    ]
    assert shown.endswith("\r\x1b[K")
    assert "\n" not in shown


def test_what_is_short_and_what_is_no_terminal_shows_no_progress(terminal, monkeypatch):
    with Progress("loading", 1) as progress:
        progress.advance()
    assert terminal.getvalue() == ""
    pipe = io.StringIO()
    monkeypatch.setattr(console, "sys", SimpleNamespace(stderr=pipe))
    monkeypatch.setattr(console.time, "monotonic", iter(range(100)).__next__)
    with Progress("loading", 1) as progress:
        progress.advance()
    assert pipe.getvalue() == ""


def test_progress_in_bytes_says_the_rate():
    progress = Progress("loading", 4_000_000, in_bytes=True)
    progress.advance(1_000_000)
    assert progress.line(0.5) == "loading ██████░░░░░░░░░░░░░░░░░░ 1 MB of 4 MB, 2 MB/s"
    assert Progress("nothing", 0).line(0.0).endswith("0/0")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (999.7, "1 kB"), (15_340_000, "15.3 MB"), (2.05e9, "2.05 GB"), (3e15, "3e+03 TB")],
)
def test_bytes_for_people(count, text):
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("settings", "end"),
    [
        ({}, "eager · unquantized"),
        ({"compile": True}, "compiled decode · unquantized"),
        ({"compile_prefill": True}, "compiled prefill · unquantized"),
        ({"compile": True, "compile_prefill": True}, "compiled decode and prefill · unquantized"),
    ],
)
def test_one_line_says_what_was_chosen_and_why(settings, end):
    device = DeviceChoice(torch.device("cpu"), "fast: no cuda, no mps")
    dtype = DtypeChoice(torch.float32, "fp32", "--dtype")
    line = describe_build(BuildSettings("mine", **settings), device, dtype)
    assert line == f"mine · cpu (fast: no cuda, no mps) · fp32 (--dtype) · {end}"
