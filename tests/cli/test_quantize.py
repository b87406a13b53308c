"""The command `quantize` as a person and as a script meet it, and what its directory then is to the others."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cli import console, ledger
from cli.main import main
from cli.quantize import HELD_OUT, MAX_RECEIPT_TOKENS
from model.default.corpus import TINY_SOURCES, is_held_out, read_corpus
from model.device import Bandwidth
from tests.tiny_checkpoint import write_tiny_checkpoint

ROOT = Path(__file__).parent.parent.parent
INT8 = '{"linear:int8": {}}'


class Done(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def run(capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """A command in this process; the machine's bandwidth is taken as known."""
    monkeypatch.setenv("TORCHCHAT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(ledger, "known_bandwidth", lambda device, directory, say: Bandwidth(20.0, 10.0))
    console.cache_dir_or_say.cache_clear()

    def run(*argv: object) -> Done:
        capsys.readouterr()
        return Done(main(list(map(str, argv))), *capsys.readouterr())

    return run


@pytest.fixture
def quantize(run: Run, tiny: Path, tmp_path: Path) -> Run:
    """`quantize` of the tiny model into `out`."""

    def quantize(*argv: object, output: object = tmp_path / "out", model: object = tiny) -> Done:
        return run("quantize", model, "--device", "cpu", "--output", output, *argv)

    return quantize


def refused(done: Done) -> str:
    assert done.code == 2, done
    assert done.out == ""
    assert done.err.count("\n") == 1, done.err
    assert done.err.startswith("torchchat: error: ")
    return done.err


def test_what_it_says(quantize: Run, tmp_path: Path) -> None:
    done = quantize("--quantize", INT8)
    assert done.code == 0, done.err
    head, *receipt = done.out.splitlines()
    assert head.startswith(f"{tmp_path / 'out'}: ")
    assert "of weights" in head
    assert [line.split()[0] for line in receipt] == ["perplexity", "KL", "on"]
    assert "of 10 held-out TinyStories (sha256 " in receipt[2]
    assert "linear:int8 (9 layers)" in done.err
    assert "quantized in" in done.err
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["out"]


def test_the_document(quantize: Run, tmp_path: Path) -> None:
    done = quantize("--quantize", INT8, "--dtype", "fp32", "--json")
    document = json.loads(done.out)
    assert set(document) == {
        *(
            "output",
            "settings",
            "weight_bytes",
            "unquantized_bytes",
            "file_bytes",
            "quantize_s",
            "receipt_s",
            "total_s",
        ),
        *("peak_memory_bytes", "receipt"),
    }
    assert document["settings"] | {"model": ""} == {
        "model": "", "device": "cpu", "dtype": "fp32", "quantize": {"linear:int8": {"groupsize": 0}}
    }  # fmt: skip
    assert document["file_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert document["weight_bytes"] < document["file_bytes"] < document["unquantized_bytes"]
    assert document["receipt"]["tokens"] == MAX_RECEIPT_TOKENS
    assert document["receipt"] == json.loads((tmp_path / "out" / "torchchat.json").read_text())["receipt"]


def test_generate_and_bench_take_the_directory_as_any_model(
    run: Run, quantize: Run, tiny: Path, tmp_path: Path
) -> None:
    assert quantize("--quantize", "cpu-small", "--dtype", "fp32", "--no-receipt").code == 0
    asked = ("--seed", 3, "--max-new-tokens", 12, "--json", "--device", "cpu")
    fresh = json.loads(run("generate", tiny, "--quantize", "cpu-small", "--dtype", "fp32", *asked).out)
    done = run("generate", tmp_path / "out", *asked)
    loaded = json.loads(done.out)
    assert loaded["samples"] == fresh["samples"]
    assert loaded["settings"] | {"model": ""} == fresh["settings"] | {"model": ""}
    assert loaded["stats"]["quantize_s"] == 0
    assert "· fp32 (fast: as stored) · eager · quantized: embedding (1 layer), linear:int4 (8 layers)" in done.err
    assert json.loads(run("generate", tmp_path / "out", *asked, "--chat").out)["samples"][0]["token_ids"]
    bench = run(
        "bench", tmp_path / "out", "--device", "cpu", "--repeats", 1, "--prefill-tokens", 4, "--context", 8, "--json"
    )
    assert json.loads(bench.out)["settings"]["quantize"] == fresh["settings"]["quantize"]
    shapes = (
        "--random-weights",
        tmp_path / "out",
        "--device",
        "cpu",
        "--dtype",
        "bf16",
        "--prefill-tokens",
        4,
        "--context",
        8,
    )
    assert json.loads(run("bench", *shapes, "--repeats", 1, "--json").out)["settings"]["quantize"] is None


def test_another_dtype_is_said(run: Run, quantize: Run, tmp_path: Path) -> None:
    assert quantize("--quantize", INT8, "--dtype", "bf16", "--no-receipt").code == 0
    done = run("generate", tmp_path / "out", "--device", "cpu", "--dtype", "fp32", "--max-new-tokens", 3)
    assert done.code == 0
    assert "fp32 (--dtype; stored in bf16)" in done.err


@pytest.mark.parametrize("source", ["flag", "variable"])
def test_a_quantized_model_is_not_quantized_again(
    run: Run, quantize: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    assert quantize("--quantize", INT8, "--no-receipt").code == 0
    flags: tuple[str, ...] = ("--quantize", "cpu")
    if source == "variable":
        monkeypatch.setenv("TORCHCHAT_QUANTIZE", "cpu")
        flags = ()
    for argv in (("generate",), ("quantize", "--output", tmp_path / "again")):
        says = refused(run(argv[0], tmp_path / "out", *argv[1:], "--device", "cpu", *flags))
        assert f"{'--quantize' if flags else 'TORCHCHAT_QUANTIZE'} cpu: {tmp_path / 'out'} is quantized already" in says
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ((), "--quantize: a recipe is needed; give one, such as --quantize cpu"),
        (("--quantize", "{}"), "--quantize: the recipe quantizes nothing"),
        (("--quantize", '{"precision": "bf16"}'), "--quantize: the recipe quantizes nothing"),
        (("--quantize", '{"linear:int4": {"groupsize": 7}}'), "the nearest is 32"),
        (("--quantize", "cpu", "--compile"), "unknown option --compile"),
        (("--quantize", "cpu", "--max-seq-len", "3"), "unknown option --max-seq-len"),
        (("--quantize", "cpu", "--receipt-text", "nowhere.txt"), "--receipt-text nowhere.txt: cannot be read"),
        (("--quantize", "cpu", "--receipt-text", "x", "--no-receipt"), "contradict each other"),
    ],
)
def test_mistakes_are_one_line(quantize: Run, tmp_path: Path, argv: tuple[str, ...], says: str) -> None:
    assert says in refused(quantize(*argv))
    assert not (tmp_path / "out").exists()


def test_output_is_needed(run: Run) -> None:
    assert "--output" in refused(run("quantize", "--quantize", "cpu"))


def test_outputs_that_cannot_be_are_told_before_the_model_is_looked_for(
    quantize: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for output, says in (
        (tmp_path / "file", "is a file; name a new directory"),
        (tmp_path / "full", "is not empty"),
        (".", "is in use itself"),
        (tmp_path / "no" / "where", f"there is no directory {tmp_path / 'no'}"),
        ("/proc", "is not empty"),
        ("x" * 5000, "cannot be a directory"),
    ):
        assert says in refused(quantize("--quantize", "cpu", output=output, model="no-such-model")), output
    assert (tmp_path / "full" / "x").read_text() == "mine"


def test_an_empty_directory_and_a_relative_one_will_do(quantize: Run, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "new"):
        assert quantize("--quantize", INT8, "--no-receipt", output=name).code == 0
        assert (tmp_path / name / "torchchat.json").is_file()
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o777 & ~mask


def test_a_text_of_one_s_own(quantize: Run, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes("Über den Wolken … \n".encode() * 3)
    receipt = json.loads(quantize("--quantize", INT8, "--receipt-text", file, "--json").out)["receipt"]
    assert receipt["text"] == "text.txt"
    assert receipt["text_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert receipt["tokens"] == len(file.read_bytes())  # a byte is a token
    for data, says in ((b"\xff\xfe", "byte 0 is not UTF-8"), (b"", "has no two tokens")):
        file.write_bytes(data)
        assert says in refused(quantize("--quantize", INT8, "--receipt-text", file, output=tmp_path / "other"))


def test_a_model_without_a_tokenizer_has_no_receipt(quantize: Run, tmp_path: Path) -> None:
    model = write_tiny_checkpoint(tmp_path / "model")
    (model / "tokenizer.json").unlink()
    done = quantize("--quantize", INT8, "--json", model=model)
    assert json.loads(done.out)["receipt"] is None
    assert "no quality receipt" in done.err
    (tmp_path / "text").write_text("text")
    asked = ("--quantize", INT8, "--receipt-text", tmp_path / "text")
    assert "has no tokenizer to read it with" in refused(quantize(*asked, output=tmp_path / "other", model=model))


def test_the_default_text_was_held_out_of_the_training() -> None:
    unseen = [e.messages[0][1] for e in read_corpus() if e.source == TINY_SOURCES[0] and is_held_out(e)]
    assert json.loads(HELD_OUT.read_text())["texts"] == unseen[:10]


def test_what_an_interrupted_run_left_is_pointed_out(quantize: Run, tmp_path: Path) -> None:
    (tmp_path / ".out.12345678.partial").mkdir()
    done = quantize("--quantize", INT8, "--no-receipt")
    assert f"{tmp_path / '.out.12345678.partial'} is left from a run that was interrupted" in done.err


SLOW_WRITER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from cli.main import main
from model.saved import TensorWriter
write, count = TensorWriter.write, 0
def slow(self, name, blocks):
    global count
    write(self, name, blocks)
    count += 1
    if count == 9:
        print("in the middle", flush=True)
        time.sleep(60)
TensorWriter.write = slow
sys.exit(main(sys.argv[2:]))
"""


# Slow: a process for each, which imports torchao.
@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_write_leaves_nothing_that_loads(
    run: Run, tiny: Path, tmp_path: Path, how: signal.Signals
) -> None:
    argv = ["quantize", tiny, "--quantize", INT8, "--device", "cpu", "--output", tmp_path / "out", "--no-receipt"]
    command = [sys.executable, "-c", SLOW_WRITER, ROOT, *argv]
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in the middle\n"
        process.send_signal(how)
        process.wait(timeout=120)
    left = [path for path in tmp_path.iterdir() if path.name != "cache"]
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert left == []
    else:
        assert [path.suffix for path in left] == [".partial"]
        assert refused(run("generate", left[0], "--device", "cpu"))
        assert refused(run("generate", left[0] / "model.safetensors", "--device", "cpu"))
    assert not (tmp_path / "out").exists()


# Slow: two processes, as a person starts them.
@pytest.mark.slow
def test_the_built_in_model_in_seconds(tmp_path: Path, warm: Path) -> None:
    def program(*argv: object) -> Any:
        done = subprocess.run(
            [sys.executable, str(ROOT / "torchchat.py"), *map(str, argv), "--json"],
            env=os.environ | {"TORCHCHAT_CACHE_DIR": str(warm)},
            capture_output=True, text=True, timeout=480, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    made = program("quantize", "--quantize", "cpu", "--dtype", "bf16", "--device", "cpu", "--output", tmp_path / "out")
    receipt = made["receipt"]
    assert 10 < receipt["perplexity_unquantized"] < 13
    assert receipt["perplexity"] == pytest.approx(receipt["perplexity_unquantized"], rel=0.005)
    assert receipt["kl_divergence"] < 0.005
    assert receipt["top1_agreement"] > 0.95
    story = program("generate", tmp_path / "out", "--max-new-tokens", 20, "--temperature", 0, "--device", "cpu")
    assert story["samples"][0]["text"].startswith(", there was a little")
