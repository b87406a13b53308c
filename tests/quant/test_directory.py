"""A quantized model in a directory: what is loaded is what was quantized, whatever is wrong is one line, and both ways
take no more memory than they must."""

import hashlib
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cli import saving
from cli.builder import load_model, prepare, stored_model
from cli.quantize import ReceiptText
from cli.saving import job_of, save
from config.errors import UserError
from config.settings import BuildSettings, Setting
from model import device
from model.chat_files import own_templates
from model.config import from_hf, hf_document, load_config
from model.kv_cache import KVCache
from model.saved import Layout, TensorWriter
from model.transformer import Transformer
from quant.directory import FILE, FORMAT, read_receipt, read_stored
from quant.packed import pack
from quant.receipt import Receipt
from quant.recipe import read_recipe
from quant.schemes import SCHEMES
from tests.model.checkpoint_formats import CONFIG, WRITERS, hf_state
from tests.tiny_checkpoint import VOCAB, write_tiny_checkpoint

ROOT = Path(__file__).parents[2]
CPU = Setting("cpu", "--device")
INT8 = '{"linear:int8": {}}'


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model, untied with biases, tied, and with experts."""
    directory = tmp_path_factory.mktemp("models")
    made = {}
    for kind in ("untied", "tied", "experts"):
        path = made[kind] = write_tiny_checkpoint(directory / kind, experts=5 if kind == "experts" else 0)
        config = json.loads((path / "config.json").read_text())
        tensors = load_file(path / "model.safetensors")
        if kind == "tied":
            del tensors["lm_head.weight"]
        for name in [name for name in tensors if "_proj.weight" in name and kind == "untied"]:
            tensors[name.replace("weight", "bias")] = torch.linspace(-0.1, 0.1, len(tensors[name]))
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        config |= {"tie_word_embeddings": kind == "tied", "attention_bias": kind == "untied"}
        (path / "config.json").write_text(json.dumps(config | {"mlp_bias": kind == "untied"}))
    return made


@pytest.fixture(scope="module")
def made(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The untied model in 8 bits, fp32, without a receipt; not to be changed."""
    return written(models["untied"], INT8, "fp32", tmp_path_factory.mktemp("made") / "dir")


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    for file in (directory := tmp_path / "copied").parent.joinpath(made).iterdir():
        directory.mkdir(exist_ok=True)
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def settings(model: Path, recipe: str | None = None, dtype: str = "fast", where: Setting = CPU) -> BuildSettings:
    text = None if recipe is None else read_recipe(recipe, "--quantize").text
    return BuildSettings(str(model), where, Setting(dtype, "--dtype"), quantize=text, quantize_source="--quantize")


def written(model: Path, recipe: str, dtype: str, output: Path, text: ReceiptText | None = None) -> Path:
    save(job_of(prepare(settings(model, recipe, dtype)), output, text))
    return output


def load(model: Path, recipe: str | None = None, dtype: str = "fast") -> Transformer:
    return load_model(prepare(settings(model, recipe, dtype)), 32)


@torch.inference_mode()
def logits(model: Transformer) -> Tensor:
    """Of a prompt, and of one token after it."""
    dtype = model.norm.weight.dtype
    cache = KVCache.create(model.config, 1, 32, "cpu", dtype)
    slots = torch.zeros(1, dtype=torch.int64)
    tokens = torch.arange(0, VOCAB, 16)[None]
    prompt = model(tokens, slots, cache, slots, 17)
    return torch.cat([prompt, model(tokens[:, :1], slots + 17, cache, slots, 18)], dim=1)


