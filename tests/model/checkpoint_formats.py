"""The same tiny random model as a checkpoint of every format."""

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.config import LayerConfig, ModelConfig, RopeConfig

CONFIG = ModelConfig(
    family="llama",
    vocab_size=48,
    hidden_size=24,
    intermediate_size=40,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=16,
    layers=(LayerConfig("full", RopeConfig()),) * 2,
)
State = dict[str, Tensor]


def big_config() -> ModelConfig:
    return replace(
        CONFIG, vocab_size=8192, hidden_size=1024, intermediate_size=4096, num_attention_heads=16,
        num_key_value_heads=16, head_dim=64,
    )  # fmt: skip


def hf_state(config: ModelConfig, seed: int = 0) -> State:
    """A random model in Transformers' names, unfused."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    hidden, ffn = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    for i in range(len(config.layers)):
        at = f"model.layers.{i}."
        shapes |= {f"{at}input_layernorm.weight": (hidden,), f"{at}post_attention_layernorm.weight": (hidden,)}
        if config.post_norms:
            shapes |= {f"{at}pre_feedforward_layernorm.weight": (hidden,)}
            shapes |= {f"{at}post_feedforward_layernorm.weight": (hidden,)}
        shapes |= {f"{at}self_attn.q_proj.weight": (q, hidden), f"{at}self_attn.k_proj.weight": (kv, hidden)}
        shapes |= {f"{at}self_attn.v_proj.weight": (kv, hidden), f"{at}self_attn.o_proj.weight": (hidden, q)}
        if config.qkv_bias:
            shapes |= {f"{at}self_attn.{name}_proj.bias": (rows,) for name, rows in (("q", q), ("k", kv), ("v", kv))}
        if config.qk_norm:
            shapes |= {f"{at}self_attn.{name}_norm.weight": (config.head_dim,) for name in "qk"}
        shapes |= {f"{at}mlp.gate_proj.weight": (ffn, hidden), f"{at}mlp.up_proj.weight": (ffn, hidden)}
        shapes |= {f"{at}mlp.down_proj.weight": (hidden, ffn)}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Transformers' order of rotary rows to Meta's: row i and row i + d/2 of each head become neighbours."""
    size = rows.shape[0] // heads
    order = [head * size + half * (size // 2) + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return rows[order]


META_NAMES = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
}


def meta_state(state: State, config: ModelConfig) -> State:
    renamed: State = {}
    for name, tensor in state.items():
        if name.endswith("q_proj.weight"):
            tensor = interleave(tensor, config.num_attention_heads)
        if name.endswith("k_proj.weight"):
            tensor = interleave(tensor, config.num_key_value_heads)
        new = name.removeprefix("model.")
        for ours, theirs in META_NAMES.items():
            new = new.replace(ours, theirs)
        renamed[new] = tensor.contiguous()
    return renamed


def write_safetensors(path: Path, state: State, config: ModelConfig) -> Path:
    save_file(state, path / "model.safetensors")
    return path


def write_sharded(path: Path, state: State, save: Callable[[State, Path], None], name: str) -> Path:
    """Three shards, the tensors dealt out in turn, so that what is fused comes from different files."""
    stem, suffix = name.split(".")
    files = [f"{stem}-{i:05d}-of-00003.{suffix}" for i in range(1, 4)]
    weight_map = {key: files[i % 3] for i, key in enumerate(state)}
    for file in files:
        save({key: state[key] for key, where in weight_map.items() if where == file}, path / file)
    (path / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def write_sharded_safetensors(path: Path, state: State, config: ModelConfig) -> Path:
    return write_sharded(path, state, lambda part, file: save_file(part, file), "model.safetensors")


def write_torch(path: Path, state: State, config: ModelConfig) -> Path:
    torch.save(state, path / "pytorch_model.bin")
    return path


def write_sharded_torch(path: Path, state: State, config: ModelConfig) -> Path:
    return write_sharded(path, state, lambda part, file: torch.save(part, file), "pytorch_model.bin")


def write_meta(path: Path, state: State, config: ModelConfig) -> Path:
    torch.save(meta_state(state, config), path / "consolidated.00.pth")
    return path


def write_meta_shards(path: Path, state: State, config: ModelConfig, embedding_dim: int) -> Path:
    """Two pieces, split as Meta's tensor parallel layers are; `embedding_dim` is 1 in Llama 2 and 0 in Llama 3."""
    by_columns = ("wo.weight", "w2.weight") + (("tok_embeddings.weight",) if embedding_dim == 1 else ())
    for i in range(2):
        part: State = {"rope.freqs": torch.ones(3)}
        for name, tensor in meta_state(state, config).items():
            dim = 1 if name.endswith(by_columns) else 0
            part[name] = tensor.clone() if tensor.dim() == 1 else tensor.chunk(2, dim)[i].clone()
        torch.save(part, path / f"consolidated.{i:02d}.pth")
    return path


def write_llama2c_bin(path: Path, state: State, config: ModelConfig, version: int = 0) -> Path:
    state, n = meta_state(state, config), len(config.layers)
    vocab = -config.vocab_size if version == 0 and not config.tie_word_embeddings else config.vocab_size
    dims = (config.hidden_size, config.intermediate_size, n, config.num_attention_heads)
    header = struct.pack("<7i", *dims, config.num_key_value_heads, vocab, config.max_position_embeddings)
    attention = ("attention.wq", "attention.wk", "attention.wv", "attention.wo")
    ffn = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    rope = b""
    if version == 0:
        kinds = ("attention_norm", *attention, "ffn_norm", *ffn)
        names = ["tok_embeddings", *(f"layers.{i}.{kind}" for kind in kinds for i in range(n)), "norm"]
        rope = torch.full((config.max_position_embeddings * config.head_dim,), 7.0).numpy().tobytes()
    else:
        header = struct.pack("<Ii", 0x616B3432, 1) + header + bytes([config.tie_word_embeddings])
        header = header.ljust(256, b"\0")
        names = [f"layers.{i}.{kind}" for kind in ("attention_norm", "ffn_norm") for i in range(n)]
        names += ["norm", "tok_embeddings", *(f"layers.{i}.{kind}" for kind in (*attention, *ffn) for i in range(n))]
    file = path / "stories.bin"
    with file.open("wb") as out:
        out.write(header)
        for name in names:
            out.write(state[f"{name}.weight"].numpy().tobytes())
        out.write(rope)
        if not config.tie_word_embeddings:
            out.write(state["output.weight"].numpy().tobytes())
    return file


def write_llama2c_pt(path: Path, state: State, config: ModelConfig) -> Path:
    model = {f"_orig_mod.{name}": tensor for name, tensor in meta_state(state, config).items()}
    model |= {"_orig_mod.freqs_cos": torch.ones(3), "_orig_mod.freqs_sin": torch.ones(3)}
    checkpoint = {"model": model, "model_args": {"dim": config.hidden_size}, "iter_num": 3, "best_val_loss": 1.5}
    torch.save(checkpoint, path / "ckpt.pt")
    return path / "ckpt.pt"


def write_fused(path: Path, state: State, config: ModelConfig) -> Path:
    """As Phi-3 has them."""
    fused: State = {}
    for name, tensor in state.items():
        for parts, whole in ((("q_proj", "k_proj", "v_proj"), "qkv_proj"), (("gate_proj", "up_proj"), "gate_up_proj")):
            if parts[0] in name:
                fused[name.replace(parts[0], whole)] = torch.cat([state[name.replace(parts[0], p)] for p in parts])
                break
            if any(part in name for part in parts):
                break
        else:
            fused[name] = tensor
    return write_safetensors(path, fused, config)


WRITERS = {
    "safetensors": write_safetensors,
    "sharded safetensors": write_sharded_safetensors,
    "torch": write_torch,
    "sharded torch": write_sharded_torch,
    "meta": write_meta,
    "meta, 2 pieces as Llama 2": lambda p, s, c: write_meta_shards(p, s, c, 1),
    "meta, 2 pieces as Llama 3": lambda p, s, c: write_meta_shards(p, s, c, 0),
    "llama2.c bin": write_llama2c_bin,
    "llama2.c bin, version 1": lambda p, s, c: write_llama2c_bin(p, s, c, 1),
    "llama2.c pt": write_llama2c_pt,
    "fused": write_fused,
}
