"""A command line from outside: which command runs, how a mistake is told, what the exit code is."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from cli import main as main_module
from cli.main import main
from config import __version__
from config.errors import UserError

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def command(monkeypatch):
    """A command named "try" that records its arguments and does what `command.act` says."""
    runner = ModuleType("a_runner_for_a_test")
    runner.seen = []
    runner.act = lambda args: 0

    def add_arguments(parser):
        parser.add_argument("--max-new-tokens", type=int)
        parser.add_argument("--prompt")

    def run(args):
        runner.seen.append(args)
        return runner.act(args)

    runner.add_arguments, runner.run = add_arguments, run
    monkeypatch.setitem(sys.modules, runner.__name__, runner)
    monkeypatch.setitem(main_module.COMMANDS, "try", ("try something", runner.__name__))
    return runner


def one_error_line(capsys):
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("torchchat: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("flag", ["--max-new-tokens", "--max_new_tokens"])
def test_a_command_runs_with_either_spelling(command, flag):
    assert main(["try", flag, "3", "--prompt", "a_b"]) == 0
    assert (command.seen[0].max_new_tokens, command.seen[0].prompt) == (3, "a_b")


def test_the_exit_code_is_the_runner_s(command):
    command.act = lambda args: 7
    assert main(["try"]) == 7


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "which command?"),
        (["genrate"], "did you mean 'generate'?"),
        (["zzz"], "unknown command 'zzz'; torchchat --help"),
        (["--compile", "generate"], "the command comes before its options"),
        (["try", "--max-new-token", "3"], "unknown option --max-new-token; did you mean '--max-new-tokens'?"),
        (["try", "--max_new_token=3"], "did you mean '--max-new-tokens'?"),
        (["try", "--max-new-tokens"], "--max-new-tokens: expected one argument"),
        (["try", "--max-new-tokens", "many"], "--max-new-tokens: invalid int value: 'many'"),
        (["try", "--max-new-tokens", "9" * 6000], "--max-new-tokens: invalid int value"),
        (["try", "once", "upon"], "unexpected argument 'once'"),
        (["try", "--prompt", "x", "two\nlines"], "unexpected argument 'two lines'"),
    ],
)
def test_a_mistake_is_one_line_and_2(command, capsys, argv, says):
    assert main(argv) == 2
    line = one_error_line(capsys)
    assert says in line
    assert "--help" in line
    assert len(line) < 450
    assert command.seen == []


def test_an_error_of_the_runner_is_one_line_without_control_characters(command, capsys):
    def fail(args):
        raise UserError("no\nway \x1b[31mred")

    command.act = fail
    assert main(["try"]) == 2
    assert one_error_line(capsys) == "torchchat: error: no way �[31mred\n"


def test_debug_adds_a_traceback(command, capsys, monkeypatch):
    def fail(args):
        raise UserError("no way")

    command.act = fail
    monkeypatch.setenv("TORCHCHAT_DEBUG", "1")
    assert main(["try"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.endswith("torchchat: error: no way\n")


def test_a_full_disk_is_told_in_the_system_s_words(command, capsys):
    def fail(args):
        raise OSError(28, "No space left on device", "a/file")

    command.act = fail
    assert main(["try"]) == 1
    assert "No space left on device: 'a/file'" in one_error_line(capsys)


def test_a_package_that_is_not_installed_is_one_line(command, capsys):
    def need(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    command.act = lambda args: need("torch")
    assert main(["try"]) == 2
    assert "torch is not installed for" in one_error_line(capsys)
    command.act = lambda args: need("cli.nothing")
    with pytest.raises(ModuleNotFoundError):
        main(["try"])


def test_the_packages_are_those_that_are_installed():
    project = (ROOT / "pyproject.toml").read_text().partition("\ndependencies = [")[2].partition("]")[0]
    assert tuple(re.findall(r'^    "([\w-]+)', project, flags=re.MULTILINE)) == main_module.PACKAGES


def test_our_own_bugs_are_not_hidden(command):
    def fail(args):
        raise ZeroDivisionError

    command.act = fail
    with pytest.raises(ZeroDivisionError):
        main(["try"])


def test_ctrl_c_is_quiet(command, capsys):
    def interrupt(args):
        raise KeyboardInterrupt

    command.act = interrupt
    assert main(["try"]) == 130
    assert capsys.readouterr() == ("", "")


def test_help_and_version(command, capsys):
    assert main(["--help"]) == 0
    assert "try something" in capsys.readouterr().out
    assert main(["try", "--help"]) == 0
    assert "--max-new-tokens" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"torchchat {__version__}\n"


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "20000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_that_wait_go_to_sleep_unless_the_person_decides(command, monkeypatch, given, spins):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that what the command sets is undone
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    command.act = lambda args: command.seen.append(os.environ.get("GOMP_SPINCOUNT")) or 0
    assert main(["try"]) == 0
    assert command.seen[1] == spins


def test_from_outside_in_another_directory(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "torchchat.py", "nothing"], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("torchchat: error: unknown command 'nothing'")
    assert done.stderr.count("\n") == 1


def test_closed_streams_are_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["--help"]) == 0
    assert main(["nothing"]) == 2


def test_a_reader_that_went_away_is_no_error():
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(
            [sys.executable, ROOT / "torchchat.py", "--help"], stdout=write_end, stderr=subprocess.PIPE, timeout=240
        )
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (141, b"")
