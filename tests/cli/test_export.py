"""The command `export` as a person meets it, and what its package and its directory then are to the other commands."""

import fcntl
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from cli import console, exporting, ledger
from cli.builder import Built, build, prepare
from cli.main import main
from config.settings import BuildSettings, SamplingParams, Setting
from generate.engine import Engine
from model.device import Bandwidth
from model.export import PACKAGE, ROOT, open_package, writing
from model.saved import TensorWriter
from tests.tiny_checkpoint import CONTEXT, VOCAB, write_tiny_checkpoint

ROOT_DIR = Path(__file__).parent.parent.parent
RECIPE = '{"embedding": {"bitwidth": 8, "groupsize": 0}, "linear:int4": {"groupsize": 32}}'
SEQUENCES = 2
GREEDY = SamplingParams(temperature=0, max_new_tokens=12, ignore_eos=True)
SAMPLED = replace(GREEDY, temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.3, seed=3)
OTHERWISE = replace(GREEDY, temperature=0.9, top_p=0.9, seed=3)
"""In a way that no entry point samples: by all of the vocabulary."""


class Done(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Done]


class Exported(NamedTuple):
    """The package of a tiny quantized model, what the command said, and its cache directory."""

    package: Path
    model: Path
    done: Done
    cache: Path


def in_a_process(*argv: object, cache: Path, code: str = "", said: str = "", **environ: str) -> Done:
    """A command in a process of its own, as a person starts it. code: what happens first there. said: on stdin."""
    script = f"import sys; {code}\nfrom cli.main import main; sys.exit(main({list(map(str, argv))!r}))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT_DIR,
        env=os.environ | {"TORCHCHAT_CACHE_DIR": str(cache)} | environ,
        input=said,
        capture_output=True,
        text=True,
        timeout=900,
    )
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def exported(everybody: Path, warm: Path) -> Exported:
    """Compiles three steps and two libraries: half a minute, by one worker for all."""
    model, package, said = (everybody / "exported" / name for name in ("tiny", "model.pt2", "said.json"))
    with (everybody / "exported.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not said.exists():
            words = ("export", write_tiny_checkpoint(model), "--quantize", RECIPE, "--dtype", "fp32", "--device", "cpu")
            rest = ("--max-num-seqs", SEQUENCES, "--output-aoti-package-path", package)
            said.write_text(json.dumps(in_a_process(*words, *rest, cache=warm)))
    done = Done(*json.loads(said.read_text()))
    assert done.code == 0, done.err
    return Exported(package, model, done, warm)


@pytest.fixture
def run(exported: Exported, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """A command in this process, with the cache of the export."""
    monkeypatch.setenv("TORCHCHAT_CACHE_DIR", str(exported.cache))
    monkeypatch.setattr(ledger, "known_bandwidth", lambda device, directory, say: Bandwidth(20.0, 10.0))
    console.cache_dir_or_say.cache_clear()

    def run(*argv: object) -> Done:
        capsys.readouterr()
        return Done(main(list(map(str, argv))), *capsys.readouterr())

    yield run
    console.cache_dir_or_say.cache_clear()


def refused(done: Done) -> str:
    assert done.code == 2, done
    assert done.out == ""
    assert done.err.count("\n") == 1, done.err
    assert done.err.startswith("torchchat: error: ")
    return done.err


# ---- The package ----


def test_what_it_says(exported: Exported) -> None:
    done = exported.done
    assert done.out.startswith(f"{exported.package}: ")
    assert done.out.count("\n") == 1
    assert "16 tokens are those of the eager model" in done.err
    for entry in ("prefill", "decode", "decode_batch", "sample"):
        assert f"torchchat: {entry}: compiled " in done.err
    assert {path.name for path in exported.package.parent.iterdir()} == {"tiny", "model.pt2", "said.json"}


def test_weights_are_in_it_once_and_code_has_none(exported: Exported) -> None:
    package = open_package(exported.package)
    with zipfile.ZipFile(exported.package) as archive:
        names = archive.namelist()
        lines = archive.read("model/extra/runner.txt").decode().splitlines()
    assert sum(name.endswith(".safetensors") for name in names) == 1
    assert not any(name.endswith((".cpp", ".o")) or "weights" in name for name in names)
    weights = package.weights()
    listed = [line.split() for line in lines if line.startswith("weight ")]
    assert [words[1] for words in listed] == list(weights_in_order(exported))
    for _, name, dtype, _, nbytes, *shape in listed:
        assert (dtype, int(nbytes)) == (str(weights[name].dtype).removeprefix("torch."), weights[name].nbytes)
        assert tuple(map(int, shape)) == weights[name].shape
    assert "torchchat-package 1" in lines
    assert "chat_begin 256 258 =757365723a20" in lines


def weights_in_order(exported: Exported) -> list[str]:
    return [name for name, _ in built(exported.package).model.named_parameters()]


def built(model: Path, max_num_seqs: int = 1, **options: Any) -> Built:
    settings = BuildSettings(str(model), device=Setting("cpu"), max_num_seqs=max_num_seqs, **options)
    return build(prepare(settings), None if model.suffix == ".pt2" else CONTEXT)


def eager(exported: Exported, max_num_seqs: int = 1) -> Built:
    return built(exported.model, max_num_seqs, dtype=Setting("fp32"), quantize=RECIPE, quantize_source="a test")


def tokens(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    sequences = [engine.add(prompt, replace(params, seed=i)) for i, prompt in enumerate(prompts)]
    while engine.has_unfinished:
        engine.step()
    return [sequence.token_ids for sequence in sequences]


def prompt(length: int) -> list[int]:
    return [(7 * i + length) % VOCAB for i in range(length)]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, OTHERWISE], ids=["greedy", "sampled", "otherwise"])
def test_it_gives_the_tokens_of_the_eager_model(exported: Exported, params: SamplingParams) -> None:
    ours, theirs = eager(exported).engine, built(exported.package).engine
    for length in (1, 2, 3, 31, CONTEXT - 13):
        assert tokens(theirs, [prompt(length)], params) == tokens(ours, [prompt(length)], params), length


def test_several_at_a_time_give_what_each_gives_alone(exported: Exported) -> None:
    engine = built(exported.package, SEQUENCES).engine
    prompts = [prompt(5), prompt(40), prompt(9)]
    assert tokens(engine, prompts, SAMPLED) == tokens(eager(exported, 2).engine, prompts, SAMPLED)


def test_it_runs_without_a_compiler_and_without_tracing(exported: Exported, tmp_path: Path) -> None:
    """In a process that can find no program at all, and whose cache is empty."""
    words = ("generate", exported.package, "--prompt", "Once", "--max-new-tokens", "6", "--json", "--temperature", "0")
    code = "import atexit; atexit.register(lambda: print({'torch._inductor', 'torch._dynamo'} & set(sys.modules)))"
    done = in_a_process(*words, cache=tmp_path / "cache", code=code, PATH=str(tmp_path), CXX="no-compiler")
    assert done.code == 0, done.err
    document, compilers = done.out.splitlines()
    assert compilers == "set()"
    answer = json.loads(document)["samples"][0]
    assert answer["token_ids"] == tokens(eager(exported).engine, [answer["prompt_token_ids"]], GREEDY)[0][:6]
    assert "model.pt2 was not exported here: it is a program" in done.err
    assert not any((tmp_path / "cache" / folder).exists() for folder in ("compiled", "native", "ops"))


@pytest.mark.parametrize("spelling", ["--aoti-package-path", "--aoti_package_path"])
def test_either_spelling_of_the_flag_names_it(run: Run, exported: Exported, spelling: str) -> None:
    done = run("generate", spelling, exported.package, "--prompt", "Once", "--max-new-tokens", 3)
    assert done.code == 0, done.err
    assert "compiled decode and prefill · quantized: embedding (1 layer), linear:int4 (9 layers)" in done.err
    assert "model.pt2 was exported from" in done.err
    assert "not exported here" not in done.err


def test_other_commands_take_it(run: Run, exported: Exported) -> None:
    said = "Hello\n/compile off\nHello again\n"
    done = in_a_process("chat", exported.package, "--max-new-tokens", 4, cache=exported.cache, said=said)
    assert done.code == 2, done.err  # a script that failed somewhere, as this one does where it asks for eager steps
    assert "--no-compile: model.pt2 was exported compiled" in done.err
    assert len(done.out.splitlines()) >= 2
    done = run("bench", exported.package, "--context", 64, "--prefill-tokens", 32, "--repeats", 1, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["decode"][0]["tok_s"] > 0
    words = ("--tasks", "stories_endings", "--limit", 2, "--json")
    packaged, eager = (
        json.loads(run("eval", *model, *words).out)["results"]["stories_endings"]
        for model in ((exported.package,), (exported.model, "--quantize", RECIPE, "--dtype", "fp32"))
    )
    assert packaged == eager
    done = run("generate", exported.package, "--prompt", "Once", "--explain")
    assert done.code == 0, done.err
    assert "linear:int4" in done.out


def test_more_samples_than_it_has_room_for_come_one_after_another(run: Run, exported: Exported) -> None:
    words = ("--prompt", "Once", "--max-new-tokens", 5, "--num-samples", 5, "--seed", 1, "--json")
    found = json.loads(run("generate", exported.package, *words).out)["samples"]
    quantized = ("--quantize", RECIPE, "--dtype", "fp32", "--device", "cpu")
    expected = json.loads(run("generate", exported.model, *quantized, *words).out)["samples"]
    assert found == expected


# ---- What it fixes ----


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--dtype", "bf16"], "--dtype: model.pt2 was exported in fp32, which stays so"),
        (["--dtype", "fp32"], "--dtype: model.pt2 was exported in fp32"),
        (["--quantize", "cpu"], "--quantize: model.pt2 was exported quantized"),
        (["--compile"], "--compile: model.pt2 was exported compiled"),
        (["--no-compile"], "--no-compile: model.pt2 was exported compiled"),
        (["--compile_prefill"], "--compile-prefill: model.pt2 was exported compiled"),
        (["--max-seq-len", "64"], "--max-seq-len: model.pt2 was exported with a context of 128"),
        (["--device", "cuda"], "--device: model.pt2 was exported for cpu"),
    ],
)
def test_flags_that_it_fixes(run: Run, exported: Exported, flags: list[str], says: str) -> None:
    assert says in refused(run("generate", exported.package, "--prompt", "Once", *flags))


