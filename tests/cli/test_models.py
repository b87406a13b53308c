"""`list`, `where` and `remove`: what they say is what is there, and nothing goes that was not downloaded. And what is
asked at a terminal before a model is downloaded.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pexpect
import pytest

from cli.list import short_context, short_count
from cli.main import main
from config.registry import entries, find
from quant.receipt import Receipt
from tests.cli.fake_hub import Repository, clean_environment, serve
from tests.tiny_checkpoint import write_tiny_checkpoint

ROOT = Path(__file__).parent.parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "num_attention_heads": 2,
    "num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 10,
}  # fmt: skip
Say = Callable[..., str]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; the current directory is empty too."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TORCHCHAT_MODELS_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "hf" / "hub"


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Runs a command that succeeds; its stdout."""

    def run(*argv: str) -> str:
        assert main(argv) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Say:
    """Runs a command that fails; its one line."""

    def run(*argv: str) -> str:
        assert main(argv) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        return captured.err

    return run


def downloaded(
    cache: Path, hub_id: str, files: dict[str, bytes] | None = None, commit: str = COMMIT, name: str = "main"
) -> Path:
    """A snapshot as downloads leave it, of links to blobs."""
    folder = cache / ("models--" + hub_id.replace("/", "--"))
    for part in ("blobs", f"snapshots/{commit}", "refs"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    contents = files or {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": b"x" * 5000}
    for file, data in contents.items():
        blob = folder / "blobs" / f"{hash((file, data)) & 2**64 - 1:016x}"
        blob.write_bytes(data)
        (folder / "snapshots" / commit / file).symlink_to(f"../../blobs/{blob.name}")
    (folder / "refs" / name).write_text(commit)
    return folder / "snapshots" / commit


def quantized(directory: Path, source: str = "qwen3-8b", *, receipt: bool = True) -> Path:
    directory.mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(b"x" * 1000)
    measured = Receipt("a text", "0" * 64, 100, 11.0, 10.0, 0.01, 0.9, "bf16", "cpu", {"torch": "2"})
    document = {
        "format": 1, "recipe": {"linear:int8": {}}, "dtype": "bf16", "source": source, "versions": {"torch": "2"},
        "receipt": measured.document() if receipt else None,
    }  # fmt: skip
    (directory / "torchchat.json").write_text(json.dumps(document))
    return directory


def test_every_model_of_the_registry_is_listed_once(cache: Path, say: Say) -> None:
    lines = say("list").splitlines()
    names = [line.split()[0] for line in lines if line.startswith("  ") and not line.startswith("  name ")]
    assert sorted(names) == sorted(entry.name for entry in entries())
    gated = {line.split()[0] for line in lines if " * " in line and line.startswith("  ")}
    assert gated == {entry.name for entry in entries() if entry.gated}
    assert max(map(len, lines)) < 120


def test_a_model_that_is_here_moves_to_what_is_here(cache: Path, say: Say) -> None:
    downloaded(cache, "Qwen/Qwen3-8B")
    downloaded(cache, "somebody/their-model")
    text = say("list")
    known, _, here = text.partition("on this machine")
    assert "qwen3-8b " not in known
    assert "qwen3-8b " in here
    assert "somebody/their-model" in here
    assert say("list", "--here") == f"on this machine{here}"


def test_words_choose(cache: Path, say: Say, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line.split()[0] for line in say("list", "Qwen", "CODE").splitlines()[2:] if line]
    assert lines == [entry.name for entry in entries() if entry.name.startswith("qwen") and "coder" in entry.name]
    assert main(["list", "--here", "nothing-like-it"]) == 0
    assert "nothing here has nothing-like-it" in capsys.readouterr().err


def test_json_says_the_same_and_more(cache: Path, say: Say) -> None:
    snapshot = downloaded(cache, "Qwen/Qwen3-8B")
    quantized(Path("copy"))
    document = json.loads(say("list", "--json"))
    assert [entry["name"] for entry in document["known"]] == [entry.name for entry in entries() if entry.hub_id]
    here = {model["name"]: model for model in document["here"]}
    assert set(here) == {"default", "qwen3-8b", "./copy"}
    assert here["qwen3-8b"]["path"] == str(snapshot)
    assert here["qwen3-8b"]["bytes"] >= 5000
    assert here["./copy"]["quantized"]["receipt"]["perplexity"] == 11.0
    assert json.loads(say("list", "--json", "--here"))["known"] == []


def test_quantized_copies_are_shown_with_their_receipts(
    cache: Path, say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized(Path("copy"))
    quantized(tmp_path / "models" / "second", receipt=False)
    quantized(tmp_path / "third" / "model")
    assert "second" not in say("list", "--here")
    monkeypatch.setenv("TORCHCHAT_MODELS_DIR", str(tmp_path / "models"))
    lines = {line.split()[0]: line for line in say("list", "--here", "--in", str(tmp_path / "third")).splitlines()}
    assert 'qwen3-8b, quantized: linear:int8; perplexity +10.00%, top-1 agreement 90.0%' in lines["./copy"]
    assert "not measured" in lines["second"]
    # Every name that is shown is one that the other commands take.
    for name in ("./copy", "second", str(tmp_path / "third" / "model")):
        assert name in lines
        assert Path(say("where", name).strip()).is_dir()


def test_what_is_no_language_model_is_not_listed(
    cache: Path, say: Say, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    downloaded(cache, "somebody/pictures", {"config.json": b'{"model_type": "vit"}', "model.safetensors": b"x"})
    downloaded(cache, "somebody/words", {"tokenizer.json": b"{}"})
    (Path("notes") / "x").mkdir(parents=True)
    (Path("weights")).mkdir()
    (Path("weights") / "model.safetensors").touch()
    damaged = quantized(Path("damaged"))
    (damaged / "torchchat.json").write_text("{")
    assert main(["list", "--here"]) == 0
    captured = capsys.readouterr()
    assert [line.split()[0] for line in captured.out.splitlines()] == ["on", "name", "default"]
    assert "damaged/torchchat.json" in captured.err


def test_a_directory_that_is_not_there_is_one_line(cache: Path, refused: Say) -> None:
    assert "--in absent: is not a directory" in refused("list", "--in", "absent")


def test_where_is_what_the_other_commands_would_load(cache: Path, say: Say, refused: Say) -> None:
    assert say("where", "default") == f"{ROOT / 'model' / 'default'}\n"
    snapshot = downloaded(cache, "Qwen/Qwen3-8B")
    for name in ("qwen3-8b", "QWEN3", "Qwen/Qwen3-8B", f"Qwen/Qwen3-8B@{COMMIT}"):
        assert say("where", name) == f"{snapshot}\n"
    quantized(Path("copy"))
    assert say("where", "copy") == f"{Path('copy').absolute()}\n"
    assert "`torchchat download llama3.1-8b`" in refused("where", "llama3.1")
    assert "required" in refused("where")


def test_what_is_removed_is_gone_and_what_is_not_stays(
    cache: Path, say: Say, refused: Say, capsys: pytest.CaptureFixture[str]
) -> None:
    downloaded(cache, "Qwen/Qwen3-8B")
    other = downloaded(cache, "somebody/their-model")
    assert main(["remove", "qwen3-8b", "--yes"]) == 0
    assert "removed qwen3-8b: 5." in (told := capsys.readouterr().err)
    assert "kB freed" in told
    assert not (cache / "models--Qwen--Qwen3-8B").exists()
    assert say("where", "somebody/their-model") == f"{other}\n"
    assert "nothing to remove" in refused("remove", "qwen3-8b", "--yes")


def test_one_revision_goes_without_what_another_needs(cache: Path, say: Say, refused: Say) -> None:
    old, new = "1" * 40, "2" * 40
    shared = b"x" * 5000
    config = json.dumps(CONFIG).encode()
    downloaded(cache, "a/b", {"config.json": config + b" ", "model.safetensors": shared}, old, "v1")
    kept = downloaded(cache, "a/b", {"config.json": config, "model.safetensors": shared}, new)
    assert "not that revision" in refused("remove", "a/b@v9", "--yes")
    say("remove", "a/b@v1", "--yes")
    assert "is not on this machine" in refused("where", "a/b@v1")
    assert say("where", "a/b") == f"{kept}\n"
    assert (kept / "model.safetensors").read_bytes() == shared


def test_a_download_that_was_never_finished_can_be_removed(cache: Path, say: Say) -> None:
    blobs = cache / "models--Qwen--Qwen3-8B" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "abc.incomplete").write_bytes(b"x" * 100)
    assert "cut off: `torchchat download qwen3-8b` goes on" in say("list", "--here")
    say("remove", "qwen3-8b", "--yes")
    assert not blobs.parent.exists()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("default", "is part of torchchat"),
        ("copy", "delete it yourself"),
        ("./copy/model.safetensors", "delete it yourself"),
        ("qwen3-9b", "did you mean"),
        ("../../x", "known"),
        ("a/b", "nothing to remove"),
        ("a/b:Q4_K_M", "nothing to remove"),
    ],
)
def test_what_was_not_downloaded_is_never_removed(name: str, says: str, cache: Path, refused: Say) -> None:
    copy = quantized(Path("copy"))
    assert says in refused("remove", name, "--yes")
    assert (copy / "model.safetensors").exists()


def test_a_script_must_say_yes(cache: Path, refused: Say) -> None:
    snapshot = downloaded(cache, "a/b")
    assert "--yes" in refused("remove", "a/b")
    assert snapshot.exists()


@pytest.mark.parametrize(("answer", "gone"), [("y", True), ("YES", True), ("", False), ("n", False), ("what", False)])
def test_remove_asks(answer: str, gone: bool, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = downloaded(cache, "a/b")
    child = _terminal(["remove", "a/b"], {"HF_HOME": str(cache.parent)})
    child.expect_exact("remove a/b, 5.")
    child.expect_exact("[y/N] ")
    child.sendline(answer)
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == 0
    assert snapshot.exists() is not gone


def _terminal(argv: list[str], environ: dict[str, str], directory: Path | None = None) -> "pexpect.spawn[str]":
    return pexpect.spawn(
        sys.executable,
        [str(ROOT / "torchchat.py"), *argv],
        env=clean_environment() | {"TERM": "xterm", "NO_COLOR": "1"} | environ,
        cwd=str(directory or os.getcwd()),
        encoding="utf-8",
        timeout=240,
        dimensions=(24, 200),
    )


@pytest.fixture(scope="module")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    directory = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_generate_downloads_what_is_not_here_once_somebody_says_yes(tiny_files: dict[str, bytes], cache: Path) -> None:
    ask = ["generate", "some/tiny", "--device", "cpu", "--dtype", "fp32", "--prompt", "a", "--max-new-tokens", "2"]
    with serve({"some/tiny": Repository(tiny_files)}) as hub:
        environ = hub.environment() | {"HF_HOME": str(cache.parent)}
        child = _terminal(ask, environ)
        child.expect(r"some/tiny is not here: download [\d.]+ kB from Hugging Face \(some/tiny\)\? \[Y/n\] ")
        assert not hub.asked_for("model.safetensors")
        child.sendline("")
        child.expect_exact("downloaded some/tiny")
        child.expect(pexpect.EOF)
        child.wait()
        assert child.exitstatus == 0, child.before
        # The second time there is nothing to ask.
        child = _terminal(ask, environ | {"HF_HUB_OFFLINE": "1"})
        assert child.expect_exact(["[Y/n]", pexpect.EOF]) == 1
        child.wait()
        assert child.exitstatus == 0, child.before


@pytest.mark.parametrize(
    "argv", [["bench", "some/tiny"], ["quantize", "some/tiny", "--quantize", "cpu", "--output", "out"]]
)
def test_the_other_commands_ask_too_and_take_no_for_an_answer(argv: list[str], cache: Path) -> None:
    files = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": b"x" * 5000}
    with serve({"some/tiny": Repository(files)}) as hub:
        child = _terminal(argv, hub.environment() | {"HF_HOME": str(cache.parent)})
        child.expect_exact("some/tiny is not here: download 5.")
        child.sendline("n")
        child.expect_exact("error: some/tiny is not on this machine: `torchchat download some/tiny` fetches it")
        child.expect(pexpect.EOF)
        child.wait()
    assert child.exitstatus == 2
    assert not (cache / "models--some--tiny").exists()


def test_nobody_is_asked_for_what_may_not_be_had(cache: Path) -> None:
    with serve({"some/tiny": Repository({"model.safetensors": b"x"}, gated=True)}) as hub:
        child = _terminal(["bench", "some/tiny"], hub.environment() | {"HF_HOME": str(cache.parent)})
        child.expect_exact("error: some/tiny: its makers want to be asked")
        child.expect(pexpect.EOF)
        child.wait()
    assert child.exitstatus == 2


def test_figures_are_short() -> None:
    assert [short_count(n) for n in (7, 15_191_712, 999_885_952, 70_553_706_496)] == ["7", "15.2 M", "1 B", "70.6 B"]
    assert [short_context(n) for n in (256, 1024, 131_072)] == ["256", "1k", "128k"]
    assert find("llama3.2-11b").context == 131_072
