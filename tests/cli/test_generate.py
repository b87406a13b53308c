"""The command `generate` as a person and as a script meet it: what is on stdout, what is on stderr, the exit code."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli import console, ledger
from cli.main import main
from config.settings import MAX_SEED
from model.device import Bandwidth
from tests.generate.scripted import StandIn
from tests.tiny_checkpoint import BOS, CONTEXT, END_OF_TURN, EOS, write_tiny_checkpoint

ROOT = Path(__file__).parent.parent.parent
FAST = ("--device", "cpu", "--dtype", "fp32")


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        assert self.code == 0, self.err
        result: dict[str, Any] = json.loads(self.out)
        return result

    @property
    def sample(self) -> dict[str, Any]:
        (sample,) = self.document["samples"]
        assert isinstance(sample, dict)
        return sample


Generate = Callable[..., Done]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def generate(tiny: Path, capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Generate:
    """Runs `generate` on the tiny model, or on `model`, in this process; the machine's bandwidth is taken as known."""
    monkeypatch.setenv("TORCHCHAT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(ledger, "known_bandwidth", lambda device, directory, say: Bandwidth(20.0, 10.0))
    console.cache_dir_or_say.cache_clear()

    def run(*argv: object, model: object = tiny) -> Done:
        capsys.readouterr()
        code = main(["generate", str(model), *FAST, *map(str, argv)])
        return Done(code, *capsys.readouterr())

    return run


def start(*argv: object, **options: Any) -> "subprocess.Popen[str]":
    """The same in a process of its own."""
    command = [sys.executable, str(ROOT / "torchchat.py"), "generate", *map(str, argv)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, encoding="utf-8", **options)


def copy_with(tiny: Path, target: Path, file: str, **changes: object) -> Path:
    """A copy of the model with some keys of one JSON file changed."""
    shutil.copytree(tiny, target)
    path = target / file
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(content))
    return target


# ---- The document ----


def test_the_document_is_what_was_promised(generate: Generate) -> None:
    done = generate("--prompt", "Hello", "--max-new-tokens", 7, "--seed", 0, "--num-samples", 2, "--json")
    document = done.document
    assert done.out.count("\n") == 1
    assert list(document) == ["samples", "settings", "stats"]
    assert len(document["samples"]) == 2
    for sample in document["samples"]:
        assert list(sample) == ["text", "token_ids", "prompt_token_ids", "finish_reason"]
        assert sample["prompt_token_ids"][0] == BOS
        assert len(sample["prompt_token_ids"]) == 1 + len("Hello")
        assert 1 <= len(sample["token_ids"]) <= 7
        assert sample["finish_reason"] == ("stop" if sample["token_ids"][-1] == EOS else "length")
    assert document["settings"] == {
        "model": "tiny", "device": "cpu", "dtype": "fp32", "quantize": None, "compile": False, "compile_prefill": False,
    }  # fmt: skip
    stats = document["stats"]
    assert list(stats) == [
        "load_s", "quantize_s", "compile_s", "ttft_s", "prefill_tok_s", "decode_tok_s", "peak_memory_bytes",
        "weight_bytes_per_token", "bandwidth_share",
    ]  # fmt: skip
    assert (stats.pop("quantize_s"), stats.pop("compile_s")) == (0, 0)
    assert all(value > 0 for value in stats.values())


def test_figures_of_what_did_not_happen_are_null(generate: Generate) -> None:
    stats = generate("--prompt", "x", "--max-new-tokens", 1, "--json").document["stats"]
    assert stats["decode_tok_s"] is None
    assert stats["bandwidth_share"] is None
    assert stats["prefill_tok_s"] > 0


def test_the_recipe_is_in_the_document(generate: Generate) -> None:
    recipe = {"precision": {"dtype": "bf16"}}
    argv = ("--prompt", "x", "--max-new-tokens", 1, "--json", "--quantize", json.dumps(recipe))
    document = generate(*argv).document
    assert document["settings"]["dtype"] == "fp32"  # the flag is stronger


# ---- Which text ----


