"""A model in a GGUF file is the model: its configuration, its weights, its logits as Transformers has them."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize as dequantize_by_package

from model.config import load_config
from model.gguf_blocks import BY_PACKAGE, DECODERS, dequantize
from model.kv_cache import KVCache
from model.loader import Source, load_weights
from model.transformer import Transformer
from tests.model.gguf_files import random_blocks, write_model
from tests.model.tiny import CASES, VOCAB, Case, rope

Kind = GGMLQuantizationType
CPU = torch.device("cpu")


def with_options(name: str, **options: Any) -> Case:
    return replace(CASES[name], options={**CASES[name].options, **options})


# What GGUF cannot say is left out: windows of Qwen, Gemma's scale of attention.
FAMILIES: dict[str, Case] = {
    **{name: CASES[name] for name in (
        "llama2", "codellama", "llama3.2", "llama-yarn", "mistral", "mistral-full", "granite", "qwen2-yarn", "qwen3",
        "phi3", "phi3-short", "phi3-long", "phi4-mini", "gemma",
    )},
    "llama-biases": CASES["llama-biases"],
    "qwen2": with_options("qwen2", use_sliding_window=False),
    "qwen3-biases": with_options("qwen3-biases", use_sliding_window=False, layer_types=None),
    "smollm3": with_options("smollm3", no_rope_layer_interval=4),
    "mixtral": CASES["mixtral"],
    "mixtral-window": CASES["mixtral-window"],
    "qwen3-moe": with_options("qwen3-moe", decoder_sparse_step=1),
    "olmoe": CASES["olmoe"],
    "gemma2": with_options("gemma2", query_pre_attn_scalar=16),
    "gemma3": with_options("gemma3", query_pre_attn_scalar=16),
}  # fmt: skip


def load(path: Path, dtype: torch.dtype = torch.float32) -> Transformer:
    with torch.device("meta"):
        model = Transformer(load_config(path))
    load_weights(model, path, CPU, dtype)
    return model.eval()


def logits(model: Transformer, tokens: torch.Tensor, length: int = 48) -> torch.Tensor:
    cache = KVCache.create(model.config, 1, length, CPU, model.norm.weight.dtype)
    zero = torch.zeros(1, dtype=torch.int64)
    with torch.inference_mode():
        return model(tokens, zero, cache, zero, tokens.shape[1])


def their_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(tokens, use_cache=False).logits
    return result.float()


def read_by_transformers(file: Path) -> Any:
    # It asks for a package that it does not use then.
    with patch.object(transformers.modeling_utils, "is_accelerate_available", lambda: True):
        return transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
        )


def prompt(length: int = 24) -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """A tiny model of the name in a directory, and Transformers' copy of it."""

    @cache
    def make(name: str) -> tuple[Path, Any]:
        directory = tmp_path_factory.mktemp(name)
        return directory, FAMILIES[name].save(directory)

    return make


@pytest.mark.parametrize("name", FAMILIES)
def test_the_model_in_a_gguf_file_is_the_model(name: str, saved: Any, tmp_path: Path) -> None:
    directory, theirs = saved(name)
    file = write_model(tmp_path / "m.gguf", directory, theirs.state_dict())
    tokens = prompt(FAMILIES[name].prompt)
    expected = their_logits(theirs, tokens)
    found = logits(load(file), tokens, FAMILIES[name].max_seq_len)
    assert expected.std() > 0.5
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "mistral-full"])
def test_the_configuration_is_that_of_config_json(name: str, saved: Any, tmp_path: Path) -> None:
    directory, theirs = saved(name)
    file = write_model(tmp_path / "m.gguf", directory, theirs.state_dict())
    found, expected = load_config(file), load_config(directory)
    assert replace(found, layers=()) == replace(expected, layers=())
    assert [layer.attention for layer in found.layers] == [layer.attention for layer in expected.layers]


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16])
def test_unquantized_weights_are_the_same_bits(kind: Kind, saved: Any, tmp_path: Path) -> None:
    directory, theirs = saved("llama2")
    file = write_model(tmp_path / "m.gguf", directory, theirs.state_dict(), lambda name, shape: kind)
    dtype = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}[kind]
    theirs_in_kind = {name: tensor.to(dtype) for name, tensor in theirs.state_dict().items()}
    model = load(file, dtype)
    with torch.device("meta"):
        same = Transformer(load_config(directory))
    load_weights(same, directory, CPU, dtype)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    assert torch.equal(model.embed_tokens.weight, theirs_in_kind["model.embed_tokens.weight"])


