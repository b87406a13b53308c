"""What a model is, as data: one frozen `ModelConfig` for every architecture. Knows no file format and no torch."""

from dataclasses import dataclass
from typing import Literal

AttentionKind = Literal["full", "sliding"]
RopeKind = Literal["default", "linear", "llama3", "yarn", "longrope"]
Activation = Literal["silu", "gelu_tanh", "gelu"]


@dataclass(frozen=True)
class RopeConfig:
    """One rotary embedding. `kind` and the parameters are those of Transformers' `rope_parameters`.

    `factor` is always resolved (a file may leave it to max_position_embeddings / original_max_position_embeddings);
    `attention_factor` is None where the formula of the kind decides.
    """

    theta: float = 10_000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    partial_rotary_factor: float = 1.0


@dataclass(frozen=True)
class LayerConfig:
    """What may differ from layer to layer. `rope` is None for a layer without positions (NoPE)."""

    attention: AttentionKind
    rope: RopeConfig | None
    experts: bool = False
    """Whether its feed-forward is a mixture of experts."""


@dataclass(frozen=True)
class ModelConfig:
    """The architecture, in Transformers' names where it has them."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    layers: tuple[LayerConfig, ...]
    # Which of a checkpoint's layers these are, where it has others too (for images); () where it has no others.
    stored_layers: tuple[int, ...] = ()
    # Rows at the end of a checkpoint's embedding that no text uses.
    stored_extra_embeddings: int = 0
    rms_norm_eps: float = 1e-5
    # Gemma multiplies by (1 + weight), in float32, before it rounds; the others by weight, after.
    norm_plus_one: bool = False
    # Gemma also normalizes what attention and feed-forward put out, before the residual is added.
    post_norms: bool = False
    # RMSNorm over each head of q and k (Qwen3, Gemma 3).
    qk_norm: bool = False
    # Over all heads of a token at once instead (OLMoE).
    qk_norm_whole: bool = False
    hidden_act: Activation = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    # A query sees itself and the sliding_window - 1 positions before it. None where no layer slides.
    sliding_window: int | None = None
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    # Of a mixture: the experts of a layer, how many of them a token goes through, how wide each is, and whether their
    # weights are made to sum to one.
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