def test_a_seed_is_a_text(generate: Generate) -> None:
    def text(*argv: object) -> list[int]:
        tokens: list[int] = generate("--prompt", "Once", "--max-new-tokens", 24, "--json", *argv).sample["token_ids"]
        return tokens

    texts = {seed: text("--seed", seed) for seed in (0, 1, 2, MAX_SEED)}
    assert len({tuple(tokens) for tokens in texts.values()}) == 4
    assert all(text("--seed", seed) == tokens for seed, tokens in texts.items())
    assert text("--temperature", 0, "--seed", 0) == text("--temperature", 0, "--seed", 1)


def test_samples_are_what_the_next_seeds_give_alone(generate: Generate) -> None:
    argv = ("--prompt", "Once", "--max-new-tokens", 16, "--json", "--repetition-penalty", 1.2, "--top-p", 0.9)
    samples = generate(*argv, "--seed", 5, "--num-samples", 5).document["samples"]
    assert samples == [generate(*argv, "--seed", 5 + i).sample for i in range(5)]


def test_a_seed_that_was_drawn_is_shown_and_can_be_given_again(generate: Generate) -> None:
    first, second = (generate("--prompt", "Once", "--max-new-tokens", 16) for _ in range(2))
    seeds = [re.search(r"seed (\d+)", done.err) for done in (first, second)]
    assert seeds[0] is not None
    assert seeds[1] is not None
    assert seeds[0][1] != seeds[1][1]
    assert generate("--prompt", "Once", "--max-new-tokens", 16, "--seed", seeds[0][1]).out == first.out


def test_a_stop_string_ends_the_text_before_it(generate: Generate) -> None:
    argv = ("--prompt", "Once", "--max-new-tokens", 40, "--seed", 3, "--json")
    whole = generate(*argv).sample["text"]
    at = next(i for i in range(8, len(whole)) if whole[i].isprintable() and whole[i] not in whole[:i] + "\ufffd")
    sample = generate(*argv, "--stop", "never this", "--stop", whole[at]).sample
    assert sample["text"] == whole[:at]
    assert sample["finish_reason"] == "stop"


def test_the_model_recommends_and_the_person_decides(generate: Generate) -> None:
    assert "temperature 0.9 · top-k 40 · seed 1" in generate("--prompt", "x", "--max-new-tokens", 1, "--seed", 1).err
    argv = ("--prompt", "x", "--max-new-tokens", 1, "--temperature", 0, "--num-samples", 2)
    assert "greedy (temperature 0) · all 2 samples will be the same" in generate(*argv).err


# ---- Where the prompt comes from ----


def test_an_empty_prompt_is_bos_alone(generate: Generate) -> None:
    assert generate("--prompt", "", "--max-new-tokens", 4, "--json").sample["prompt_token_ids"] == [BOS]


def test_bos_is_where_the_tokenizer_puts_it(generate: Generate, tiny: Path, tmp_path: Path) -> None:
    model = copy_with(tiny, tmp_path / "m", "tokenizer_config.json", add_bos_token=False)
    for prompt, first in (("x", None), ("", BOS)):
        ids = generate("--prompt", prompt, "--max-new-tokens", 1, "--json", model=model).sample["prompt_token_ids"]
        assert len(ids) == 1
        assert (ids == [BOS]) == (first == BOS)


def test_a_model_without_bos_begins_after_an_end(generate: Generate, tmp_path: Path) -> None:
    model = write_tiny_checkpoint(tmp_path / "m", bos=False)
    ids = generate("--prompt", "", "--max-new-tokens", 1, "--json", model=model).sample["prompt_token_ids"]
    assert ids == [EOS]