def error(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


RECIPES = {key: json.dumps({key: {}}) for key in SCHEMES} | {
    "cpu": "cpu",
    "cpu-small": "cpu-small",
    "1 bit": '{"linear:afpwx": {"bitwidth": 1}}',
    "3 bits": '{"linear:a8wxdq": {"bitwidth": 3, "groupsize": -1, "has_weight_zeros": true}}',
    "some": '{"linear:int4": {"layers": "*.mlp.*"}, "linear:fp8": {"layers": "layers.0.attention.*"}, '
    '"embedding": {"bitwidth": 4}}',
}


@pytest.mark.parametrize("kind", ["untied", "tied", "experts"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_saved_is_fresh(recipe: str, dtype: str, kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    """Every scheme: the same parameters and the same logits, bit by bit, from the directory with no flags."""
    fresh = load(models[kind], RECIPES[recipe], dtype)
    loaded = load(written(models[kind], RECIPES[recipe], dtype, tmp_path / "dir"))
    ours, theirs = dict(loaded.named_parameters()), dict(fresh.named_parameters())
    assert list(ours) == list(theirs)
    for name, parameter in ours.items():
        assert parameter.dtype == theirs[name].dtype, name
        assert torch.equal(parameter.view(torch.uint8), theirs[name].view(torch.uint8)), name
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert logits(loaded).isfinite().all()
    assert torch.equal(logits(loaded), logits(fresh))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["untied", "tied", "experts"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_saved_on_a_gpu_is_fresh_there_and_loads_on_a_cpu(
    recipe: str, kind: str, models: dict[str, Path], tmp_path: Path
) -> None:
    cuda = Setting("cuda", "--device")
    prepared = prepare(settings(models[kind], RECIPES[recipe], "bf16", cuda))
    fresh = dict(load_model(prepared, 32).named_parameters())
    _, receipt = save(job_of(prepared, tmp_path / "dir", TEXT))
    assert receipt is not None
    assert receipt.device == "cuda"
    for place in (cuda, CPU):
        loaded = load_model(prepare(settings(tmp_path / "dir", where=place)), 32)
        for name, parameter in loaded.named_parameters():
            assert parameter.device.type == place.value
            assert torch.equal(parameter.cpu().view(torch.uint8), fresh[name].cpu().view(torch.uint8)), name
    assert logits(loaded).isfinite().all()


def test_a_shared_copy_is_stored_once_and_loaded_once(models: dict[str, Path], tmp_path: Path) -> None:
    path = written(models["tied"], "cpu", "bf16", tmp_path / "dir")
    assert not any(name.startswith("lm_head") for name in load_file(path / "model.safetensors"))
    model = load(path)
    assert dict(model.lm_head.named_parameters())["values"] is dict(model.embed_tokens.named_parameters())["values"]


def test_what_is_in_the_directory(models: dict[str, Path], made: Path) -> None:
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in made.iterdir()} == {*names, FILE}
    source = models["untied"]
    for name in names - {"model.safetensors", "config.json"}:
        assert (made / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((made / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    stored = read_stored(made)
    assert stored is not None
    assert (stored.recipe.text, stored.dtype, stored.source) == (read_recipe(INT8, "").text, "fp32", str(source))
    assert set(stored.versions) == {"torch", "torchao", "torchchat"}
    tensors = load_file(made / "model.safetensors")  # the library reads what we write
    assert tensors["layers.1.attention.qkv_proj.values"].dtype == torch.int8
    assert tensors["layers.1.attention.qkv_proj.scale"].dtype == torch.float32
    with safe_open(made / "model.safetensors", framework="pt") as opened:
        assert opened.metadata()["format"] == "torchchat"  # so that no other program takes it for its own


def test_chat_templates_come_along_wherever_they_are(tmp_path: Path) -> None:
    model = write_tiny_checkpoint(tmp_path / "model")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (model / "chat_template.json").write_text('{"chat_template": "old"}')
    saved = written(model, INT8, "fp32", tmp_path / "dir")
    texts = {name: template.text for name, template in own_templates(saved).items()}
    assert texts == {name: template.text for name, template in own_templates(model).items()}
    assert set(texts) == {"default", "tool_use"}
    assert (saved / "chat_template.json").read_text() == '{"chat_template": "old"}'


def test_a_recipe_s_device_and_dtype_are_not_the_directory_s(models: dict[str, Path], tmp_path: Path) -> None:
    recipe = '{"linear:int8": {}, "executor": "cpu", "precision": "fp16"}'
    stored = read_stored(written(models["tied"], recipe, "bf16", tmp_path / "dir"))
    assert stored is not None
    assert stored.recipe.device is stored.recipe.dtype is None
    assert stored.dtype == "bf16"


def test_the_file_with_the_weights_stands_for_its_directory(made: Path) -> None:
    assert torch.equal(logits(load(made / "model.safetensors")), logits(load(made)))


def test_what_is_loaded_is_independent_of_the_file(copied: Path) -> None:
    model = load(copied)
    before = logits(model)
    file = copied / "model.safetensors"
    with file.open("r+b") as opened:
        opened.write(b"\xff" * file.stat().st_size)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("stored", ["bf16", "fp16", "fp32"])
def test_fast_is_the_stored_dtype_and_another_is_converted_and_said(
    models: dict[str, Path], tmp_path: Path, stored: str
) -> None:
    path = written(models["untied"], INT8, stored, tmp_path / "dir")
    fast = prepare(settings(path))
    assert (fast.dtype.name, fast.dtype.why) == (stored, "fast: as stored")
    assert prepare(settings(path, dtype=stored)).dtype.why == "--dtype"
    other = "bf16" if stored == "fp32" else "fp32"
    assert prepare(settings(path, dtype=other)).dtype.why == f"--dtype; stored in {stored}"
    ours, theirs = (dict(load(path, dtype=dtype).named_parameters()) for dtype in (other, stored))
    for name, parameter in ours.items():
        floats = parameter.dtype.is_floating_point
        assert parameter.dtype == ({"bf16": torch.bfloat16, "fp32": torch.float32}[other] if floats else torch.int8)
        assert torch.equal(parameter, theirs[name].to(parameter.dtype))


@pytest.mark.parametrize(
    ("asked", "stored", "name", "why"),
    [
        ("fast", "bf16", "fp16", "fast: no bf16 here; stored in bf16"),
        ("fast16", "bf16", "fp16", "fast16: no bf16 here; stored in bf16"),
        ("fast", "fp32", "fp32", "fast: as stored"),
        ("fast16", "fp32", "fp16", "fast16: no bf16 here; stored in fp32"),
        ("fast16", "fp16", "fp16", "fast16: as stored"),
        ("bf16", "bf16", "bf16", "--dtype"),
    ],
)
def test_a_device_that_does_not_run_the_stored_dtype(
    asked: str, stored: str, name: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_bf16_hardware", lambda device: (False, "no bf16 here"))
    choice = device.resolve_dtype(Setting(asked, "--dtype"), torch.device("mps"), stored)
    assert (choice.name, choice.why) == (name, why)


def test_a_quantized_model_is_not_quantized_again(made: Path, tmp_path: Path) -> None:
    says = error(lambda: prepare(settings(made, INT8)))
    assert says.startswith(f"--quantize: {made} is quantized already")


# ---- What is wrong ----


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], object], metadata: dict[str, str] | None = None) -> None:
    file = path / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        said = opened.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=said | (metadata or {}))


NAME = "layers.0.attention.o_proj.values"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: tensors.pop(NAME), f"tensor '{NAME}' is missing"),
        (lambda tensors: tensors.update(more=torch.zeros(1)), "tensor 'more' is no part of the model"),
        (
            lambda tensors: tensors.update({NAME: tensors[NAME][1:].contiguous()}),
            f"tensor '{NAME}' is I8 [31, 32], where",
        ),
        (
            lambda tensors: tensors.update({NAME: tensors[NAME].view(torch.uint8)}),
            "is U8 [32, 32], where configuration",
        ),
        (lambda tensors: tensors.update({"norm.weight": torch.ones(32).half()}), "'norm.weight' is F16 [32], where"),
    ],
)
def test_tensors_that_do_not_fit_are_named(copied: Path, change: Callable[[Any], object], says: str) -> None:
    rewrite(copied, change)
    prepared = prepare(settings(copied))
    message = error(lambda: stored_model(prepared, copied))  # before anything is allocated
    assert says in message
    assert "model.safetensors" in message or "missing" in message


@pytest.mark.parametrize("keep", [0, 5, 300, 0.5, -1])
def test_a_truncated_file_is_told(copied: Path, keep: float) -> None:
    file = copied / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep) if 0 < keep < 1 else int(keep)])
    message = error(lambda: load(copied))
    assert "model.safetensors: is " in message
    assert "cut short" in message or "is empty" in message


