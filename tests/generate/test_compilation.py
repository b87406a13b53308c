"""Laws of compiled steps: they give what eager ones give, are compiled once for all lengths, are kept between runs."""

import ast
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from config.errors import UserError
from config.settings import SamplingParams
from generate import artifacts, compilation
from generate.artifacts import STEP_SOURCES, check_can_compile, kept_in, let_compilers_keep, native_compiler
from generate.backends import ARTIFACT, PACKAGE, Backend
from generate.compilation import CompiledSteps
from generate.engine import Engine
from generate.scheduler import slots_needed
from generate.stats import Ledger
from model.config import ModelConfig, from_hf
from model.kv_cache import KVCache
from model.transformer import Transformer
from quant.convert import Quantizer
from quant.experts import QuantizedExpertLinear
from quant.formats import Format
from quant.schemes import SCHEMES, Arguments
from tests.generate.scripted import StandIn, Utf8Tokenizer, run

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")
VOCAB, CHUNK, MAX_SEQ_LEN = 97, 8, 48
LENGTHS = (1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 1)
GREEDY = SamplingParams(temperature=0, max_new_tokens=12)
FILTERED = SamplingParams(temperature=1.2, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.3, max_new_tokens=12)


def model_config(**options: object) -> ModelConfig:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    family = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 2}
    return from_hf({**family, **shape, "vocab_size": VOCAB, "max_position_embeddings": 64, **options}, "a test")


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32, **options: object) -> Transformer:
    with torch.device("meta"):
        model = Transformer(model_config(**options)).eval()
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.3
        parameter.data = (noise + 1 if "norm" in name else noise).to(dtype)
    return model.requires_grad_(False)


def make_engine(
    model: Transformer,
    cache_dir: Path | None = None,
    report: Callable[[str], None] = lambda _: None,
    *,
    compiled: bool = True,
    prefill: bool = True,
    max_num_seqs: int = 2,
    max_seq_len: int = MAX_SEQ_LEN,
    every_batch: bool = False,
    capture_prefill: bool = False,
) -> Engine:
    weight, ledger = model.norm.weight, Ledger()
    steps = CompiledSteps(
        model,
        compile_decode=compiled,
        compile_prefill=compiled and prefill,
        capture_prefill=capture_prefill,
        prefill_chunk=CHUNK,
        cache_dir=cache_dir,
        ledger=ledger,
        report=report,
    )
    return Engine(
        model,
        KVCache.create(model.config, slots_needed(max_num_seqs), max_seq_len, weight.device, weight.dtype),
        Utf8Tokenizer(),
        vocab_size=VOCAB,
        max_num_seqs=max_num_seqs,
        prefill_chunk=CHUNK,
        prefill_fn=steps.prefill,
        read_fn=steps.read,
        reads_any_cache=not compiled,
        decode_fn=steps.decode,
        prepare_fn=steps.prepare if compiled or capture_prefill else None,
        every_batch=every_batch,
        ledger=ledger,
    )


def requests(params: SamplingParams) -> list[tuple[list[int], SamplingParams]]:
    """A prompt of each length, more of them than run at once."""
    return [([(7 * n + 3 * i) % VOCAB for i in range(n)], replace(params, seed=n)) for n in LENGTHS]


def compiles(told: list[str]) -> int:
    return sum("compiled in" in line for line in told)


# ---- What the compilers really make. Each compilation takes seconds: they are shared. ----


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Engine, list[str]]:
    """A directory with the three forms that `requests` need, the engine that compiled them, and what it told."""
    told: list[str] = []
    directory = tmp_path_factory.mktemp("kept")
    engine = make_engine(make_model(), directory, told.append)
    for params in (GREEDY, FILTERED):
        engine.prepare(params)
    return directory, engine, told


