"""GGUF files of tiny models, written as llama.cpp's converters write them, from what Transformers saves."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import sentencepiece
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize
from torch import Tensor

from tests.model.checkpoint_formats import interleave

Kind = GGMLQuantizationType
KindOf = Callable[[str, tuple[int, ...]], Kind]
ARCHITECTURES = {"mistral": "llama", "mixtral": "llama", "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3"}
INTERLEAVED = ("llama", "granite", "smollm3")

NAMES = {
    "model.embed_tokens": "token_embd",
    "lm_head": "output",
    "model.norm": "output_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts": "ffn",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA_NAMES = {
    **NAMES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def f32(name: str, shape: tuple[int, ...]) -> Kind:
    return Kind.F32


def gguf_state(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Transformers' tensors as GGUF has them."""
    family = ARCHITECTURES.get(config["model_type"], config["model_type"])
    names = GEMMA_NAMES if family in ("gemma2", "gemma3") else NAMES
    made = {}
    for name, tensor in state.items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        module, _, kind = name.rpartition(".")
        layer, leaf = "", module
        if module.startswith("model.layers."):
            _, _, number, leaf = module.split(".", 3)
            layer = f"blk.{number}."
        if family in INTERLEAVED and leaf.endswith(("q_proj", "k_proj")):
            heads = config["num_attention_heads" if leaf.endswith("q_proj") else "num_key_value_heads"]
            tensor = interleave(tensor, heads)
        if family.startswith("gemma") and kind == "weight" and names[leaf].endswith("norm"):
            tensor = tensor.float() + 1
        if leaf == "mlp.experts":
            parts = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}[kind]
            for part, half in zip(parts, tensor.chunk(len(parts), dim=1), strict=True):
                made[f"{layer}ffn_{part}_exps.weight"] = half.contiguous()
            continue
        made[f"{layer}{names[leaf]}.{kind}"] = tensor.contiguous()
    return made


def write_model(path: Path, source: Path, state: Mapping[str, Tensor], kind_of: KindOf = f32, **options: Any) -> Path:
    """The model in the directory `source`, whose weights are `state`, as a GGUF file."""
    config = json.loads((source / "config.json").read_text())
    return write(path, config, gguf_state(state, config), kind_of, **options)