def test_file_stdin_and_flag_are_the_same_prompt(
    generate: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "Grüße, 世界\ntwo"
    (tmp_path / "prompt").write_text(text + "\n", encoding="utf-8")
    argv = ("--max-new-tokens", 3, "--seed", 1, "--json")
    expected = generate("--prompt", text, *argv).sample
    assert generate("--prompt-file", tmp_path / "prompt", *argv).sample == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{text}\n".encode())))
    assert generate("--prompt", "-", *argv).sample == expected


def test_a_pipe_is_read_unasked_and_stdout_is_the_text_alone(tiny: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "TORCHCHAT_CACHE_DIR": str(tmp_path), "TORCHCHAT_DTYPE": "fp32"}
    process = start(tiny, "--max-new-tokens", 3, "--temperature", 0, stdin=subprocess.PIPE, env=environment)
    out, err = process.communicate("Grüße", timeout=480)
    assert process.returncode == 0
    assert out.startswith("Grüße")
    assert len(out) > len("Grüße\n")
    assert "\x1b" not in err  # no terminal, no colours
    assert "no --prompt" not in err


def test_chat_is_a_turn_of_the_template(generate: Generate, tmp_path: Path) -> None:
    argv = ("--chat", "--prompt", "Hi <|eos|>", "--max-new-tokens", 5, "--seed", 1)
    sample = generate(*argv, "--json").sample
    ids = sample["prompt_token_ids"]
    assert [i for i in ids if i >= 256] == [BOS, END_OF_TURN, END_OF_TURN]  # and the one in the text is text
    shown = generate(*argv)
    assert shown.out.rstrip("\n") == sample["text"].rstrip("\n")  # the reply alone
    without = write_tiny_checkpoint(tmp_path / "m", chat=False)
    plain = generate(*argv, model=without)
    assert plain.code == 0
    assert "chat format: plain text" in plain.err


# ---- What a person sees ----


def test_streamed_or_not_it_is_the_same_text(generate: Generate) -> None:
    argv = ("--prompt", "Once", "--max-new-tokens", 30, "--seed", 2)
    text = generate(*argv, "--json").sample["text"]
    streamed, whole = generate(*argv), generate(*argv, "--no-stream")
    assert streamed.out == whole.out
    assert streamed.out.removesuffix("\n") == ("Once" + text).removesuffix("\n")


def test_several_samples_come_one_after_the_other(generate: Generate) -> None:
    argv = ("--prompt", "Once", "--max-new-tokens", 9, "--seed", 2, "--num-samples", 3)
    texts = ["Once" + sample["text"] for sample in generate(*argv, "--json").document["samples"]]
    done = generate(*argv)
    assert done.out == "\n".join(text if text.endswith("\n") else text + "\n" for text in texts)
    assert re.findall(r"sample (\d) of 3, seed (\d)", done.err) == [("1", "2"), ("2", "3"), ("3", "4")]


def test_the_ledger_is_on_stderr(generate: Generate) -> None:
    done = generate("--prompt", "Hello", "--max-new-tokens", 5, "--temperature", 0)
    lines = [line.split() for line in done.err.splitlines() if line.startswith("  ")]
    assert [line[0] for line in lines] == ["load", "first", "prefill", "decode", "memory", "weights"]
    assert "6 tokens" in done.err
    assert "4 tokens" in done.err
    assert re.search(r"\d% of this machine's 10 GB/s", done.err)
    first = done.err.splitlines()[0]
    assert " · cpu (--device) · fp32 (--dtype) · eager · unquantized" in first


def test_a_full_context_is_said(generate: Generate) -> None:
    prompt = "x" * (CONTEXT - 3)
    done = generate("--prompt", prompt, "--temperature", 0, "--max-new-tokens", 50)
    assert f"the text ends where the context of {CONTEXT} tokens was full" in done.err
    assert done.code == 0


@pytest.mark.parametrize("no_color", [False, True])
def test_colours_are_for_terminals_that_want_them(
    generate: Generate, monkeypatch: pytest.MonkeyPatch, no_color: bool
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1" if no_color else "")
    assert generate("--prompt", "x", "--max-new-tokens", 2).code == 0
    assert ("\x1b[2m" in terminal.getvalue()) == (not no_color)


def test_a_profile_is_a_trace(generate: Generate, tmp_path: Path) -> None:
    path = tmp_path / "out" / "trace.json"
    path.parent.mkdir()
    sample = generate("--prompt", "x", "--max-new-tokens", 3, "--seed", 1, "--json", "--profile", path).sample
    assert sample == generate("--prompt", "x", "--max-new-tokens", 3, "--seed", 1, "--json").sample
    assert any("mm" in event["name"] for event in json.loads(path.read_text())["traceEvents"])
    assert list(path.parent.iterdir()) == [path]


# ---- Ctrl-C ----


@pytest.fixture(scope="module")
def endless(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with room for minutes, whose likeliest token is never the one that ends a text."""
    model = copy_with(tiny, tmp_path_factory.mktemp("m") / "m", "config.json", max_position_embeddings=10**6)
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"][EOS] = 0
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_ctrl_c_ends_with_what_there_is(endless: Path, tmp_path: Path, as_json: bool) -> None:
    environment = {**os.environ, "TORCHCHAT_CACHE_DIR": str(tmp_path)}
    process = start(
        endless, "--prompt", "Hello", "--temperature", 0, "--max-new-tokens", 500_000, *(["--json"] if as_json else []),
        stdin=subprocess.DEVNULL, env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    said = ""
    while "greedy" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    shown = "" if as_json else process.stdout.read(len("Hello") + 3)
    time.sleep(3 if as_json else 0)  # tokens are being made by then, of which nothing is seen
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 130
    if as_json:
        (sample,) = json.loads(out)["samples"]
        assert sample["finish_reason"] == "abort"
        assert 0 < len(sample["token_ids"]) < 500_000
        assert sample["text"]
    else:
        assert (shown + out).startswith("Hello")
        assert out.endswith("\n")
        assert "interrupted" in err
        assert re.search(r"decode .* tok/s", err)


def test_ctrl_c_while_the_machine_is_measured_loses_nothing(
    generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> Bandwidth:
        raise KeyboardInterrupt

    monkeypatch.setattr(ledger, "known_bandwidth", interrupted)
    document = generate("--prompt", "x", "--max-new-tokens", 3, "--json").document
    assert document["stats"]["bandwidth_share"] is None
    assert document["stats"]["decode_tok_s"] > 0


# ---- Compiled ----


def test_compiled_is_eager_and_faster_the_second_time(generate: Generate) -> None:
    argv = ("--prompt", "Hello", "--max-new-tokens", 12, "--seed", 0, "--json")
    first, second = generate(*argv, "--compile"), generate(*argv, "--compile")
    assert first.sample == second.sample == generate(*argv).sample
    assert "compiled decode · unquantized" in first.err
    assert "decode: not compiled before; compiling" in first.err
    assert "decode: compiled before, loaded in" in second.err
    assert first.document["stats"]["compile_s"] > second.document["stats"]["compile_s"] > 0


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (("--compile",), ["decode"]),
        (("--compile-prefill",), ["prefill"]),
        (("--compile", "--compile_prefill"), ["prefill", "decode"]),
        (("--compile", "--num-samples", 3), ["decode, batches"]),
    ],
)
def test_each_flag_compiles_its_part(generate: Generate, monkeypatch: pytest.MonkeyPatch, flags, parts) -> None:
    StandIn.install(monkeypatch)
    done = generate("--prompt", "x", "--max-new-tokens", 3, "--json", *flags)
    assert done.document["settings"]["compile"] == ("--compile" in flags)
    assert done.document["settings"]["compile_prefill"] == ("prefill" in parts)
    assert re.findall(r"torchchat: (.*): not compiled before", done.err) == parts


@pytest.mark.parametrize("flags", [(), ("--compile",)])
def test_a_cache_that_cannot_be_written_is_said_and_no_more(
    generate: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags
) -> None:
    StandIn.install(monkeypatch)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHCHAT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    done = generate("--prompt", "x", "--max-new-tokens", 3, *flags)
    assert done.code == 0
    assert done.err.count("nothing is kept between runs") == 1


def test_without_a_compiler_it_says_so_before_it_reads_weights(
    generate: Generate, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(tiny, tmp_path / "m")
    (model / "model.safetensors").write_bytes(b"damaged")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    for flag in ("--compile", "--compile-prefill"):
        assert_refused(generate("--prompt", "x", flag, model=model), "needs a C++ compiler")


# ---- What is refused ----


def assert_refused(done: Done, *words: str) -> None:
    """Exit code 2, one line, and no traceback."""
    assert done.code == 2, done
    assert done.out == ""
    assert done.err.startswith("torchchat: error: ")
    assert done.err.count("\n") == 1, done.err
    assert all(word in done.err for word in words), done.err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--prompt", "x" * CONTEXT), (f"has {CONTEXT + 1} tokens", f"holds {CONTEXT}")),
        (("--prompt", "x" * 20, "--max-seq-len", 10), ("has 21 tokens", "holds 10")),
        (("--prompt", "x", "--max-seq-len", CONTEXT + 1), ("--max-seq-len", str(CONTEXT))),
        (("--prompt", "x", "--device", "mps"), ("device mps (--device) is not there",)),
        (("--prompt", "x", "--device", "tpu"), ("--device must be one of",)),
        (("--prompt", "x", "--dtype", "int4"), ("--dtype must be one of",)),
        (("--prompt", "x", "--prompt-file", "y"), ("--prompt and --prompt-file",)),
        (("--prompt-file", "/nowhere/at/all"), ("/nowhere/at/all", "No such file")),
        (("--prompt", "x", "--json", "--stream"), ("--json", "--stream")),
        (("--prompt", "x", "--profile", "/nowhere/at/all"), ("--profile", "/nowhere/at")),
        (("--prompt", "x", "--profile", "/"), ("--profile", "is a directory")),
        (("--prompt", "x", "--temperature", "-1"), ("temperature must be",)),
        (("--prompt", "x", "--temperature", "nan"), ("temperature must be",)),
        (("--prompt", "x", "--top-p", "0"), ("top_p must be",)),
        (("--prompt", "x", "--max-new-tokens", "0"), ("max_new_tokens must be",)),
        (("--prompt", "x", "--num-samples", "0"), ("--num-samples",)),
        (("--prompt", "x", "--seed", "-1"), ("seed must be",)),
        (("--prompt", "x", "--stop", ""), ("stop takes",)),
        (("--prompt", "x", "--quantize", '{"linear:in4": {}}'), ("--quantize", 'nearest is "linear:int4"')),
        (("--prompt", "x", "--compile-prefil"), ("did you mean '--compile-prefill'?",)),
        (("--prompt", "a\udc80b"), ("--prompt", "UTF-8")),
    ],
)
def test_what_cannot_be_is_one_line(generate: Generate, argv: tuple[object, ...], words: tuple[str, ...]) -> None:
    assert_refused(generate(*argv), *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there(generate: Generate) -> None:
    assert_refused(generate("--prompt", "x", "--device", "cuda"), "device cuda (--device) is not there")


def test_an_unknown_model_is_told_with_the_nearest_names(generate: Generate) -> None:
    assert_refused(generate("--prompt", "x", model="lama3.2-1b"), "did you mean llama3.2-1b")
    assert_refused(generate("--prompt", "x", model="zzz"), "'zzz'", "`torchchat list` shows what is known")
    assert_refused(generate(model="zzz"), "'zzz'")  # without a remark on the prompt before


@pytest.mark.parametrize("size", [None, 0, 5, 1000, -1])
def test_weights_that_are_missing_or_cut_short(
    generate: Generate, tiny: Path, tmp_path: Path, size: int | None
) -> None:
    model = shutil.copytree(tiny, tmp_path / "m")
    weights = model / "model.safetensors"
    if size is None:
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:size])
    assert_refused(generate("--prompt", "x", model=model), str(model) if size is None else str(weights))


def test_a_generation_config_that_is_none(generate: Generate, tiny: Path, tmp_path: Path) -> None:
    for i, text in enumerate(("[]", "{", '{"temperature": "hot"}')):
        model = shutil.copytree(tiny, tmp_path / f"m{i}")
        (model / "generation_config.json").write_text(text)
        assert_refused(generate("--prompt", "x", model=model), "generation_config.json")
