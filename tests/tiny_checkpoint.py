"""A model that fits in a second and in a few hundred kilobytes: random Llama weights in Hugging Face form, with a
tokenizer of bytes and a chat template."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

BOS, EOS, END_OF_TURN = 256, 257, 258
VOCAB = 272  # padded, as models are: the last ids have no token
CONTEXT = 128

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|turn|>{{ m.role }}: {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant: {% endif %}"
)


def write_tiny_checkpoint(directory: Path, *, chat: bool = True, bos: bool = True, experts: int = 0) -> Path:
    """Writes the model into `directory`, which is returned. experts: a mixture of so many, in Mixtral's form."""
    directory.mkdir(parents=True, exist_ok=True)
    hidden, layers, heads, kv_heads, head_dim, inner = 32, 2, 4, 2, 8, 48
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "bos_token_id": BOS if bos else None,
        "eos_token_id": EOS,
        "torch_dtype": "float32",
    }
    if experts:
        config |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
        config |= {"num_local_experts": experts, "num_experts_per_tok": 2}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"temperature": 0.9, "top_k": 40}))
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * 0.2

    tensors = {
        "model.embed_tokens.weight": matrix(VOCAB, hidden) * 5,
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": matrix(VOCAB, hidden),
    }
    for i in range(layers):
        prefix = f"model.layers.{i}"
        tensors |= {
            f"{prefix}.self_attn.q_proj.weight": matrix(heads * head_dim, hidden),
            f"{prefix}.self_attn.k_proj.weight": matrix(kv_heads * head_dim, hidden),
            f"{prefix}.self_attn.v_proj.weight": matrix(kv_heads * head_dim, hidden),
            f"{prefix}.self_attn.o_proj.weight": matrix(hidden, heads * head_dim),
            **_feed_forward(prefix, hidden, inner, experts, matrix),
            f"{prefix}.input_layernorm.weight": torch.ones(hidden),
            f"{prefix}.post_attention_layernorm.weight": torch.ones(hidden),
        }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(directory, chat=chat, bos=bos)
    return directory


def _feed_forward(
    prefix: str, hidden: int, inner: int, experts: int, matrix: Callable[[int, int], torch.Tensor]
) -> dict[str, torch.Tensor]:
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    if not experts:
        return {f"{prefix}.mlp.{name}_proj.weight": matrix(*shape) for name, shape in shapes.items()}
    moe, leaves = f"{prefix}.block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}
    each = {f"{moe}.experts.{i}.{leaves[name]}.weight": shapes[name] for i in range(experts) for name in shapes}
    return {name: matrix(*shape) for name, shape in {f"{moe}.gate.weight": (experts, hidden), **each}.items()}


def _write_tokenizer(directory: Path, *, chat: bool, bos: bool) -> None:
    # Byte-level BPE without merges: each byte is a token.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|bos|>", "<|eos|>", "<|turn|>"]
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in specials])
    tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|eos|>",
        "add_bos_token": bos,
        **({"bos_token": "<|bos|>"} if bos else {}),
        **({"chat_template": CHAT_TEMPLATE} if chat else {}),
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