def write(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    kind_of: KindOf = f32,
    *,
    tokenizer: Callable[[gguf.GGUFWriter], None] | None = None,
    extra: Callable[[gguf.GGUFWriter], None] | None = None,
    split_max_tensors: int = 0,
) -> Path:
    """config: as Transformers has it. tensors: as GGUF has them."""
    architecture = ARCHITECTURES.get(config["model_type"], config["model_type"])
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split_max_tensors)
    _write_config(writer, config, architecture)
    (tokenizer or _no_tokenizer)(writer)
    if extra is not None:
        extra(writer)
    for name, tensor in {**tensors, **dict(_rope_tensors(config))}.items():
        array = tensor.float().numpy()
        kind = Kind.F32 if array.ndim == 1 else kind_of(name, array.shape)
        writer.add_tensor(name, encoded(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def encoded(array: "np.ndarray[Any, Any]", kind: Kind) -> "np.ndarray[Any, Any]":
    """Numbers in a type; in those that nobody can write here, others of the same size, which are no less good."""
    try:
        return quantize(array, kind)
    except NotImplementedError:
        return random_blocks(array.shape, kind)


def random_blocks(shape: tuple[int, ...], kind: Kind, seed: int = 0) -> "np.ndarray[Any, Any]":
    """Random bytes, the scales of whose blocks are small."""
    block, size = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng([seed, *shape])
    raw = rng.integers(0, 256, (math.prod(shape) // block, size), dtype=np.uint8)
    scales = {Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,)}
    for at in scales.get(kind, (0,)):
        raw[:, at : at + 2] = rng.uniform(0.0005, 0.002, (len(raw), 1)).astype(np.float16).view(np.uint8)
    return raw.reshape(*shape[:-1], shape[-1] // block * size)


def _write_config(writer: gguf.GGUFWriter, config: Mapping[str, Any], architecture: str) -> None:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}
    full = rope.get("full_attention", rope)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_freq_base(full.get("rope_theta") or config["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * full.get("partial_rotary_factor", 1.0)))
    for key, add in {
        "embedding_multiplier": writer.add_embedding_scale,
        "residual_multiplier": writer.add_residual_scale,
        "attention_multiplier": writer.add_attention_scale,
        "logits_scaling": writer.add_logit_scale,
        "attn_logit_softcapping": writer.add_attn_logit_softcapping,
        "final_logit_softcapping": writer.add_final_logit_softcapping,
        "bos_token_id": writer.add_bos_token_id,
        "eos_token_id": writer.add_eos_token_id,
        "num_local_experts": writer.add_expert_count,
        "num_experts": writer.add_expert_count,
        "num_experts_per_tok": writer.add_expert_used_count,
        "moe_intermediate_size": writer.add_expert_feed_forward_length,
    }.items():
        if config.get(key) is not None:
            add(config[key])
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        writer.add_sliding_window(config["sliding_window"])
    if architecture == "gemma3":
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
    kind = full.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(full["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(full["original_max_position_embeddings"])
    if kind == "longrope":
        original = config["original_max_position_embeddings"]
        scale = config["max_position_embeddings"] / original
        writer.add_rope_scaling_orig_ctx_len(original)
        factor = full.get("attention_factor") or math.sqrt(1 + math.log(scale) / math.log(original))
        writer.add_rope_scaling_attn_factors(factor)


def _rope_tensors(config: Mapping[str, Any]) -> Iterable[tuple[str, Tensor]]:
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") == "longrope":
        for name in ("short", "long"):
            yield f"rope_factors_{name}.weight", torch.tensor(rope[f"{name}_factor"])
    if rope.get("rope_type") == "llama3":
        dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        original, factor = rope["original_max_position_embeddings"], rope["factor"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        divisors = []
        for i in range(0, dim, 2):
            turns = original * rope["rope_theta"] ** (-i / dim) / (2 * math.pi)
            smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
            divisors.append(1 / ((1 - smooth) / factor + smooth))
        yield "rope_freqs.weight", torch.tensor(divisors)


def _no_tokenizer(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("no_vocab")


# Tokenizers, as converters write them from the files of a directory.

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
Tokens = Callable[[gguf.GGUFWriter], None]


def sentencepiece_tokens(
    directory: Path, special: Iterable[str] = (), user_defined: Iterable[str] = (), padding: int = 0, **flags: bool
) -> Tokens:
    """The tokenizer.model in a directory. special, user_defined: pieces that its tokenizer_config.json calls so."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    pieces, scores, types = [], [], []
    for i in range(processor.vocab_size()):
        piece = processor.id_to_piece(i)
        asks = {UNKNOWN: processor.is_unknown, CONTROL: processor.is_control, BYTE: processor.is_byte}
        kind = next((kind for kind, is_kind in asks.items() if is_kind(i)), NORMAL)
        if piece in special:
            kind = CONTROL
        if piece in user_defined:
            piece, kind = piece.replace("▁", " "), USER_DEFINED
        pieces.append(piece)
        scores.append(processor.get_score(i))
        types.append(kind)
    for _ in range(padding):
        pieces.append(f"[PAD{len(pieces)}]")
        scores.append(-1000.0)
        types.append(UNUSED)

    def write_tokens(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(pieces)
        writer.add_token_scores(scores)
        writer.add_token_types(types)
        for name, value in flags.items():
            writer.add_bool(f"tokenizer.ggml.{name}", value)

    return write_tokens


def byte_level_tokens(file: Path, pre: str, padding: int = 0, **values: bool | int) -> Tokens:
    """A tokenizer.json of bytes that are merged."""
    document = json.loads(file.read_text())
    added = {token["id"]: token for token in document["added_tokens"]}
    by_id = {i: piece for piece, i in document["model"]["vocab"].items()} | {
        i: token["content"] for i, token in added.items()
    }
    size = max(by_id) + 1
    pieces = [by_id.get(i, f"[PAD{i}]") for i in range(size + padding)]
    types = [
        (CONTROL if added[i]["special"] else USER_DEFINED) if i in added else NORMAL if i in by_id else UNUSED
        for i in range(size + padding)
    ]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in document["model"]["merges"]]

    def write_tokens(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(pieces)
        writer.add_token_types(types)
        writer.add_token_merges(merges)
        for name, value in values.items():
            add = writer.add_bool if isinstance(value, bool) else writer.add_uint32
            add(f"tokenizer.ggml.{name}", value)

    return write_tokens