# Types.


@pytest.mark.parametrize("kind", [*DECODERS, *sorted(BY_PACKAGE)], ids=lambda kind: kind.name)
def test_every_type_is_decoded_as_the_package_does(kind: Kind) -> None:
    block, size = GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 256, (7, 3 * size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = dequantize_by_package(raw, kind)
    found = dequantize(torch.from_numpy(raw), kind)
    assert found.dtype == torch.float32
    assert found.shape == (7, 3 * block)
    same = found.numpy().view(np.uint32) == expected.view(np.uint32)
    assert (same | np.isnan(expected)).all()
    assert (np.isnan(found.numpy()) == np.isnan(expected)).all()


QUANTIZED = [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K,
             Kind.Q6_K]  # fmt: skip


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """With rows of whole blocks."""
    directory = tmp_path_factory.mktemp("wide")
    options = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    return directory, with_options("llama2", **options).save(directory)


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_quantized_weights_are_those_that_transformers_reads(kind: Kind, wide: Any, tmp_path: Path) -> None:
    directory, original = wide
    file = write_model(
        tmp_path / "m.gguf", directory, original.state_dict(), lambda name, shape: kind, tokenizer=tokens_alone
    )
    theirs = read_by_transformers(file)
    ours = load(file)
    state = theirs.state_dict()
    q, k, v = (state[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv")
    assert torch.equal(ours.layers[1].attention.qkv_proj.weight, torch.cat((q, k, v)))
    assert torch.equal(ours.layers[1].feed_forward.down_proj.weight, state["model.layers.1.mlp.down_proj.weight"])
    expected = their_logits(theirs, prompt())
    assert (logits(ours, prompt()) - expected).abs().max() < 1e-3 * expected.std()


def tokens_alone(writer: gguf.GGUFWriter) -> None:
    """What Transformers counts for the size of the vocabulary."""
    writer.add_tokenizer_model("no_vocab")
    writer.add_token_list([f"t{i}" for i in range(VOCAB)])


@pytest.mark.parametrize("rows", [1, 5, 64, 1000])
def test_quantized_weights_by_rows_are_the_whole(rows: int, wide: Any, tmp_path: Path) -> None:
    directory, original = wide
    file = write_model(
        tmp_path / "m.gguf", directory, original.state_dict(),
        lambda name, shape: Kind.Q4_K if "attn_k" in name else Kind.Q8_0,
    )  # fmt: skip
    expected = dict(load(file).named_parameters())
    taken: dict[str, torch.Tensor] = {}

    def take(name: str, module: torch.nn.Module, source: Source) -> bool:
        taken[f"{name}.weight"] = torch.cat(list(source.blocks(rows)))
        return True

    with torch.device("meta"):
        model = Transformer(load_config(file))
    load_weights(model, file, CPU, torch.float32, take=take)
    assert all(torch.equal(weight, expected[name]) for name, weight in taken.items())


def test_random_blocks_stand_for_sane_numbers() -> None:
    for kind in QUANTIZED:
        numbers = dequantize(torch.from_numpy(random_blocks((4, 256), kind)), kind)
        assert numbers.isfinite().all()


# Of a GGUF file Transformers takes less than is in it, and its own defaults for the rest.
THEIRS = {
    "llama": FAMILIES["llama2"],
    "qwen2": FAMILIES["qwen2"],
    "qwen3": with_options("qwen3", head_dim=128),
    "gemma2": with_options(
        "gemma2", head_dim=256, query_pre_attn_scalar=256, attn_logit_softcapping=50.0, final_logit_softcapping=30.0
    ),
    "gemma3": with_options(
        "gemma3",
        num_hidden_layers=6,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window_pattern=6,
        final_logit_softcapping=None,
        rope_parameters={"full_attention": rope(theta=1000.0), "sliding_attention": rope()},
    ),
}


@pytest.mark.parametrize("name", THEIRS)
def test_transformers_reads_the_file_alike(name: str, tmp_path: Path) -> None:
    original = THEIRS[name].save(tmp_path)
    file = write_model(tmp_path / "m.gguf", tmp_path, original.state_dict(), tokenizer=tokens_alone)
    theirs = read_by_transformers(file)
    assert (logits(load(file), prompt(16), 32) - their_logits(theirs, prompt(16))).abs().max() < 1e-4
