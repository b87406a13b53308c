"""Models exported for ExecuTorch, and run out of the file: where the extra [executorch] is installed. What is refused
without it is held everywhere.
"""

import io
import json
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from cli import console, exporting_pte, ledger
from cli.main import main
from generate import executorch
from model.device import Bandwidth
from tests.tiny_checkpoint import CONTEXT, VOCAB, write_tiny_checkpoint

RECIPES = {
    "unquantized": None,
    "quantized": '{"linear:a8w4dq": {"skip": ["*.down_proj"]}, "embedding": {"bitwidth": 4, "groupsize": 32}}',
}
"""Groups of 32 do not divide the tiny model's down_proj, which so is a layer that stays."""
needs_executorch = pytest.mark.skipif(find_spec("executorch") is None, reason="the extra [executorch] is not installed")


class Done(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def run(capsys: Any, monkeypatch: pytest.MonkeyPatch, warm: Path) -> Iterator[Run]:
    """A command in this process. said: on stdin."""
    monkeypatch.setenv("TORCHCHAT_CACHE_DIR", str(warm))
    monkeypatch.setattr(ledger, "known_bandwidth", lambda device, directory, say: Bandwidth(20.0, 10.0))
    console.cache_dir_or_say.cache_clear()

    def run(*argv: object, said: str = "") -> Done:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said.encode())))
        capsys.readouterr()
        return Done(main(list(map(str, argv))), *capsys.readouterr())

    yield run
    console.cache_dir_or_say.cache_clear()


def refused(done: Done) -> str:
    assert (done.code, done.out) == (2, "")
    assert done.err.count("\n") == 1, done.err
    return done.err.removeprefix("torchchat: error: ")