def test_weights_of_another_recipe_are_told(copied: Path, made: Path) -> None:
    """Also where every tensor would fit."""
    document = json.loads((copied / FILE).read_text())
    document["recipe"] = {"linear:a8w8dq": {}}
    (copied / FILE).write_text(json.dumps(document))
    assert "says of its recipe otherwise than torchchat.json" in error(lambda: load(copied))
    document["recipe"], document["dtype"] = {"linear:int8": {}}, "bf16"
    (copied / FILE).write_text(json.dumps(document))
    assert "otherwise than torchchat.json" in error(lambda: load(copied))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"format": FORMAT + 1, "versions": {"torchchat": "9.1"}, "new": 1},
            "is 2 (torchchat 9.1), and this torchchat",
        ),
        ({"format": "1"}, '"format" is "1" (torchchat 0.1.0), and this torchchat reads 1'),
        ({"more": 1}, '"more" is unknown'),
        ({"recipe": ["x"]}, '"recipe" is not what torchchat writes'),
        ({"recipe": {"linear:in4": {}}}, 'unknown key "linear:in4", the nearest is "linear:int4"'),
        ({"recipe": {"precision": "bf16"}}, '"recipe" is not what'),
        ({"dtype": "int8"}, '"dtype" is not what'),
        ({"dtype": ["fp32"]}, '"dtype" is not what'),
        ({"source": None}, '"source" is not what'),
        ({"versions": {"torch": 2}}, '"versions" is not what'),
        ({"receipt": {}}, '"receipt" is not what'),
    ],
)
def test_a_wrong_torchchat_json_is_told(copied: Path, change: dict[str, Any], says: str) -> None:
    (copied / FILE).write_text(json.dumps(json.loads((copied / FILE).read_text()) | change))
    message = error(lambda: prepare(settings(copied)))
    assert says in message
    assert str(copied / FILE) in message


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "[" * 100_000, '{"format": 1, "x": "' + "x" * 2_000_000 + '"}', "\xff"]
)
def test_a_damaged_torchchat_json_is_told(copied: Path, text: str) -> None:
    (copied / FILE).write_text(text, encoding="latin-1")
    assert "is not what torchchat writes" in error(lambda: prepare(settings(copied)))


