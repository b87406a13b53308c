"""Tiny random models of every family, made by Transformers, with weights so wide that every feature shows."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

VOCAB = 97
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Case:
    """One tiny model: its Transformers class, what its configuration says, and how long its texts may be."""

    model_class: str
    config_class: str
    options: dict[str, Any] = field(default_factory=dict)
    # LongRoPE depends on the longest text that the cache is made for.
    max_seq_len: int = 48
    prompt: int = 24

    def config(self) -> Any:
        options = {**_COMMON, **self.options}
        if self.config_class == "Gemma3Config":
            vision = {
                "hidden_size": 8,
                "intermediate_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
                "image_size": 8,
                "patch_size": 4,
            }
            return transformers.Gemma3Config(text_config=options, vision_config=vision, mm_tokens_per_image=4)
        if self.config_class == "MllamaConfig":
            # Its pictures' encoder is kept small; nothing of it takes part in a text.
            vision = {
                "hidden_size": 8,
                "intermediate_size": 8,
                "num_hidden_layers": 1,
                "num_global_layers": 1,
                "attention_heads": 1,
                "image_size": 8,
                "patch_size": 4,
                "vision_output_dim": 16,
                "intermediate_layers_indices": [0],
            }
            return transformers.MllamaConfig(text_config=options, vision_config=vision, image_token_index=VOCAB)
        return getattr(transformers, self.config_class)(**options)

    def model(self) -> nn.Module:
        """The model in float32, its weights drawn wide, the same each time."""
        torch.manual_seed(1234)
        model: nn.Module = getattr(transformers, self.model_class)._from_config(
            self.config(), attn_implementation="eager"
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(_wide(name, parameter))
        return model.eval()

    def save(self, path: Path) -> nn.Module:
        """The model, saved to `path` as Transformers saves it."""
        model = self.model()
        model.save_pretrained(path)  # type: ignore[operator]
        return model


def _wide(name: str, like: torch.Tensor) -> torch.Tensor:
    noise = torch.randn_like(like)
    if name.endswith("norm.weight"):
        # Llama's norms multiply by the weight, Gemma's by one more: around one for both, and none the same.
        return 0.3 * noise + (like.mean().round() if like.numel() else 0)
    if name.endswith("bias"):
        return 0.5 * noise
    return (0.5 if "embed" in name else 0.3) * noise


def _case(family: str, **options: Any) -> Case:
    shape = {key: options.pop(key) for key in ("max_seq_len", "prompt") if key in options}
    return Case(f"{family}ForCausalLM", f"{family}Config", options, **shape)


def rope(kind: str = "default", theta: float = 10_000.0, **parameters: Any) -> dict[str, Any]:
    """`rope_parameters` as Transformers 5 spells them."""
    return {"rope_type": kind, "rope_theta": theta, **parameters}


_SHORT, _LONG = [1.0, 1.2, 1.5, 2.0], [1.5, 2.5, 4.0, 6.0]
_YARN = {"factor": 4.0, "original_max_position_embeddings": 256}

CASES: dict[str, Case] = {
    "llama2": _case("Llama", num_key_value_heads=4, rope_parameters=rope()),
    "codellama": _case("Llama", rope_parameters=rope(theta=1_000_000.0)),
    "llama3.2": _case(
        "Llama",
        tie_word_embeddings=True,
        head_dim=16,
        rope_parameters=rope(
            "llama3",
            theta=1000.0,
            factor=4.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "llama-biases": _case(
        "Llama", attention_bias=True, mlp_bias=True, head_dim=16, rope_parameters=rope("linear", factor=3.0)
    ),
    "llama-yarn": _case(
        "Llama", head_dim=16, max_position_embeddings=1024, rope_parameters=rope("yarn", theta=100.0, **_YARN)
    ),
    "llama-yarn-tuned": _case(
        "Llama",
        head_dim=16,
        max_position_embeddings=1024,
        rope_parameters=rope(
            "yarn", theta=100.0, beta_fast=8.0, beta_slow=0.5, mscale=0.7, mscale_all_dim=1.3, truncate=False, **_YARN
        ),
    ),
    "llama-yarn-factor": _case(
        "Llama",
        head_dim=16,
        max_position_embeddings=1024,
        rope_parameters=rope("yarn", theta=100.0, attention_factor=0.8, **_YARN),
    ),
    "mllama": Case(
        "MllamaForConditionalGeneration",
        "MllamaConfig",
        {
            "hidden_size": 64,
            "num_hidden_layers": 5,
            "cross_attention_layers": [1, 3],
            "rope_parameters": rope(
                "llama3",
                theta=1000.0,
                factor=4.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            ),
        },
    ),
    "mllama-text": Case(
        "MllamaForCausalLM",
        "MllamaTextConfig",
        {"num_hidden_layers": 3, "cross_attention_layers": [0], "rope_parameters": rope(theta=1000.0)},
    ),
    "mistral": _case("Mistral", sliding_window=7, head_dim=16, rope_parameters=rope()),
    "mistral-full": _case("Mistral", sliding_window=None, rope_parameters=rope()),
    "granite": _case(
        "Granite",
        embedding_multiplier=3.0,
        attention_multiplier=0.2,
        residual_multiplier=0.6,
        logits_scaling=0.5,
        tie_word_embeddings=True,
        attention_bias=True,
        rope_parameters=rope(),
    ),
    "qwen2": _case(
        "Qwen2",
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=7,
        max_window_layers=1,
        rope_parameters=rope(theta=1000.0),
    ),
    "qwen2-yarn": _case(
        "Qwen2", head_dim=16, max_position_embeddings=1024, rope_parameters=rope("yarn", theta=100.0, **_YARN)
    ),
    "qwen3": _case("Qwen3", head_dim=16, tie_word_embeddings=True, rope_parameters=rope()),
    "qwen3-biases": _case(
        "Qwen3",
        head_dim=16,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters=rope(),
    ),
    "mixtral": _case("Mixtral", num_local_experts=5, num_experts_per_tok=2, head_dim=16, rope_parameters=rope()),
    "mixtral-window": _case("Mixtral", num_local_experts=3, sliding_window=7, rope_parameters=rope()),
    "qwen3-moe": _case(
        "Qwen3Moe",
        num_hidden_layers=4,
        num_experts=6,
        num_experts_per_tok=3,
        moe_intermediate_size=16,
        norm_topk_prob=True,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
        head_dim=16,
        rope_parameters=rope(),
    ),
    "qwen3-moe-windows": _case(
        "Qwen3Moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        norm_topk_prob=False,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=7,
        tie_word_embeddings=True,
        rope_parameters=rope(),
    ),
    "olmoe": _case("Olmoe", num_experts=6, num_experts_per_tok=2, num_key_value_heads=4, rope_parameters=rope()),
    "olmoe-normalized": _case(
        "Olmoe", num_experts=4, num_experts_per_tok=2, norm_topk_prob=True, attention_bias=True, rope_parameters=rope()
    ),
    "phi3": _case("Phi3", sliding_window=7, rope_parameters=rope(partial_rotary_factor=1.0)),
    "phi3-short": _case(
        "Phi3",
        num_attention_heads=4,
        max_position_embeddings=64,
        original_max_position_embeddings=32,
        rope_parameters=rope("longrope", short_factor=_SHORT, long_factor=_LONG, partial_rotary_factor=1.0),
        max_seq_len=32,
        prompt=20,
    ),
    "phi3-long": _case(
        "Phi3",
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        rope_parameters=rope("longrope", short_factor=_SHORT, long_factor=_LONG, partial_rotary_factor=1.0),
    ),
    "phi4-mini": _case(
        "Phi3",
        hidden_size=64,
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        sliding_window=9,
        tie_word_embeddings=True,
        rope_parameters=rope(
            "longrope", short_factor=_SHORT, long_factor=_LONG, partial_rotary_factor=0.5, attention_factor=1.3
        ),
    ),
    "phi3-factor": _case(
        "Phi3",
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        rope_parameters=rope("longrope", short_factor=_SHORT, long_factor=_LONG, partial_rotary_factor=1.0, factor=9.0),
    ),
    "smollm3": _case("SmolLM3", num_hidden_layers=4, no_rope_layer_interval=2, rope_parameters=rope(theta=2000.0)),
    "smollm3-windows": _case(
        "SmolLM3",
        no_rope_layers=[1, 0],
        use_sliding_window=True,
        sliding_window=7,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
        rope_parameters=rope(),
    ),
    "gemma": _case("Gemma", head_dim=16, tie_word_embeddings=True, rope_parameters=rope()),
    "gemma2": _case(
        "Gemma2",
        num_hidden_layers=3,
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=7,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=6.0,
        rope_parameters=rope(),
    ),
    "gemma2-plain": _case(
        "Gemma2",
        head_dim=16,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        attention_bias=True,
        sliding_window=7,
        rope_parameters=rope(),
    ),
    "gemma3": Case(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            "num_hidden_layers": 3,
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 7,
            "sliding_window_pattern": 2,
            "final_logit_softcapping": 6.0,
            "rope_parameters": {
                "full_attention": rope("linear", theta=1000.0, factor=4.0),
                "sliding_attention": rope(theta=100.0),
            },
        },
    ),
    "gemma3-multimodal": Case(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "num_hidden_layers": 3,
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {"full_attention": rope(theta=1000.0), "sliding_attention": rope(theta=100.0)},
        },
    ),
}
