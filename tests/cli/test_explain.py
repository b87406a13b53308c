"""`--explain`: what it says is what building then gives; nothing is loaded; one screen, or one document."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cli import builder, console, explain, measure, needs
from cli.builder import build, prepare
from cli.explain import patterns
from cli.main import main
from cli.needs import needs_of, planned_model
from config.settings import BuildSettings, Setting
from generate.stats import weight_bytes_per_token
from model.config import load_config
from model.device import Bandwidth
from model.kv_cache import bytes_read
from quant.recipe import read_recipe
from quant.schemes import SCHEMES
from tests.model.checkpoint_formats import CONFIG, WRITERS, hf_state
from tests.tiny_checkpoint import CONTEXT, write_tiny_checkpoint

ROOT = Path(__file__).parent.parent.parent
GUIDE = ROOT / "docs/model_customization.md"
READ_BYTES_S = 20e9
RECIPES = {
    "none": None,
    "cpu": "cpu",
    "cpu-small": "cpu-small",
    "some layers": '{"linear:int4": {"skip": "layers.0.*"}, "embedding:wx": {"bitwidth": 3}}',
    "one bit": '{"linear:a8wxdq": {"bitwidth": 1, "has_weight_zeros": true}}',
    "float8": '{"linear:fp8": {"layers": "*.feed_forward.*"}}',
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("models") / "experts", experts=5)


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """The machine's bandwidth is taken as known: to measure it is half a second a test."""
    monkeypatch.setenv("TORCHCHAT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(explain, "known_bandwidth", lambda device, directory, say: Bandwidth(40.0, READ_BYTES_S / 1e9))
    console.cache_dir_or_say.cache_clear()


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    for name in ("fill_parameters", "load_weights"):
        monkeypatch.setattr(builder, name, lambda *args: pytest.fail("weights are loaded"))
    monkeypatch.setattr(builder.KVCache, "create", _on_meta(builder.KVCache.create))


def _on_meta(create):
    def checked(config, slots, length, device, dtype):
        assert str(device) == "meta"
        return create(config, slots, length, device, dtype)

    return checked


def prepared(model, recipe=None, dtype="bf16", **changes):
    found = read_recipe(recipe, "--quantize") if recipe else None
    return prepare(
        BuildSettings(
            str(model), Setting("cpu", "--device"), Setting(dtype, "--dtype"), quantize=found and found.text, **changes
        )
    )


def text_of(capsys, *argv):
    """What the command prints, and the lines of it by part."""
    assert main(list(map(str, argv))) == 0
    out = capsys.readouterr().out
    return out, {part.splitlines()[0]: part.splitlines()[1:] for part in out.split("\n\n")}


def document_of(capsys, *argv):
    assert main([*map(str, argv), "--explain", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# ---- Right ----


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("model", ["tiny", "experts", "default"])
def test_bytes_are_exactly_those_of_what_is_then_built(tiny, experts, model, recipe):
    """The tiny model's output layer has a weight of its own, the built-in model's is tied."""
    found = prepared({"tiny": tiny, "experts": experts}.get(model, model), recipe, max_seq_len=100)
    needs = needs_of(found, 100)
    built = build(found)
    assert needs.weights == sum(parameter.nbytes for parameter in built.model.parameters())
    assert needs.weights_per_token == built.ledger.weight_bytes_per_token == weight_bytes_per_token(built.model)
    assert needs.cache == built.engine.cache.nbytes
    assert found.plan is None or needs.weights == found.plan.nbytes


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("kind", ["tiny", "experts"])
def test_the_layers_add_up_and_every_weight_is_told_of_once(tiny, experts, kind, recipe, capsys):
    model, flags = tiny if kind == "tiny" else experts, ["--quantize", recipe] if recipe else []
    document = document_of(capsys, "generate", model, "--device", "cpu", *flags)
    assert sum(group["bytes"] for group in document["layers"]) == document["memory"]["weight_bytes"]
    modules = [name for name, _ in planned_model(prepared(model, recipe)).named_parameters()]
    assert sum(group["count"] for group in document["layers"]) == len({n.rpartition(".")[0] for n in modules})
    plain = [group["count"] for group in document["layers"] if group["scheme"] not in SCHEMES]
    assert sum(entry["count"] for entry in document["not_quantized"]) == (sum(plain) if recipe else 0)


@pytest.mark.parametrize("recipe", [None, "cpu"])
def test_of_experts_a_token_reads_those_that_it_is_sent_to(experts, recipe):
    """Two of five: three fifths of all experts are not read, whatever they are stored as."""
    model = planned_model(prepared(experts, recipe))
    of_experts = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
    rest = sum(p.nbytes for name, p in model.named_parameters() if ".experts." not in name)
    table = sum(p.nbytes - p[0].nbytes for p in model.embed_tokens.parameters())
    assert weight_bytes_per_token(model) == of_experts * 2 // 5 + rest - table


def test_several_sequences_have_a_slot_each_and_one_for_padding(tiny):
    built = build(prepared(tiny, max_num_seqs=3, max_seq_len=64))
    found = needs_of(built.prepared, 64, 3)
    assert (found.slots, found.cache) == (built.engine.cache.num_slots, built.engine.cache.nbytes)
    assert measure.free_memory(torch.device("cpu")) > 0


def test_a_sliding_window_is_all_of_the_cache_that_a_layer_reads(tiny):
    config = load_config(tiny)
    whole = bytes_read(config, 100, torch.bfloat16)
    assert whole == 100 * bytes_read(config, 1, torch.bfloat16)
    one, other = config.layers
    mixed = replace(config, layers=(replace(one, attention="sliding"), other), sliding_window=10)
    assert bytes_read(mixed, 100, torch.bfloat16) == whole * 110 // 200


@pytest.mark.parametrize("format_", WRITERS)
def test_files_that_are_mapped_count_until_they_are_let_go(tmp_path, format_):
    """float32 in the file, twice what is made of it: pickles stay mapped as a whole, all else a tensor at a time."""
    tensors = hf_state(CONFIG)
    path = WRITERS[format_](tmp_path, tensors, CONFIG)
    base = prepared(write_tiny_checkpoint(tmp_path / "tiny"), dtype="bf16")
    loading = needs_of(replace(base, path=path, config=CONFIG), CONFIG.max_position_embeddings)
    file_bytes = sum(tensor.nbytes for tensor in tensors.values())
    largest = tensors["lm_head.weight"].nbytes  # and the last to be loaded
    if any(kind in format_ for kind in ("torch", "meta", "pt")):
        assert (loading.mapped, loading.loading) == (file_bytes, loading.weights + file_bytes)
    else:
        assert (loading.mapped, loading.loading) == (largest, loading.weights + largest)


PEAK = ["--max-seq-len", "512", "--device", "cpu", "--dtype", "bf16"]


@pytest.mark.slow  # processes of their own, which load and run a model of 110 million parameters: seconds each
@pytest.mark.skipif(sys.platform != "linux", reason="the constants were measured there, and a peak can be read there")
@pytest.mark.parametrize("recipe", [None, "cpu", "cpu-small"])
@pytest.mark.parametrize("command", ["bench", "generate"])
def test_the_peak_is_within_5_percent_of_what_the_process_then_takes(command, recipe, warm):
    argv = [command, *PEAK]
    if command == "bench":
        argv += ["--random-weights", "stories110m", "--prefill-tokens", "500", "--context", "400", "--repeats", "1"]
    else:
        argv += ["--prompt", "Once upon a time " * 80, "--max-new-tokens", "8"]
    argv += ["--quantize", recipe] if recipe else []

    def run(*more: str):
        environ = os.environ | {"OMP_NUM_THREADS": "1", "TORCHCHAT_CACHE_DIR": str(warm)}
        command = [sys.executable, "torchchat.py", *argv, "--json", *more]
        done = subprocess.run(
            command, cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout)

    real = run()
    explained = run("--explain")["memory"]
    figures = real if command == "bench" else real["stats"]
    assert explained["peak_memory_bytes"] == pytest.approx(figures["peak_memory_bytes"], rel=0.05)
    if command == "generate":
        assert explained["weight_bytes_per_token"] == figures["weight_bytes_per_token"]


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", [None, "cuda", "cuda-fast"])
def test_the_peak_on_a_gpu_is_within_5_percent(recipe, capsys):
    argv = ["bench", "--random-weights", "llama3.2-1b", "--device", "cuda", "--repeats", "1", "--max-seq-len", "5120"]
    argv += ["--quantize", recipe] if recipe else []
    explained = document_of(capsys, *argv)["memory"]
    assert main([*argv, "--json"]) == 0
    real = json.loads(capsys.readouterr().out)
    assert explained["peak_memory_bytes"] == pytest.approx(real["peak_memory_bytes"], rel=0.05)


def test_the_speed_is_that_of_reading_weights_and_cache(tiny, capsys):
    document = document_of(capsys, "generate", tiny, "--device", "cpu", "--dtype", "fp32", "--max-seq-len", "100")
    memory, speed = document["memory"], document["speed"]
    weights, cache = memory["weight_bytes_per_token"], memory["kv_cache_bytes"]
    assert speed["read_bytes_s"] == READ_BYTES_S
    assert speed["decode_tok_s_first"] == pytest.approx(READ_BYTES_S / (weights + cache / 100))
    assert speed["decode_tok_s_full"] == pytest.approx(READ_BYTES_S / (weights + cache))


def test_without_a_compiler_no_kernel_is_promised(tiny, capsys, monkeypatch):
    with_one = document_of(capsys, "generate", tiny, "--device", "cpu", "--quantize", "cpu")
    monkeypatch.setenv("CXX", "no-such-compiler")
    without = document_of(capsys, "generate", tiny, "--device", "cpu", "--quantize", "cpu")
    ways = [{g["computed_by"] for g in d["layers"] if g["scheme"] == "linear:int8"} for d in (with_one, without)]
    assert len(ways[0]) == 1
    assert ways[0].pop().startswith("own kernel (")
    assert ways[1] == {"PyTorch, the weight made anew"}


# ---- What it says ----


def test_each_setting_says_what_it_is_and_who_set_it(tiny, capsys, monkeypatch):
    monkeypatch.setenv("TORCHCHAT_COMPILE", "no")
    monkeypatch.setenv("TORCHCHAT_MAX_SEQ_LEN", "64")
    recipe = '{"linear:int8": {}, "precision": "fp32"}'
    settings = document_of(capsys, "generate", tiny, "--quantize", recipe, "--no-compile-prefill")["settings"]
    assert {name: (one["value"], one["source"]) for name, one in settings.items()} == {
        "model": ("tiny", "MODEL"),
        "device": (settings["device"]["value"], "default"),
        "dtype": ("fp32", 'quantize "precision"'),
        "compile": (False, "TORCHCHAT_COMPILE"),
        "compile_prefill": (False, "--no-compile-prefill"),
        "quantize": ({"linear:int8": {"groupsize": 0}, "precision": {"dtype": "fp32"}}, "--quantize"),
        "max_seq_len": (64, "TORCHCHAT_MAX_SEQ_LEN"),
    }
    assert settings["device"]["why"].startswith("fast: ")
    bench = document_of(capsys, "bench", "--random-weights", tiny, "--dtype", "fp32")["settings"]
    assert bench["model"]["source"] == "--random-weights"
    assert bench["quantize"] == {"value": None, "why": None, "source": "default"}


@pytest.mark.usefixtures("nothing_is_loaded")
def test_32_layers_fit_on_a_screen_and_nothing_is_loaded(capsys):
    argv = ["bench", "--random-weights", "llama3.1-8b", "--quantize", "cpu-small", "--device", "cpu", "--explain"]
    out, parts = text_of(capsys, *argv)
    assert len(out.splitlines()) <= 40
    assert max(map(len, out.splitlines())) <= 120
    assert list(parts) == ["settings", "layers", "not quantized", "memory", "speed"]
    feed_forward = next(line for line in parts["layers"] if "gate_up" in line)
    words = ["layers.*.feed_forward.gate_up_proj", "x32", "linear:int4", "g32", "[28672,", "4096]"]
    assert feed_forward.split()[:6] == words
    assert "one copy with embed_tokens" not in out  # this model's output layer is its own
    assert [line.split()[:3] for line in parts["not quantized"]] == [["x65", "a", "norm"]]


def test_explaining_imports_no_torchao():
    script = (
        "import sys; from cli.main import main\n"
        "assert main(['generate', '--quantize', 'cpu', '--prompt', 'a', '--explain']) == 0\n"
        "assert 'torchao' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["layers.0.a.b", "layers.1.a.b", "layers.2.a.b", "layers.3.a.b"], ["layers.*.a.b"]),
        (["layers.0.a", "layers.2.a", "layers.3.a", "norm"], ["layers.0,2-3.a", "norm"]),
        (["layers.1.a", "layers.1.b"], ["layers.1.a", "layers.1.b"]),
    ],
)
def test_names_of_several_blocks_become_a_pattern(names, expected):
    assert patterns(names, [f"layers.{i}.a" for i in range(4)]) == expected


def test_what_is_left_is_told_with_its_reason_once(tiny, capsys):
    recipe = '{"linear:int4": {"groupsize": 64, "skip": ["lm_head", "layers.1.*"]}}'
    document = document_of(capsys, "generate", tiny, "--device", "cpu", "--quantize", recipe)
    reasons = {entry["reason"]: (entry["count"], entry["names"][0]) for entry in document["not_quantized"]}
    assert reasons == {
        "no scheme for an embedding": (1, "embed_tokens"),
        "a norm": (5, "layers.0.attention_norm"),
        '"skip" of linear:int4': (5, "layers.1.attention.qkv_proj"),
    }
    _, parts = text_of(capsys, "generate", tiny, "--device", "cpu", "--quantize", recipe, "--explain")
    note = "    groupsize 64 does not divide its width 32: the last group of a row has 32 of 64"
    assert parts["layers"].count(note) == 3
    assert any(line.split()[:1] == ["layers.1.attention.qkv_proj"] for line in parts["layers"])


def test_what_does_not_fit_is_said_and_what_would(capsys, monkeypatch):
    argv = ["bench", "--random-weights", "llama3.2-1b", "--device", "cpu", "--dtype", "bf16", "--max-seq-len", "65536"]
    monkeypatch.setattr(measure, "free_memory", lambda device: int(4.6e9))
    _, parts = text_of(capsys, *argv, "--explain")
    assert re.fullmatch(
        r"  5.5\d GB are needed, and the cpu device has 4.6 GB free: --quantize cpu would need \S+ GB, "
        r"--quantize cpu-small would need \S+ GB, --max-seq-len \d+ would need 4.\d+ GB",
        parts["memory"][-1],
    )
    memory = document_of(capsys, *argv)["memory"]
    assert not memory["fits"]
    for one in memory["would_fit"]:
        flag, value = one["flags"].split()
        mended = document_of(capsys, *argv[:-2], *(argv[-2:] if flag != "--max-seq-len" else []), flag, value)["memory"]
        assert mended["fits"]
        assert mended["needed_bytes"] == one["needed_bytes"]
    monkeypatch.setattr(measure, "free_memory", lambda device: 10**8)
    _, parts = text_of(capsys, *argv, "--explain")
    assert parts["memory"][-1].endswith("it takes a smaller model, or another --device")


def test_compiling_takes_memory_of_its_own(tiny, capsys):
    eager, compiled = (
        document_of(capsys, "generate", tiny, "--device", "cpu", *flags)["memory"] for flags in ([], ["--compile"])
    )
    assert (eager["compiler_bytes"], compiled["compiler_bytes"]) == (0, needs.COMPILER_BYTES)


# ---- Every command, every model ----


@pytest.mark.usefixtures("nothing_is_loaded")
def test_quantize_explains_what_it_would_write_and_writes_nothing(tiny, capsys, tmp_path):
    argv = ["quantize", tiny, "--device", "cpu", "--quantize", "cpu", "--output", tmp_path / "out"]
    document = document_of(capsys, *argv)
    assert list(document["settings"]) == ["model", "device", "dtype", "quantize"]
    assert document["memory"]["weight_bytes"] > 0
    assert document["memory"]["kv_cache_bytes"] is None
    assert document["speed"]["decode_tok_s_full"] is None
    _, parts = text_of(capsys, *argv, "--explain")
    assert list(parts) == ["settings", "layers", "not quantized", "memory"]
    assert list(tmp_path.iterdir()) == [tmp_path / "cache"] or list(tmp_path.iterdir()) == []


def test_a_saved_model_says_where_its_recipe_is_from_and_how_good_it_is(tiny, capsys, tmp_path):
    made = ["--device", "cpu", "--dtype", "bf16", "--quantize", "cpu", "--output", str(tmp_path / "out")]
    assert main(["quantize", str(tiny), *made]) == 0
    capsys.readouterr()
    document = document_of(capsys, "generate", tmp_path / "out", "--device", "cpu")
    assert document["settings"]["quantize"]["source"] == "stored with the weights"
    assert document["receipt"]["tokens"] > 0
    built = build(prepared(tmp_path / "out", max_seq_len=CONTEXT))
    assert document["memory"]["weight_bytes"] == sum(parameter.nbytes for parameter in built.model.parameters())
    _, parts = text_of(capsys, "generate", tmp_path / "out", "--device", "cpu", "--explain")
    assert parts["quality"][0].startswith("  perplexity ")


@pytest.mark.parametrize("damage", ["config", "weights"])
def test_a_damaged_directory_is_one_line(damage, capsys, tmp_path):
    directory = write_tiny_checkpoint(tmp_path / "tiny")
    file = directory / {"config": "config.json", "weights": "model.safetensors"}[damage]
    file.write_bytes(file.read_bytes()[:-100])
    assert main(["generate", str(directory), "--explain"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert file.name in captured.err


# ---- The guide ----


def outline(out):
    """A text without what differs from machine to machine: of memory and speed only how the lines begin."""
    lines, part = [], ""
    for line in re.sub(r"own kernel \([^)]*\)", "own kernel", out).splitlines():
        part = line if line and not line.startswith(" ") else part
        lines.append(line.split()[:1] if part in ("memory", "speed") else line.split())
    return lines


def test_the_example_in_the_guide_is_what_it_prints(capsys):
    example = re.search(r"^    \$ torchchat (.* --explain)\n((?:    .*\n|\n)+)", GUIDE.read_text(), re.MULTILINE)
    assert example
    assert main(example[1].split()) == 0
    shown = "\n".join(line.removeprefix("    ") for line in example[2].splitlines())
    assert outline(shown.strip()) == outline(capsys.readouterr().out.strip())


def test_the_keys_of_the_document_are_in_the_list_of_commands(tiny, capsys):
    page = (ROOT / "docs/commands.md").read_text()
    described = page.partition("With `--json` it prints")[2].partition("\n## ")[0]
    document = document_of(capsys, "generate", tiny, "--device", "cpu", "--quantize", "cpu")
    keys = set(document) | {key for part in ("memory", "speed") for key in document[part]}
    keys |= {key for part in ("layers", "not_quantized") for key in document[part][0]}
    keys |= {key for one in document["settings"].values() for key in one} | set(document["settings"])
    assert keys <= set(re.findall(r'"(\w+)"', described))