@pytest.mark.parametrize("key", ["recipe", "dtype", "source", "versions", "receipt"])
def test_a_missing_key_is_told(copied: Path, key: str) -> None:
    document = json.loads((copied / FILE).read_text())
    del document[key]
    (copied / FILE).write_text(json.dumps(document))
    assert f'"{key}" is missing' in error(lambda: prepare(settings(copied)))


def test_weights_without_torchchat_json_do_not_load(copied: Path) -> None:
    (copied / FILE).unlink()
    assert "whose torchchat.json is missing" in error(lambda: load(copied))


def test_what_schemes_store_is_what_this_format_says() -> None:
    """A recipe in a directory stands for these tensors for ever: who changes them raises FORMAT."""
    stored = {
        key: SCHEMES[key].format(read_recipe(json.dumps({key: {}}), "").entries[0].args).storage for key in SCHEMES
    }
    assert FORMAT == 1
    assert stored == {
        "linear:int8": ("int", 8, 0, False),
        "linear:int4": ("int", 4, 32, False),
        "linear:a8w4dq": ("int", 4, 32, False),
        "linear:a8wxdq": ("int", 4, 32, False),
        "linear:a8w8dq": ("int", 8, 0, False),
        "linear:fp8": ("fp8", 8, 0, False),
        "linear:fp8dq": ("fp8", 8, 0, False),
        "linear:afpwx": ("int", 4, 32, True),
        "embedding": ("int", 8, 0, False),
        "embedding:wx": ("int", 4, 32, True),
    }


@pytest.mark.parametrize(
    ("bits", "digest"), [(4, "29b956c3d613f107"), (2, "51532157482d5445"), (1, "1f137710d723c9b7")]
)
def test_how_numbers_are_packed_is_what_this_format_says(bits: int, digest: str) -> None:
    numbers = torch.arange(3 * 1100).mul(7919).remainder(1 << bits).sub(1 << (bits - 1)).view(3, 1100).to(torch.int8)
    assert FORMAT == 1
    assert hashlib.sha256(pack(numbers, bits).numpy().tobytes()).hexdigest()[:16] == digest


# ---- Writing ----


def test_a_file_is_written_in_any_order_and_by_rows(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.arange(21, dtype=torch.int8).view(7, 3),
        "wide": torch.randn(4, 5),
        "empty": torch.empty(0, 3),
        "bf16": torch.randn(3).bfloat16(),
        "fp8": torch.randn(2, 3).to(torch.float8_e4m3fn),
    }
    layout = Layout.of({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}, {"said": "so"})
    assert all(layout.offsets[name] % tensor.element_size() == 0 for name, tensor in tensors.items())
    file = tmp_path / "x.safetensors"
    with TensorWriter(file, layout) as writer:
        for name in ("fp8", "wide", "odd", "bf16", "empty"):
            writer.write(name, tensors[name].split(2))
    assert file.stat().st_size == layout.nbytes
    read = load_file(file)
    assert all(torch.equal(read[name].view(torch.uint8), tensors[name].view(torch.uint8)) for name in tensors)