def test_variables_that_it_fixes_are_without_effect(run: Run, exported: Exported, monkeypatch: Any) -> None:
    monkeypatch.setenv("TORCHCHAT_DTYPE", "bf16")
    done = run("generate", exported.package, "--prompt", "Once", "--max-new-tokens", 1, "--device", "cpu")
    assert done.code == 0
    assert "TORCHCHAT_DTYPE is without effect: model.pt2 was exported in fp32" in done.err


def test_more_sequences_than_it_was_exported_for(run: Run, exported: Exported) -> None:
    says = f"model.pt2 was exported for {SEQUENCES} sequences at a time"
    assert f"--max-num-seqs 3: {says}" in refused(run("server", exported.package, "--max-num-seqs", 3, "--port", 0))
    assert f"--batch 4: {says}" in refused(run("bench", exported.package, "--batch", "1,4"))
    assert f"--batch-size 3: {says}" in refused(run("eval", exported.package, "--batch-size", 3))


def test_two_models(run: Run, exported: Exported) -> None:
    done = run("generate", "default", "--aoti-package-path", exported.package, "--prompt", "Once")
    assert "both name a model" in refused(done)
    assert "is no package" in refused(run("generate", "--aoti-package-path", exported.model, "--prompt", "Once"))
    assert "no such file" in refused(run("generate", "gone.pt2", "--prompt", "Once"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"torch": "2.9.0"}, "was exported with torch 2.9.0, and here is "),
        ({"instructions": ["avx9000"]}, "was exported for a processor with avx9000, which this one does not have"),
        ({"platform": "plan9 vax"}, "was exported for plan9 vax, and here is "),
        ({"device": "cuda"}, "was exported for cuda, and torch sees no GPU here"),
        ({"format": 99}, '"format" is 99, and this torchchat reads 1'),
    ],
)
def test_packages_for_others(
    run: Run, exported: Exported, tmp_path: Path, change: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with writing(path := tmp_path / "model.pt2") as (writer, partial), zipfile.ZipFile(exported.package) as archive:
        for entry in archive.infolist():
            name = entry.filename.removeprefix(ROOT)
            data = archive.read(entry)
            if name == PACKAGE:
                data = json.dumps(json.loads(data) | change).encode()
            if name.startswith(("extra/", "data/")):
                writer.add(name, data)
        writer.close()
        partial.replace(path)
    assert says in refused(run("generate", path, "--prompt", "Once"))


def test_a_package_that_is_cut_short(run: Run, exported: Exported, tmp_path: Path) -> None:
    (path := tmp_path / "model.pt2").write_bytes(exported.package.read_bytes()[:-100])
    assert "is cut short or damaged" in refused(run("chat", path))


# ---- Exporting that fails ----


def again(exported: Exported, output: Path, *flags: object) -> tuple[object, ...]:
    """The same export, whose code is in the cache."""
    same = ("--quantize", RECIPE, "--dtype", "fp32", "--max-num-seqs", SEQUENCES, "--device", "cpu")
    return ("export", exported.model, *same, "--output-aoti-package-path", output, *flags)


def test_it_can_be_written_again_in_place(run: Run, exported: Exported, tmp_path: Path) -> None:
    (output := tmp_path / "model.pt2").write_text("as it was")
    done = run(*again(exported, output, "--json"))
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert set(document) == {"settings", "aoti_package", "snapshot"}
    assert document["aoti_package"]["file_bytes"] == output.stat().st_size
    assert "decode_batch: compiled before" in done.err
    code = open_package(exported.package).metadata.code
    assert code == open_package(output).metadata.code


def test_what_computes_something_else_is_not_written(
    run: Run, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(exporting.CLOSE, torch.float32, -1.0)
    error = run(*again(exported, tmp_path / "model.pt2"))
    assert error.code == 2
    assert "gives other logits than the eager model" in error.err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(exported: Exported, tmp_path: Path) -> None:
    """A limit on the size of files stands in for it, which the package alone exceeds."""
    size = exported.package.stat().st_size - 1000
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"
    done = in_a_process(*again(exported, tmp_path / "model.pt2"), cache=exported.cache, code=limit)
    assert done.code == 1
    assert "File too large" in done.err.splitlines()[-1]
    assert "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_known_before_anything_is_compiled(
    run: Run, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    done = run(*again(exported, tmp_path / "model.pt2"))
    assert done.code == 1
    assert "are needed and 1 kB are free" in done.err
    assert done.err.count("\n") == 1


def test_without_a_compiler_it_says_so(run: Run, exported: Exported, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    error = refused(run(*again(exported, tmp_path / "model.pt2")))
    assert "export: compiling needs a C++ compiler, and CXX names no-such-compiler, which is not there" in error


def test_ctrl_c_leaves_nothing(
    run: Run, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        assert len(list(tmp_path.iterdir())) == 1  # whole, but not yet checked
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "_check", interrupt)
    assert run(*again(exported, tmp_path / "model.pt2")).code == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "what is to be written?"),
        (["--output-aoti-package-path", "model.so"], "give it a name that ends in .pt2"),
        (["--output-aoti-package-path", "gone/model.pt2"], "there is no directory"),
        (["--output-aoti-package-path", "x.pt2", "--compile"], "unknown option --compile"),
        (["--output-snapshot-path", "x", "--max-num-seqs", "2"], "--max-num-seqs is without effect on weights alone"),
        (["--output-snapshot-path", "."], "is "),
        (["--output-aoti-package-path", "x.pt2", "--max-num-seqs", "0"], "must be a whole number from 1"),
    ],
)
def test_mistakes(run: Run, tmp_path: Path, flags: list[str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert says in refused(run("export", *flags))


def test_what_is_exported_is_not_exported_again(run: Run, exported: Exported, tmp_path: Path) -> None:
    done = run("export", exported.package, "--output-aoti-package-path", tmp_path / "x.pt2")
    assert "is exported already" in refused(done)


# ---- The directory ----


def test_a_snapshot_has_the_weights_in_another_dtype(run: Run, exported: Exported, tmp_path: Path) -> None:
    done = run("export", exported.model, "--dtype", "bf16", "--device", "cpu", "--output-snapshot-path", tmp_path / "s")
    assert done.code == 0, done.err
    assert done.out.startswith(f"{tmp_path / 's'}: ")
    original, written = (load_file(path / "model.safetensors") for path in (exported.model, tmp_path / "s"))
    assert set(original) == set(written)
    assert all(torch.equal(written[name], tensor.bfloat16()) for name, tensor in original.items())
    assert json.loads((tmp_path / "s" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    words = ("--prompt", "Once", "--max-new-tokens", 4, "--seed", 1, "--dtype", "bf16", "--json", "--device", "cpu")
    texts = [json.loads(run("generate", path, *words).out)["samples"] for path in (exported.model, tmp_path / "s")]
    assert texts[0] == texts[1]


def test_transformers_reads_a_snapshot(run: Run, exported: Exported, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert run("export", exported.model, "--dtype", "fp32", "--output-snapshot-path", tmp_path / "s").code == 0
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "s", exported.model))
    ids = torch.tensor([prompt(9)])
    assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_a_quantized_snapshot_is_what_quantize_writes(run: Run, exported: Exported, tmp_path: Path) -> None:
    flags = ("--quantize", RECIPE, "--dtype", "fp32", "--device", "cpu")
    assert run("export", exported.model, *flags, "--output-snapshot-path", tmp_path / "a").code == 0
    assert run("quantize", exported.model, *flags, "--output", tmp_path / "b", "--no-receipt").code == 0
    assert (names := {path.name for path in (tmp_path / "a").iterdir()}) == {p.name for p in (tmp_path / "b").iterdir()}
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    again = run("export", tmp_path / "a", "--output-snapshot-path", tmp_path / "c")
    assert "is such a directory already" in refused(again)


def test_a_full_disk_leaves_no_snapshot(
    run: Run, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: TensorWriter, name: str, blocks: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorWriter, "write", full)
    done = run("export", exported.model, "--dtype", "fp32", "--output-snapshot-path", tmp_path / "s")
    assert done.code == 1
    assert "No space left on device" in done.err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


# ---- A GPU ----


@pytest.mark.gpu
def test_a_package_for_cuda_gives_the_eager_tokens(tmp_path: Path) -> None:
    model, package = write_tiny_checkpoint(tmp_path / "tiny"), tmp_path / "model.pt2"
    flags = ("--dtype", "fp32", "--device", "cuda", "--max-num-seqs", SEQUENCES)
    done = in_a_process("export", model, *flags, "--output-aoti-package-path", package, cache=tmp_path / "cache")
    assert done.code == 0, done.err
    settings = BuildSettings(str(model), device=Setting("cuda"), dtype=Setting("fp32"))
    ours = build(prepare(settings), CONTEXT).engine
    theirs = build(prepare(BuildSettings(str(package)))).engine
    for params in (GREEDY, SAMPLED):
        theirs.prepare(params)
        assert tokens(theirs, [prompt(31)], params) == tokens(ours, [prompt(31)], params)