@pytest.fixture(scope="module")
def files(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What a recipe's export gives: seconds each, once."""
    directory = tmp_path_factory.mktemp("files")

    def file(name: str) -> Path:
        path, recipe = directory / f"{name}.pte", RECIPES[name]
        if not path.exists():
            flags = [] if recipe is None else ["--quantize", recipe]
            assert main(["export", str(model), *flags, "--output-pte-path", str(path)]) == 0
            assert [other.name for other in directory.iterdir() if other.suffix != ".pte"] == []
        return path

    return file


@needs_executorch
@pytest.mark.slow
class TestPrograms:
    @pytest.mark.parametrize("name", RECIPES)
    def test_the_tokens_are_those_of_the_eager_model(
        self, name: str, model: Path, files: Callable[[str], Path], run: Run
    ) -> None:
        recipe = RECIPES[name]
        customized = ["--dtype", "fp32", "--device", "cpu", *(["--quantize", recipe] if recipe is not None else [])]
        flags = ("--temperature", "0", "--max-new-tokens", 24, "--json", "--num-samples", 2)
        for prompt in ("a", "The quick brown fox jumps over the lazy dog."):
            ours = run("generate", "--pte-path", files(name), "--prompt", prompt, *flags)
            theirs = run("generate", model, *customized, "--prompt", prompt, *flags)
            ours, theirs = json.loads(ours.out), json.loads(theirs.out)
            assert ours["samples"] == theirs["samples"]
            assert len(ours["samples"][0]["token_ids"]) > 8
            assert ours["settings"]["quantize"] == theirs["settings"]["quantize"]
            assert (ours["settings"]["dtype"], ours["settings"]["device"]) == ("fp32", "cpu")

    def test_a_conversation_goes_as_with_the_eager_model(
        self, model: Path, files: Callable[[str], Path], run: Run
    ) -> None:
        flags = ("--temperature", "0", "--max-new-tokens", 6)
        said = "Hi!\nAnd again?\nOnce more.\n"
        ours = run("chat", files("unquantized"), *flags, said=said)
        assert ours.code == 0
        assert "was exported from" in ours.err
        assert "· ExecuTorch ·" in ours.err
        assert ours.out == run("chat", model, "--dtype", "fp32", "--device", "cpu", *flags, said=said).out

    def test_what_was_exported_stays_so(self, files: Callable[[str], Path], run: Run) -> None:
        path = files("unquantized")
        for flags, error in (
            (["--dtype", "fp32"], "--dtype: unquantized.pte was exported in fp32, which stays so"),
            (["--compile"], "--compile: unquantized.pte was exported compiled, which stays so"),
            (["--max-seq-len", "64"], f"was exported with a context of {CONTEXT}, which stays so"),
            (["--quantize", '{"linear:int8": {}}'], "was exported unquantized, which stays so"),
            (["--explain"], "--explain: "),
        ):
            assert error in refused(run("generate", "--pte-path", path, "--prompt", "a", *flags))
        assert "generate and chat alone run" in refused(run("export", path, "--output-pte-path", "again.pte"))

    def test_a_file_that_is_cut_short_or_not_ours_is_refused(
        self, files: Callable[[str], Path], run: Run, tmp_path: Path
    ) -> None:
        whole = files("unquantized").read_bytes()
        path = tmp_path / "bad.pte"
        for data, error in (
            (whole[: len(whole) // 2], f"is cut short: it has {len(whole) // 2} bytes of"),
            (whole[:10], "is no program of ExecuTorch's"),
            (b"PK\x03\x04" + bytes(100), "is no program of ExecuTorch's"),
            (whole.replace(b"facts.json", b"fects.json"), "is damaged: what it says of its model cannot be read"),
        ):
            path.write_bytes(data)
            assert refused(run("generate", "--pte-path", path, "--prompt", "a")).startswith(f"{path}: {error}")

    def test_a_program_of_others_is_refused(self, run: Run, tmp_path: Path) -> None:
        from executorch.exir import to_edge

        path = tmp_path / "other.pte"
        exported = torch.export.export(torch.nn.ReLU(), (torch.zeros(1),))
        path.write_bytes(to_edge(exported).to_executorch().buffer)
        assert "was not exported by torchchat" in refused(run("generate", "--pte-path", path, "--prompt", "a"))

    def test_what_disagrees_is_not_written(
        self, model: Path, files: Callable[[str], Path], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lowered = files("unquantized").read_bytes()
        made = SimpleNamespace(write_to_file=lambda file: file.write(lowered))
        monkeypatch.setattr(exporting_pte, "lower", lambda *_: made)
        plain, wrong = executorch.Program.forward, torch.arange(VOCAB) / 100
        monkeypatch.setattr(executorch.Program, "forward", lambda *args: plain(*args) + wrong)
        path = tmp_path / "model.pte"
        path.write_bytes(b"before")
        done = run("export", model, "--output-pte-path", path)
        assert done.code == 2
        assert "gives logits other than the eager model" in done.err
        assert [other.name for other in tmp_path.iterdir()] == ["model.pte"]
        assert path.read_bytes() == b"before"


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--quantize", '{"linear:int8": {}}'], "XNNPACK has no kernel for linear:int8; it has for linear:a8w4dq and"),
        (["--quantize", '{"linear:a8w4dq": {}}'], "groups that divide a row, and 32 does not divide 48"),
        (["--dtype", "bf16"], "--dtype bf16: --output-pte-path writes for fp32 alone"),
        (["--device", "cuda"], "--device cuda: --output-pte-path writes for cpu alone"),
        (["--max-num-seqs", "2"], "--output-pte-path is in fp32, for the CPU and one sequence at a time: "),
        (["--output-snapshot-path", "x"], "leave out --output-snapshot-path, or export twice"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    flags: list[str], error: str, model: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executorch, "find_spec", lambda name: True)
    assert error in refused(run("export", model, "--output-pte-path", tmp_path / "model.pte", *flags))
    assert not list(tmp_path.iterdir())


def test_without_executorch_one_line_says_how_to_get_it(
    model: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executorch, "find_spec", lambda name: None)
    path = tmp_path / "model.pte"
    error = "a .pte file needs ExecuTorch, which is not installed here: pip install 'torchchat[executorch]'"
    assert refused(run("export", model, "--output-pte-path", path)).startswith(error)
    path.write_bytes(b"")
    assert refused(run("generate", "--pte-path", path, "--prompt", "a")).startswith(error)


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (("server", "model.pte"), "MODEL model.pte: generate and chat alone run a program of ExecuTorch's"),
        (("generate", "m", "--pte-path", "a.pte", "--prompt", "a"), "MODEL m and --pte-path a.pte both name a model"),
        (("generate", "--pte-path", "a.pt2", "--prompt", "a"), "--pte-path a.pt2: is no program of ExecuTorch's"),
        (("export", "--output-pte-path", "model"), "--output-pte-path model: give it a name that ends in .pte"),
    ],
)
def test_a_mistake_is_one_line(argv: tuple[str, ...], error: str, run: Run) -> None:
    assert refused(run(*argv)).startswith(error)
