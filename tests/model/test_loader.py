"""Every format gives the same parameters; every damage is one line; memory is the model plus one tensor."""

import json
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from config.errors import UserError
from model.checkpoint import find_checkpoint
from model.config import ModelConfig
from model.loader import Source, load_weights
from model.transformer import Transformer
from tests.model.checkpoint_formats import (
    CONFIG,
    WRITERS,
    State,
    big_config,
    hf_state,
    write_llama2c_bin,
    write_meta_shards,
    write_safetensors,
    write_sharded_safetensors,
    write_torch,
)

CPU = torch.device("cpu")


def meta_model(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


def load(config: ModelConfig, path: Path, dtype: torch.dtype = torch.float32) -> State:
    model = meta_model(config)
    load_weights(model, path, CPU, dtype)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    return dict(model.named_parameters())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("format_", WRITERS)
def test_every_format_gives_the_same_parameters(tmp_path: Path, format_: str, tied: bool) -> None:
    config = replace(CONFIG, tie_word_embeddings=tied)
    state = hf_state(config)
    loaded = load(config, WRITERS[format_](tmp_path, state, config))
    assert ("lm_head.weight" in loaded) is not tied
    for i in range(2):
        theirs, ours = f"model.layers.{i}.", f"layers.{i}."
        qkv = torch.cat([state[f"{theirs}self_attn.{name}_proj.weight"] for name in "qkv"])
        gate_up = torch.cat([state[f"{theirs}mlp.{name}_proj.weight"] for name in ("gate", "up")])
        assert torch.equal(loaded[f"{ours}attention.qkv_proj.weight"], qkv)
        assert torch.equal(loaded[f"{ours}feed_forward.gate_up_proj.weight"], gate_up)
        for name, where in {
            "attention.o_proj": "self_attn.o_proj",
            "feed_forward.down_proj": "mlp.down_proj",
            "attention_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
        }.items():
            assert torch.equal(loaded[f"{ours}{name}.weight"], state[f"{theirs}{where}.weight"]), name
    assert torch.equal(loaded["embed_tokens.weight"], state["model.embed_tokens.weight"])
    assert torch.equal(loaded["norm.weight"], state["model.norm.weight"])
    if not tied:
        assert torch.equal(loaded["lm_head.weight"], state["lm_head.weight"])


def test_tied_weights_stay_one_parameter(tmp_path: Path) -> None:
    config = replace(CONFIG, tie_word_embeddings=True)
    model = meta_model(config)
    # Many tied checkpoints hold the output all the same.
    state = hf_state(CONFIG)
    load_weights(model, write_safetensors(tmp_path, state, config), CPU, torch.float32)
    assert model.lm_head.weight is model.embed_tokens.weight


def test_gemma_norms_biases_and_head_norms_find_their_places(tmp_path: Path) -> None:
    config = replace(CONFIG, post_norms=True, qk_norm=True, qkv_bias=True)
    state = hf_state(config)
    loaded = load(config, write_safetensors(tmp_path, state, config))
    for name, where in {
        "attention_norm.weight": "input_layernorm.weight",
        "attention_post_norm.weight": "post_attention_layernorm.weight",
        "ffn_norm.weight": "pre_feedforward_layernorm.weight",
        "ffn_post_norm.weight": "post_feedforward_layernorm.weight",
        "attention.q_norm.weight": "self_attn.q_norm.weight",
        "attention.k_norm.weight": "self_attn.k_norm.weight",
    }.items():
        assert torch.equal(loaded[f"layers.1.{name}"], state[f"model.layers.1.{where}"]), name
    bias = torch.cat([state[f"model.layers.1.self_attn.{name}_proj.bias"] for name in "qkv"])
    assert torch.equal(loaded["layers.1.attention.qkv_proj.bias"], bias)


@pytest.mark.parametrize(
    ("prefix", "output"),
    [
        ("language_model.model.", "language_model.lm_head.weight"),
        ("model.language_model.", "lm_head.weight"),
        ("", "lm_head.weight"),
    ],
)
def test_the_language_model_is_found_in_a_larger_one(tmp_path: Path, prefix: str, output: str) -> None:
    state = hf_state(CONFIG)
    inner = {name.replace("model.", prefix, 1): t for name, t in state.items() if name != "lm_head.weight"}
    inner[output] = state["lm_head.weight"]
    inner |= {"vision_tower.layers.0.weight": torch.ones(2), "model.vision_tower.x": torch.ones(2)}
    inner["multi_modal_projector.weight"] = torch.ones(3)
    inner[f"{prefix}layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    (tmp_path / "plain").mkdir()
    expected = load(CONFIG, write_safetensors(tmp_path / "plain", state, CONFIG))
    loaded = load(CONFIG, write_safetensors(tmp_path, inner, CONFIG))
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_rounded_once_to_the_wanted_type(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    state = {name: tensor.to(stored) for name, tensor in hf_state(CONFIG).items()}
    loaded = load(CONFIG, write_safetensors(tmp_path, state, CONFIG), wanted)
    assert {tensor.dtype for tensor in loaded.values()} == {wanted}
    assert torch.equal(loaded["lm_head.weight"], state["lm_head.weight"].to(wanted))


def test_what_is_loaded_is_independent_of_the_file(tmp_path: Path) -> None:
    state = hf_state(CONFIG)
    loaded = load(CONFIG, write_safetensors(tmp_path, state, CONFIG))
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as opened:
        opened.write(b"\xff" * file.stat().st_size)
    assert torch.equal(loaded["norm.weight"], state["model.norm.weight"])


def test_safetensors_win_over_other_formats(tmp_path: Path) -> None:
    write_torch(tmp_path, hf_state(CONFIG, seed=1), CONFIG)
    state = hf_state(CONFIG, seed=2)
    write_sharded_safetensors(tmp_path, state, CONFIG)
    assert torch.equal(load(CONFIG, tmp_path)["norm.weight"], state["model.norm.weight"])


def test_each_tensor_is_heard_of_once_and_the_weight_of_a_module_comes_last(tmp_path: Path) -> None:
    config = replace(CONFIG, tie_word_embeddings=True, qkv_bias=True)
    model = meta_model(config)
    tensors: list[str] = []
    offered: list[str] = []

    def take(name: str, module: nn.Module, source: Source) -> bool:
        others = [p for key, p in module.named_parameters(recurse=False) if key != "weight"]
        assert not any(parameter.is_meta for parameter in others)
        offered.append(name)
        return False

    path = write_safetensors(tmp_path, hf_state(config), config)
    load_weights(model, path, CPU, torch.float32, tensors.append, take)
    assert sorted(tensors) == sorted(name for name, _ in model.named_parameters())
    assert offered == [name for name, m in model.named_modules() if "weight" in dict(m.named_parameters(recurse=False))]


@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("format_", WRITERS)
def test_a_weight_taken_by_rows_is_the_whole_weight(tmp_path: Path, rows: int, format_: str) -> None:
    """Fused, and permuted as Meta's are: some rows at a time are the rows of the whole."""
    path = WRITERS[format_](tmp_path, hf_state(CONFIG), CONFIG)
    expected = load(CONFIG, path)
    taken: dict[str, Tensor] = {}

    def take(name: str, module: nn.Module, source: Source) -> bool:
        taken[f"{name}.weight"] = torch.cat(list(source.blocks(rows)))
        return True

    model = meta_model(CONFIG)
    load_weights(model, path, CPU, torch.float32, take=take)
    assert all(torch.equal(weight, expected[name]) for name, weight in taken.items())
    assert sum(p.is_meta for p in model.parameters()) == len(taken) > 10


def test_a_directory_with_one_llama2c_file_is_that_file(tmp_path: Path) -> None:
    file = write_llama2c_bin(tmp_path, hf_state(CONFIG), CONFIG)
    (tmp_path / "tokenizer.bin").write_bytes(b"x")
    assert find_checkpoint(tmp_path).files == (file,)
    assert "norm.weight" in load(CONFIG, tmp_path)


# What is damaged, and what the one line says.


def refused(config: ModelConfig, path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load(config, path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def cut(file: Path, keep: float) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])


@pytest.mark.parametrize(("keep", "says"), [(0.0001, "cut short"), (0.02, "header"), (0.5, "in tensor 'model.layers.")])
def test_a_truncated_safetensors_file_is_named(tmp_path: Path, keep: float, says: str) -> None:
    write_safetensors(tmp_path, hf_state(CONFIG), CONFIG)
    cut(tmp_path / "model.safetensors", keep)
    message = refused(CONFIG, tmp_path)
    assert "model.safetensors" in message
    assert says in message


@pytest.mark.parametrize("format_", ["torch", "meta", "llama2.c pt"])
@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
def test_a_truncated_zip_is_named(tmp_path: Path, format_: str, keep: float) -> None:
    path = WRITERS[format_](tmp_path, hf_state(CONFIG), CONFIG)
    file = path if path.is_file() else next(path.iterdir())
    cut(file, keep)
    assert file.name in refused(CONFIG, path)


def test_a_llama2c_file_of_the_wrong_size_is_named(tmp_path: Path) -> None:
    file = write_llama2c_bin(tmp_path, hf_state(CONFIG), CONFIG)
    size = file.stat().st_size
    data = file.read_bytes()
    file.write_bytes(data + b"\0\0\0\0")
    assert f"too long: its header asks for {size} bytes, and {size + 4} are there" in refused(CONFIG, file)
    file.write_bytes(data[: size // 2])
    assert "cut short in tensor 'layers." in refused(CONFIG, file)
    file.write_bytes(data[:20])
    assert "truncated" in refused(CONFIG, file)
    file.write_bytes(struct.pack("<7i", 24, 40, 2, 5, 2, 48, 16) + bytes(100))
    assert "is not a llama2.c model" in refused(CONFIG, file)


def test_a_quantized_llama2c_export_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(struct.pack("<Ii", 0x616B3432, 2) + bytes(300))
    assert "version 2" in refused(CONFIG, tmp_path / "model.bin")


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    state = hf_state(CONFIG)
    name = "model.layers.1.self_attn.k_proj.weight"
    for change, says in (
        ({k: v for k, v in state.items() if k != name}, f"tensor '{name}' is missing"),
        (
            state | {name: torch.zeros(5, 24)},
            f"tensor '{name}' has shape [5, 24], where the configuration asks for [12, 24]",
        ),
        (state | {name: state[name].T.contiguous()}, "has shape [24, 12], where the configuration asks for [12, 24]"),
        (state | {name: torch.zeros(())}, "has shape []"),
        (state | {"model.layers.2.x": torch.zeros(3)}, "tensor 'model.layers.2.x' is no part of the model"),
        (state | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(24)}, "q_proj.bias' is no part of the model"),
        (state | {name: state[name].to(torch.int8)}, "is of type I8"),
        (state | {"model.layers.0.mlp.up_proj.qweight": torch.zeros(2)}, "is quantized already (GPTQ or AWQ"),
        (state | {name.replace("weight", "weight.absmax"): torch.zeros(2)}, "is quantized already (bitsandbytes"),
    ):
        message = refused(CONFIG, write_safetensors(tmp_path, change, CONFIG))
        assert says in message
        assert str(tmp_path) in message


def test_nothing_is_allocated_for_a_checkpoint_that_does_not_fit(tmp_path: Path) -> None:
    heard: list[str] = []
    model = meta_model(CONFIG)
    state = hf_state(CONFIG) | {"lm_head.weight": torch.zeros(2, 2)}
    with pytest.raises(UserError):
        load_weights(model, write_safetensors(tmp_path, state, CONFIG), CPU, torch.float32, heard.append)
    assert not heard
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_shard_outside_the_directory_is_refused(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    for shard in ("../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 3, "x\n"):
        index.write_text(json.dumps({"weight_map": {"a": shard}}))
        assert "not the name of a file beside it" in refused(CONFIG, tmp_path)


def test_missing_shards_and_pieces_are_named(tmp_path: Path) -> None:
    write_sharded_safetensors(tmp_path, hf_state(CONFIG), CONFIG)
    second = tmp_path / "model-00002-of-00003.safetensors"
    data = second.read_bytes()
    second.unlink()
    assert "model-00002-of-00003.safetensors: missing" in refused(CONFIG, tmp_path)
    second.write_bytes((tmp_path / "model-00001-of-00003.safetensors").read_bytes())
    assert "which model-00001-of-00003.safetensors holds too" in refused(CONFIG, tmp_path)
    save_file({"other": torch.ones(1)}, second)
    assert "which the index says is there" in refused(CONFIG, tmp_path)
    second.write_bytes(data)
    index = tmp_path / "model.safetensors.index.json"
    for text, says in (("{}", "weight_map"), ("[1]", "not an object"), ("{", "not valid JSON"), ("<html>", "web page")):
        index.write_text(text)
        assert says in refused(CONFIG, tmp_path)


def test_missing_meta_pieces_are_named(tmp_path: Path) -> None:
    write_meta_shards(tmp_path, hf_state(CONFIG), CONFIG, 1)
    (tmp_path / "consolidated.00.pth").unlink()
    assert "consolidated.00.pth: missing" in refused(CONFIG, tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "consolidated.00.pth", "a.bin", "a.pt"])
def test_other_files_are_told_for_what_they_are(tmp_path: Path, name: str) -> None:
    for data, says in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n", "git-lfs pointer"),
        (b"<!DOCTYPE html><html><body>not found</body></html>", "web page"),
        (b"", "is empty"),
        (b"hello, this is a text and nothing else, but a long one, of more than a header", "is not"),
    ):
        (tmp_path / name).write_bytes(data)
        message = refused(CONFIG, tmp_path)
        assert name in message
        assert says in message


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    assert "no such file" in refused(CONFIG, tmp_path / "nowhere")
    assert "no weights here" in refused(CONFIG, tmp_path)
    for name in ("a.bin", "b.bin"):
        (tmp_path / name).write_bytes(b"x")
    assert "several files could be the weights (a.bin, b.bin)" in refused(CONFIG, tmp_path)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, ("touch owned",)


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Evil()}, tmp_path / "pytorch_model.bin")
    assert "system, which is code" in refused(CONFIG, tmp_path)
    assert not (tmp_path / "owned").exists()
    torch.save({"a": 3}, tmp_path / "pytorch_model.bin")
    assert "'a' is no tensor" in refused(CONFIG, tmp_path)
    torch.save([torch.ones(1)], tmp_path / "pytorch_model.bin")
    assert "is no model's state dict" in refused(CONFIG, tmp_path)
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert "old format" in refused(CONFIG, tmp_path)


MEASURE = """
import re, sys, threading, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.model.checkpoint_formats import big_config
from tests.model.test_loader import CPU, meta_model
from model.loader import Source, load_weights
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
model = meta_model(big_config())
before, peak, done = anonymous(), 0, threading.Event()
def sample():
    global peak
    while not done.wait(0.0005):
        peak = max(peak, anonymous())
thread = threading.Thread(target=sample)
thread.start()
load_weights(model, Path(sys.argv[1]), CPU, torch.bfloat16)
done.set(); thread.join()
print(max(peak, anonymous()) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("format_", ["sharded safetensors", "torch", "meta, 2 pieces as Llama 2", "llama2.c bin"])
def test_peak_memory_is_the_model_plus_one_tensor(tmp_path: Path, format_: str) -> None:
    """200 MB of float32 become 100 MB of bfloat16; the process's own memory holds no more than these and one tensor."""
    config = big_config()
    path = WRITERS[format_](tmp_path, hf_state(config), config)
    root = str(Path(__file__).parents[2])
    output = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), root], capture_output=True, text=True, check=True, cwd=root
    ).stdout
    parameters = list(meta_model(config).parameters())
    model_bytes = sum(2 * parameter.numel() for parameter in parameters)
    largest_in_file = 4 * config.vocab_size * config.hidden_size
    assert model_bytes * 0.95 < int(output) < model_bytes + largest_in_file + (8 << 20)