@pytest.mark.parametrize("wrong", ["type", "rows", "twice", "missing"])
def test_a_file_that_would_be_wrong_is_our_own_mistake(tmp_path: Path, wrong: str) -> None:
    layout = Layout.of({"a": (torch.float32, (2, 2)), "b": (torch.float32, (1,))}, {})
    dtype = torch.half if wrong == "type" else torch.float32

    def write() -> None:
        with TensorWriter(tmp_path / "x.safetensors", layout) as writer:
            for _ in range(2 if wrong == "twice" else 1):
                writer.write("a", [torch.zeros(1 if wrong == "rows" else 2, 2, dtype=dtype)])

    with pytest.raises((AssertionError, KeyError)):
        write()


@pytest.mark.parametrize("format_", WRITERS)
def test_every_format_gives_a_config_that_says_the_same(tmp_path: Path, format_: str) -> None:
    """What llama2.c and Meta write has none: ours describes the same model."""
    path = WRITERS[format_](tmp_path, hf_state(CONFIG), CONFIG)
    if format_ == "llama2.c pt":
        args = {"dim": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 48, "max_seq_len": 16}
        torch.save(torch.load(path) | {"model_args": args}, path)
    if "llama2.c" in format_:
        assert from_hf(hf_document(path), "") == load_config(path)
    elif "meta" in format_:
        params = {"dim": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 48, "rope_theta": 5e5}
        params |= {"multiple_of": 8, "norm_eps": 1e-5, "use_scaled_rope": True}
        (tmp_path / "params.json").write_text(json.dumps(params))
        config = load_config(tmp_path)
        assert from_hf(hf_document(tmp_path), "") == config
        assert config.layers[0].rope is not None
        assert config.layers[0].rope.kind == "llama3"
    else:
        (tmp_path / "config.json").write_text('{"as": "it is"}')
        assert hf_document(path) == {"as": "it is"}