@pytest.mark.parametrize("params", [GREEDY, FILTERED], ids=["greedy", "filtered"])
def test_compiled_equals_eager_at_every_length(kept: tuple[Path, Engine, list[str]], params: SamplingParams) -> None:
    _, engine, told = kept
    expected = run(make_engine(make_model(), compiled=False), *requests(params))
    assert run(engine, *requests(params)) == expected
    assert len({tuple(tokens) for tokens, _, _ in expected}) == len(
        LENGTHS
    )  # different texts, so that they say something
    assert compiles(told) == 3  # one form of prefill and two of decode, and none for a length
    assert all(line.startswith(("prefill: ", "decode, batches: ")) for line in told)


def test_what_was_compiled_serves_the_next_run_and_other_weights(kept: tuple[Path, Engine, list[str]]) -> None:
    told: list[str] = []
    model = make_model(seed=1)
    engine = make_engine(model, kept[0], told.append)
    engine.prepare(FILTERED)
    assert run(engine, *requests(FILTERED)) == run(make_engine(model, compiled=False), *requests(FILTERED))
    assert [line.partition(", loaded in")[0] for line in told] == [
        "prefill: compiled before",
        "decode, batches: compiled before",
    ]
    assert engine.ledger.phase_s["compile"] > 0


def test_kept_files_are_private_whole_and_nothing_else(kept: tuple[Path, Engine, list[str]]) -> None:
    directory = kept_in(kept[0])
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    files = sorted(directory.iterdir())
    assert len(files) == 6
    assert {path.suffix for path in files} == {".pt2", ".sha256"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


def test_artifacts_equal_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA runs on, with all that sampling can do, and that its prefill too is compiled once for all lengths."""
    monkeypatch.setattr(compilation, "_backend", lambda device: ARTIFACT)
    told: list[str] = []
    small = [(prompt, replace(params, max_new_tokens=4)) for prompt, params in requests(FILTERED)]
    first = run(make_engine(make_model(), tmp_path, told.append), *small)
    assert first == run(make_engine(make_model(), compiled=False), *small)
    assert compiles(told) == 2  # one form of prefill, and decoding up to the logits: nothing was prepared
    assert run(make_engine(make_model(), tmp_path, told.append), *small) == first
    assert compiles(told) == 2


EXPERTS = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 2, "num_experts": 5,
    "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True, "head_dim": 8,
}  # fmt: skip


def model_of_experts(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Transformer:
    """A layer of experts, and one of experts in 8 bits."""
    model = make_model(**EXPERTS)
    experts = model.layers[1].feed_forward.experts
    for name in ("gate_up_proj", "down_proj"):
        plain = experts.get_submodule(name)
        quantized = QuantizedExpertLinear(5, 2, *plain.weight.shape, Format("int", 8, 0, False), dtype, CPU)
        Quantizer(SCHEMES["linear:int8"], Arguments(8, 0)).fill(quantized, [plain.weight.to(dtype)])
        setattr(experts, name, quantized)
    return model.to(device, dtype).requires_grad_(False)


@pytest.mark.slow  # compiles two forms, each ten seconds
def test_compiled_experts_equal_eager_ones(tmp_path: Path) -> None:
    """Which experts a step reads is found out in it; and several sequences at once are those sequences alone."""
    told: list[str] = []
    model, prompts = model_of_experts(), requests(GREEDY)
    expected = run(make_engine(model, compiled=False), *prompts)
    assert run(make_engine(model, tmp_path, told.append, max_num_seqs=1), *prompts) == expected
    assert compiles(told) == 2  # one form of prefill and one of decode


@pytest.mark.gpu
def test_compiled_experts_equal_eager_ones_on_cuda(tmp_path: Path) -> None:
    model, prompts = model_of_experts("cuda"), requests(GREEDY)
    expected = run(make_engine(model, compiled=False), *prompts)
    assert run(make_engine(model, tmp_path), *prompts) == expected
    assert run(make_engine(model, compiled=False, max_num_seqs=1), *prompts) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("params", [GREEDY, FILTERED], ids=["greedy", "filtered"])
def test_compiled_equals_eager_on_cuda(tmp_path: Path, params: SamplingParams) -> None:
    told: list[str] = []
    engine = make_engine(make_model().to("cuda"), tmp_path, told.append)
    expected = run(make_engine(make_model().to("cuda"), compiled=False), *requests(params))
    assert run(engine, *requests(params)) == expected
    before = compiles(told)
    assert run(make_engine(make_model(seed=0).to("cuda"), tmp_path, told.append), *requests(params)) == expected
    assert compiles(told) == before  # the second engine loads what the first one kept


@pytest.mark.parametrize("backend", [PACKAGE, ARTIFACT], ids=["package", "artifact"])
@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 and no more", bytes(5000)], ids=["empty", "cut", "zeros"])
def test_a_file_that_is_no_compiled_step_is_a_runtime_error(tmp_path: Path, backend: Backend, data: bytes) -> None:
    path = tmp_path / "step.pt2"
    path.write_bytes(data)
    with pytest.raises(RuntimeError):
        backend.load(path, torch.device("cpu"))


# ---- What is kept, when, and what is said, with a stand-in for the compilers that takes no time. ----


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn.install(monkeypatch)


def prepared(cache_dir: Path | None, model: Transformer | None = None, params=GREEDY, **options) -> list[str]:
    """What a new engine tells while it prepares for a short prompt."""
    told: list[str] = []
    make_engine(make_model() if model is None else model, cache_dir, told.append, **options).prepare(params)
    return told


def kinds(told: list[str]) -> list[str]:
    return [
        next(word for word in ("damaged", "loaded", "not compiled before", "compiled in", "kept") if word in line)
        for line in told
    ]


def test_the_stand_in_runs_like_the_real_ones(tmp_path: Path, stand_in: StandIn) -> None:
    engine = make_engine(make_model(), tmp_path)
    assert run(engine, *requests(FILTERED)) == run(make_engine(make_model(), compiled=False), *requests(FILTERED))


@pytest.mark.parametrize("max_seq_len", [2, 3, 9])
def test_a_small_context_is_no_special_case(tmp_path: Path, stand_in: StandIn, max_seq_len: int) -> None:
    engines = [make_engine(make_model(), tmp_path, compiled=on, max_seq_len=max_seq_len) for on in (True, False)]
    prompt = list(range(1, max_seq_len))
    compiled, eager = (run(engine, (prompt, replace(GREEDY, max_new_tokens=None))) for engine in engines)
    assert compiled == eager


def test_hit_and_miss_are_told(tmp_path: Path, stand_in: StandIn) -> None:
    assert kinds(prepared(tmp_path)) == ["not compiled before", "compiled in"] * 2
    assert kinds(prepared(tmp_path)) == ["loaded"] * 2
    assert len(stand_in.functions) == 2


@pytest.mark.parametrize("suffix", [".pt2", ".sha256"])
@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", lambda data: b"\xff" + data[1:]])
def test_what_is_damaged_is_compiled_again(tmp_path: Path, stand_in: StandIn, suffix: str, damage) -> None:
    prepared(tmp_path, prefill=False)
    (path,) = kept_in(tmp_path).glob(f"*{suffix}")
    path.write_bytes(damage(path.read_bytes()))
    assert kinds(prepared(tmp_path, prefill=False)) == ["damaged", "compiled in"]
    assert kinds(prepared(tmp_path, prefill=False)) == ["loaded"]


def test_what_does_not_load_is_compiled_again(tmp_path: Path, stand_in: StandIn) -> None:
    """As a library that was made for another system."""
    prepared(tmp_path, prefill=False)
    (path,) = kept_in(tmp_path).glob("*.pt2")
    made = tmp_path / "made"
    made.write_text("nothing known")
    artifacts.keep_package(made, path)
    assert kinds(prepared(tmp_path, prefill=False)) == ["damaged", "compiled in"]


def test_a_missing_half_is_no_error(tmp_path: Path, stand_in: StandIn) -> None:
    prepared(tmp_path, prefill=False)
    for path in kept_in(tmp_path).glob("*.sha256"):
        path.unlink()
    assert kinds(prepared(tmp_path, prefill=False)) == ["damaged", "compiled in"]


def test_without_a_cache_it_works_and_says_so(stand_in: StandIn) -> None:
    told: list[str] = []
    engine = make_engine(make_model(), None, told.append, prefill=False)
    assert run(engine, *requests(GREEDY)) == run(make_engine(make_model(), compiled=False), *requests(GREEDY))
    assert told[0] == "decode, batches: nothing is kept here; compiling, which takes a while"
    assert len(told) == 2


def test_a_cache_that_takes_nothing_is_said(tmp_path: Path, stand_in: StandIn) -> None:
    kept_in(tmp_path).write_text("a file where the directory would be")
    told = prepared(tmp_path, prefill=False)
    assert kinds(told[:2]) == ["not compiled before", "compiled in"]
    assert told[2].startswith("what was compiled is not kept: ")
    assert told[2].endswith("; the next run compiles again")


def test_the_key_is_everything_that_matters(tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def number_of_keys() -> int:
        return len(list(kept_in(tmp_path).glob("*.pt2")))

    variations: list[Callable[[], object]] = [
        lambda: prepared(tmp_path, prefill=False),
        lambda: prepared(tmp_path, make_model(dtype=torch.bfloat16), prefill=False),
        lambda: prepared(tmp_path, make_model(rms_norm_eps=1e-3), prefill=False),  # in no tensor's shape
        lambda: prepared(tmp_path, params=FILTERED, prefill=False),
        lambda: prepared(tmp_path, max_num_seqs=4, prefill=False),
        lambda: prepared(tmp_path, max_seq_len=MAX_SEQ_LEN + 1, prefill=False),
    ]
    for count, vary in enumerate(variations, start=1):
        vary()
        assert number_of_keys() == count
    for vary in variations:
        vary()
    assert number_of_keys() == len(variations)
    for name, other in (("torch.get_num_threads", lambda: 77), ("generate.artifacts.step_sources", lambda: "other")):
        monkeypatch.setattr(name, other)
        before = number_of_keys()
        prepared(tmp_path, prefill=False)
        assert number_of_keys() == before + 1


def test_those_unused_for_longest_go(tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "KEPT_PACKAGES", 2)
    for max_seq_len in (20, 21):
        prepared(tmp_path, prefill=False, max_seq_len=max_seq_len)
    old, older = sorted(kept_in(tmp_path).glob("*.pt2"), key=lambda path: -path.stat().st_mtime)
    os.utime(old, (1000, 1000))
    os.utime(older, (500, 500))
    prepared(tmp_path, prefill=False, max_seq_len=20)  # a hit is a use: the first made is now the newest
    prepared(tmp_path, prefill=False, max_seq_len=22)
    assert kinds(prepared(tmp_path, prefill=False, max_seq_len=20)) == ["loaded"]
    assert {path.suffix for path in kept_in(tmp_path).iterdir()} == {".pt2", ".sha256"}
    assert len(list(kept_in(tmp_path).iterdir())) == 4


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no")])
def test_an_interrupted_compilation_leaves_nothing(
    tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    stand_in.error = error
    with pytest.raises((KeyboardInterrupt, UserError)):
        prepared(tmp_path / "cache", prefill=False)
    assert not list(scratch.iterdir())
    assert not list(tmp_path.rglob("*.pt2"))


@pytest.mark.parametrize(("prefill", "flag"), [(True, "--compile-prefill"), (False, "--compile")])
def test_a_failed_compilation_is_one_line_that_names_the_flag(stand_in: StandIn, prefill: bool, flag: str) -> None:
    stand_in.error = AssertionError("C++ compile error\n\nCommand:\ng++ " + "-x " * 500 + "\na.cpp:1: error: no")
    with pytest.raises(UserError) as caught:
        prepared(None, prefill=prefill)
    text = str(caught.value)
    assert text.startswith(f"{flag}: compiling with {native_compiler()} failed: AssertionError: a.cpp:1: error: no; ")
    assert f"leave {flag} out" in text
    assert caught.value.__cause__ is stand_in.error
    stand_in.error = ValueError()
    with pytest.raises(UserError, match="no reason given"):
        prepared(None)


def test_compiling_in_the_middle_of_a_run_is_in_no_rate(stand_in: StandIn) -> None:
    stand_in.takes_s = 1
    engine = make_engine(make_model(), None)
    run(engine, ([1, 2, 3], GREEDY))
    ledger = engine.ledger
    assert ledger.phase_s["compile"] >= 2
    assert 0 < ledger.prefill_s + ledger.decode_s < ledger.phase_s["compile"]
    assert ledger.ttft_s is not None
    assert ledger.ttft_s >= 1  # but whoever asked has waited for it


# ---- Compilers and the directories that they are given. ----


def test_the_compiler_is_found_by_name_or_by_CXX(
    tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"there is no g\+\+ or clang\+\+ here"):
        prepared(None)
    clang = tmp_path / "clang++"
    clang.write_text("#!/bin/sh\n")
    clang.chmod(0o755)
    prepared(None, prefill=False)
    assert stand_in.compilers == [str(clang)]
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="CXX names no-such-compiler, which is not there"):
        native_compiler()


def test_a_compiler_is_needed_unless_one_has_left_something(
    tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(tmp_path, prefill=False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    check_can_compile(tmp_path)
    assert kinds(prepared(tmp_path, prefill=False)) == ["loaded"]
    for nothing in (None, tmp_path / "elsewhere"):
        with pytest.raises(UserError, match="no-such-compiler"):
            check_can_compile(nothing)


@pytest.fixture
def no_variables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # so that what the test sets is undone
        monkeypatch.delenv(name)
    yield
    artifacts._private_directory.cache_clear()


def test_compilers_keep_what_is_theirs_beside_what_is_ours(tmp_path: Path, no_variables: None) -> None:
    let_compilers_keep(tmp_path)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "triton")
    let_compilers_keep(tmp_path / "other")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "inductor")  # what is set stays


@pytest.mark.parametrize("full", [True, False], ids=["cannot be written", "no cache"])
def test_without_a_cache_compilers_get_a_private_directory(tmp_path: Path, no_variables: None, full: bool) -> None:
    (tmp_path / "inductor").write_text("a file")
    let_compilers_keep(tmp_path if full else None)
    place = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).parent
    assert Path(os.environ["TRITON_CACHE_DIR"]).parent == place
    assert tmp_path not in place.parents
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert place.name.startswith("torchchat-")


def test_a_steps_sources_are_all_in_the_key() -> None:
    """All of ours that a step imports, but not what reads configurations, which are in the key as data, nor the CPU's
    native products: a compiled step calls their op by name, and what the op then runs has a key of its own.
    """
    apart = ("config.", "model.config", "quant.native")
    reached: set[str] = set()
    todo = ["generate.step", "generate.backends", "model.transformer", "quant.experts", "quant.modules"]
    while todo:
        module = todo.pop()
        path = ROOT / f"{module.replace('.', '/')}.py"
        if module in reached or not path.is_file() or module.startswith(apart):
            continue
        reached.add(module)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                todo += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                todo += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    sources = {f"{module.replace('.', '/')}.py" for module in reached}
    # What flattens the tensors and names the keys, and the class of the configurations with its derived figures.
    beside = {"generate/artifacts.py", "generate/compilation.py", "generate/exported.py", "model/config_types.py"}
    assert sources | beside == set(STEP_SOURCES)
    assert not any(word in name for name in STEP_SOURCES for word in ("tokenizer", "loader", "default", "config_hf"))
