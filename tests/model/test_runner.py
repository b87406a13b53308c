"""The C++ program that chats with a package, held against `torchchat` on the same one. It is built here, with the torch
that is installed, and run with nothing of Python in its environment.
"""

import io
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cli import console
from cli.main import main
from config.compiler import cxx_compiler
from model.export import LINES, ROOT

SOURCES = Path(__file__).parent.parent.parent / "model" / "runner"
MESSAGES = [
    "Hi! Who are you?",
    "  Tell me a story about  a fox.  ",
    "Ünïcödé, 日本語, 🦊 \u2581 and <s> or <|user|>?",
    "1234567890 times",
]
Torchchat = Callable[..., str]


def cmake() -> str:
    """Of the machine, or of the package of this name beside this Python."""
    found = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip("no cmake here: pip install cmake, or Debian's cmake")
    return found


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten seconds of compiling, once."""
    try:
        compiler = cxx_compiler()
    except FileNotFoundError:
        pytest.skip("no C++ compiler here")
    build = tmp_path_factory.mktemp("runner")
    prefix = torch.utils.cmake_prefix_path
    options = (f"-DCMAKE_PREFIX_PATH={prefix}", f"-DCMAKE_CXX_COMPILER={compiler}", "-DCMAKE_CXX_FLAGS=-Werror")
    for command in ([cmake(), "-S", SOURCES, "-B", build, *options], [cmake(), "--build", build]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "runner"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory, warm: Path) -> Iterator[Path]:
    """The built-in model's, compiled: half a minute, unless another test did it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHCHAT_CACHE_DIR", str(warm))
        console.cache_dir_or_say.cache_clear()
        path = tmp_path_factory.mktemp("packages") / "stories.pt2"
        assert main(["export", "--output-aoti-package-path", str(path)]) == 0
        yield path
    console.cache_dir_or_say.cache_clear()


@pytest.fixture
def torchchat(package: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> Torchchat:
    def run(command: str, *flags: object, said: str = "") -> str:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said.encode())))
        capsys.readouterr()
        assert main([command, str(package), "--temperature", "0", *map(str, flags)]) == 0
        out: str = capsys.readouterr().out
        return out

    return run


def run(runner: Path, *arguments: object, said: str = "") -> "subprocess.CompletedProcess[str]":
    """The program, with an empty environment but for how many threads it may have."""
    threads = {name: value for name, value in os.environ.items() if name == "OMP_NUM_THREADS"}
    return subprocess.run(
        [runner, *map(str, arguments)], input=said, env=threads, cwd="/", capture_output=True, text=True, timeout=480
    )


def test_it_is_under_300_lines() -> None:
    files = [path for path in SOURCES.iterdir() if path.suffix in (".cpp", ".h")]
    assert sum(len(path.read_text().splitlines()) for path in files) < 300


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for libraries and processors")
class TestRunner:
    def test_its_answer_is_that_of_generate(self, runner: Path, package: Path, torchchat: Torchchat) -> None:
        expected = torchchat("generate", "--chat", "--prompt", MESSAGES[1])
        done = run(runner, package, said=MESSAGES[1] + "\n")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == expected
        assert len(done.stdout) > 200

    def test_a_conversation_goes_as_in_chat(self, runner: Path, package: Path, torchchat: Torchchat) -> None:
        """With text that no piece of the vocabulary holds, and special tokens that are spelled out."""
        said = "".join(f"{message}\n" for message in MESSAGES)
        expected = torchchat("chat", "--max-new-tokens", 24, said=said)
        done = run(runner, package, "--max-new-tokens", 24, said=said)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == expected
        assert done.stdout.count("\n") >= len(MESSAGES)

    def test_a_full_context_is_begun_anew(self, runner: Path, package: Path) -> None:
        story = "Once upon a time there was a little fox. " * 60
        done = run(runner, package, "--max-new-tokens", 4, said=f"{story}\n{story}\n{story}\n")
        first, *others = done.stdout.splitlines()
        assert others == [first, first]
        assert done.stderr.count("the context is full") == 2
        refused = run(runner, package, said=story * 10)
        assert (refused.returncode, refused.stderr) == (2, "runner: the message does not fit in the context\n")

    def test_a_seed_fixes_what_a_temperature_draws(self, runner: Path, package: Path) -> None:
        answers = [
            run(runner, package, "--temperature", 1.5, "--seed", seed, said="Tell me a story.\n").stdout
            for seed in (1, 1, 2)
        ]
        assert answers[0] == answers[1] != answers[2]

    def test_no_python_is_in_it(self, runner: Path) -> None:
        done = subprocess.run(["ldd", runner], capture_output=True, text=True, check=True)
        libraries = [line.split()[0] for line in done.stdout.splitlines()]
        assert any(name.startswith("libtorch_cpu") for name in libraries)
        assert not any("python" in name for name in libraries)

    def test_what_it_cannot_run_is_refused_in_a_line(self, runner: Path, package: Path, tmp_path: Path) -> None:
        for changes, error in (
            ({"torch ": "torch 1.0.0"}, "was exported with torch 1.0.0, and this program has "),
            ({"instructions ": "instructions avx1024"}, "needs a processor with avx1024"),
            ({"form ": "form artifact"}, "needs Python to run"),
            ({"torchchat-package ": "torchchat-package 2"}, "needs Python to run"),
            ({"tokenizer ": "tokenizer huggingface"}, "its tokenizer needs Python: use torchchat chat"),
            ({"chat_begin ": "other"}, "its chat_begin needs Python: use torchchat chat"),
        ):
            path = changed(package, tmp_path / "changed.pt2", changes)
            done = run(runner, path, said="Hi!\n")
            assert (done.returncode, done.stdout) == (2, "")
            assert done.stderr.startswith(f"runner: {path}: {error}")
            assert done.stderr.count("\n") == 1

    @pytest.mark.parametrize(
        ("arguments", "error"),
        [
            ((), "usage: runner FILE.pt2 [--temperature T] [--seed S] [--max-new-tokens N]"),
            (("/none.pt2",), "/none.pt2: cannot be read as a package: is it there, and whole?"),
            ((__file__,), f"{__file__}: cannot be read as a package: is it there, and whole?"),
            (("a.pt2", "--seed"), "--seed takes a number >= 0"),
            (("a.pt2", "--temperature", "-1"), "--temperature takes a number >= 0"),
            (("a.pt2", "--top-k", "3"), "--top-k is unknown"),
            (("a.pt2", "b.pt2"), "b.pt2 is unknown"),
        ],
    )
    def test_a_mistake_is_one_line_and_2(self, runner: Path, arguments: tuple[str, ...], error: str) -> None:
        done = run(runner, *arguments)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"runner: {error}\n")


def changed(package: Path, path: Path, lines: dict[str, str]) -> Path:
    """A package with other lines in place of those that begin so."""
    with zipfile.ZipFile(package) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename == ROOT + LINES:
                found = data.decode().splitlines()
                for begin, line in lines.items():
                    assert sum(text.startswith(begin) for text in found) == 1
                    found = [line if text.startswith(begin) else text for text in found]
                data = "\n".join(found).encode()
            new.writestr(entry.filename, data)
    return path