def test_a_failure_leaves_nothing(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(settings(models["untied"], INT8, "fp32"))
    wrote: list[str] = []

    def full(self: TensorWriter, name: str, blocks: object) -> None:
        wrote.append(name)
        if len(wrote) == 9:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorWriter, "write", full)
    with pytest.raises(OSError, match="No space left"):
        save(job_of(prepared, tmp_path / "dir", None))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_known_before_anything_is_written(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(settings(models["untied"], INT8, "fp32"))
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    message = error(lambda: job_of(prepared, tmp_path / "dir", None))
    assert "are needed there and 1 kB are free" in message
    assert list(tmp_path.iterdir()) == []


def test_licences_go_along(models: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in models["tied"].iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / "LICENSE.txt").write_text("terms")
    (source / "README.md").write_text("of another model")
    path = written(source, INT8, "fp32", tmp_path / "dir")
    assert (path / "LICENSE.txt").read_text() == "terms"
    assert not (path / "README.md").exists()


# ---- Receipts ----

TEXT = ReceiptText("some text", "0" * 64, ("The fox ran over the hill. " * 12, "And back again!"))


def test_a_receipt_is_kept_and_read(models: dict[str, Path], tmp_path: Path) -> None:
    sizes, receipt = save(job_of(prepare(settings(models["tied"], "cpu-small", "fp32")), tmp_path / "dir", TEXT))
    assert receipt is not None
    assert read_receipt(tmp_path / "dir") == receipt
    assert read_receipt(tmp_path / "dir" / "model.safetensors") == receipt
    assert (receipt.text, receipt.text_sha256, receipt.dtype, receipt.device) == (TEXT.name, TEXT.sha256, "fp32", "cpu")
    assert receipt.tokens == sum(
        len(part) for part in TEXT.texts
    )  # a byte is a token, and BOS comes before each window
    assert receipt.perplexity != receipt.perplexity_unquantized
    assert receipt.kl_divergence is not None
    assert receipt.kl_divergence > 0
    assert receipt.top1_agreement is not None
    assert 0 < receipt.top1_agreement <= 1
    assert sizes.receipt_s > 0


def test_a_model_without_a_receipt(made: Path, models: dict[str, Path]) -> None:
    assert read_receipt(made) is None
    assert read_receipt(models["tied"]) is None


def test_a_receipt_as_a_person_sees_it() -> None:
    receipt = Receipt("a text", "ab" * 32, 1234, 10.05, 10.0, 0.00123, 0.9876, "bf16", "cpu", {"torch": "2.13.0"})
    assert receipt.lines() == [
        "perplexity 10.05, unquantized 10 (+0.50%)",
        "KL divergence 0.00123 nats a token, top-1 agreement 98.76%",
        "on 1,234 tokens of a text (sha256 abababababab…), bf16 on cpu, torch 2.13.0",
    ]
    broken = replace(receipt, perplexity=None, kl_divergence=None, top1_agreement=None)
    assert broken.lines()[0] == "perplexity not a number, unquantized 10"
    assert Receipt.read(json.loads(json.dumps(broken.document())), "") == broken
    for key, value in (("perplexity", float("nan")), ("tokens", "3"), ("tokens", 0), ("versions", []), ("text", 1)):
        assert f'"{key}" is not what' in error(lambda: Receipt.read(receipt.document() | {key: value}, "x"))  # noqa: B023


# ---- Memory ----

MEASURE = """
import json, re, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from cli.builder import load_model, prepare
from config.settings import BuildSettings, Setting
import cli.saving
from quant.recipe import read_recipe
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
recipe = read_recipe(sys.argv[3], "") if len(sys.argv) > 3 else None
if recipe is not None:
    import torchao.quantization
settings = BuildSettings(sys.argv[2], Setting("cpu"), Setting("fast" if recipe is None else "bf16"),
                         quantize=recipe and recipe.text, quantize_source="")
prepared = prepare(settings, needs_tokenizer=False)
before = resident()
Path("/proc/self/clear_refs").write_text("5")
if recipe is None:
    load_model(prepared, 16)
else:
    cli.saving.save(cli.saving.job_of(prepared, Path(sys.argv[4]), None))
print(json.dumps([peak() - before, prepared.plan.nbytes]), "torchao" in sys.modules)
"""


def measured(*argv: object) -> tuple[int, int, bool]:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(ROOT), *map(str, argv)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    figures, imported = done.stdout.rsplit(" ", 1)
    peak, nbytes = json.loads(figures)
    return peak, nbytes, imported.strip() == "True"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_and_what_is_imported(tmp_path: Path) -> None:
    """200 MB of bf16, most of it in one table, become 100 MB: writing takes about the table in 8 bits and what of it is
    mapped, loading takes the quantized model. A process for each, seconds: torchao is not imported to load.
    """
    shape = {"vocab_size": 65536, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4}
    shape |= {"num_attention_heads": 8, "tie_word_embeddings": True, "max_position_embeddings": 64}
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **shape}))
    with (source / "model.safetensors").open("wb") as file:
        _write_zeros(file, shape)
    table = shape["vocab_size"] * shape["hidden_size"]
    writing, nbytes, _ = measured(source, "cpu", tmp_path / "dir")
    assert nbytes > 100 << 20
    assert writing < 3 * table + (48 << 20)
    loading, nbytes, torchao = measured(tmp_path / "dir")
    assert not torchao
    assert nbytes * 0.9 < loading < nbytes + (48 << 20)


def _write_zeros(file: Any, shape: dict[str, Any]) -> None:
    """A safetensors file of zeros in bf16, most of it a hole."""
    D, inner = shape["hidden_size"], shape["intermediate_size"]
    shapes = {"model.embed_tokens.weight": [shape["vocab_size"], D], "model.norm.weight": [D]}
    for i in range(shape["num_hidden_layers"]):
        at = f"model.layers.{i}."
        shapes |= {f"{at}self_attn.{name}_proj.weight": [D, D] for name in "qkvo"}
        shapes |= {f"{at}mlp.{name}_proj.weight": [inner, D] for name in ("gate", "up")}
        shapes |= {f"{at}mlp.down_proj.weight": [D, inner]}
        shapes |= {f"{at}{name}_layernorm.weight": [D] for name in ("input", "post_attention")}
    header, end = {}, 0
    for name, dims in shapes.items():
        begin, end = end, end + 2 * torch.Size(dims).numel()
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    file.write(struct.pack("<Q", len(text)) + text)
    file.truncate(8 + len(text) + end)
