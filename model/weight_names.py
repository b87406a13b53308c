"""What checkpoints call the tensors that make up ours. Knows names, not tensors.

A parameter of ours is made of one tensor of the checkpoint or of several, one after another in its rows: q, k and v;
gate and up. Checkpoints name them in Transformers' way or in Meta's, which llama2.c shares.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from model.config import ModelConfig


@dataclass(frozen=True)
class Part:
    """One tensor of a checkpoint: its name and how many rows of ours it holds."""

    name: str
    rows: int
    interleaved_heads: int = 0
    """The number of heads whose rows alternate between the halves of a rotary pair; 0 when they are as ours."""


# Where Transformers' models are within a checkpoint; multimodal ones hold a language model.
PREFIXES = ("model.", "model.language_model.", "language_model.model.", "")
OUTPUTS = ("lm_head.weight", "language_model.lm_head.weight")
# What a multimodal checkpoint holds besides the language model.
NOT_TEXT = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")
# Buffers that older versions saved: functions of the configuration.
BUFFERS = re.compile(r"(.*\.)?rotary_emb\.inv_freq|rope\.freqs|freqs_(cis|cos|sin)")

# Marks of checkpoints that are quantized already: the end of a name -> what made it.
QUANTIZED = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".g_idx": "GPTQ",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".weight_scale": "FP8 or compressed-tensors",
    ".weight_scale_inv": "FP8",
    ".weight_packed": "compressed-tensors",
    ".values": "torchchat, whose torchchat.json is missing",
}

_HF = {
    "embed_tokens": "embed_tokens",
    "norm": "norm",
    "attention.o_proj": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feed_forward.down_proj": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
# Gemma's post_attention_layernorm comes after attention; the others' comes before the feed-forward.
_HF_POST_NORMS = {
    **_HF,
    "attention_post_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_post_norm": "post_feedforward_layernorm",
}
_META = {
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
    "norm": "norm",
    "attention.o_proj": "attention.wo",
    "attention.q_norm": "attention.q_norm",
    "attention.k_norm": "attention.k_norm",
    "feed_forward.down_proj": "feed_forward.w2",
    "attention_norm": "attention_norm",
    "ffn_norm": "ffn_norm",
}
_QKV: dict[str, tuple[str, str, str]] = {
    "hf": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "meta": ("attention.wq", "attention.wk", "attention.wv"),
}
_GATE_UP: dict[str, tuple[str, str]] = {
    "hf": ("mlp.gate_proj", "mlp.up_proj"),
    "meta": ("feed_forward.w1", "feed_forward.w3"),
}


class WeightNames:
    """The names that one checkpoint uses, known from those that it holds."""

    def __init__(self, names: Collection[str], config: ModelConfig) -> None:
        self._names, self._config = names, config
        self.style: Literal["hf", "meta"] = "meta" if "tok_embeddings.weight" in names else "hf"
        prefixes = PREFIXES if self.style == "hf" else ("",)
        self._prefix = next((prefix for prefix in prefixes if f"{prefix}embed_tokens.weight" in names), prefixes[0])
        self._output = next((name for name in OUTPUTS if name in names), OUTPUTS[0])

    def parts(self, parameter: str, rows: int) -> tuple[Part, ...]:
        """The tensors that make up a parameter of ours with this many rows, in the order of its rows."""
        module, _, kind = parameter.rpartition(".")
        layer, leaf = "", module
        if in_layer := re.fullmatch(r"(layers\.\d+\.)(.+)", module):
            layer, leaf = in_layer[1], in_layer[2]
        if leaf == "attention.qkv_proj":
            return self._qkv(layer, kind, rows)
        if leaf == "feed_forward.gate_up_proj":
            fused = f"{self._prefix}{layer}mlp.gate_up_proj.{kind}"
            if fused in self._names:
                return (Part(fused, rows),)
            return tuple(Part(f"{self._prefix}{layer}{name}.{kind}", rows // 2) for name in _GATE_UP[self.style])
        if leaf == "lm_head" and self.style == "hf":
            return (Part(self._output, rows),)
        table = _META if self.style == "meta" else _HF_POST_NORMS if self._config.post_norms else _HF
        return (Part(f"{self._prefix}{layer}{table.get(leaf, leaf)}.{kind}", rows),)

    def _qkv(self, layer: str, kind: str, rows: int) -> tuple[Part, ...]:
        fused = f"{self._prefix}{layer}self_attn.qkv_proj.{kind}"
        if fused in self._names:
            return (Part(fused, rows),)
        config = self._config
        q, k, v = (f"{self._prefix}{layer}{name}.{kind}" for name in _QKV[self.style])
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        meta = self.style == "meta"
        return (
            Part(q, heads * config.head_dim, heads if meta else 0),
            Part(k, kv_heads * config.head_dim, kv_heads if meta else 0),
            Part(v, kv_heads * config.head_dim),
        )

    def may_be_unused(self, name: str) -> bool:
        """Whether a tensor is known to be nothing that the model needs."""
        if self._config.tie_word_embeddings and name in (*OUTPUTS, "output.weight"):
            return True
        return bool(BUFFERS.fullmatch(name) or NOT_TEXT.match(name))


def quantized_by(names: Collection[str]) -> tuple[str, str] | None:
    """The first tensor that only a quantized checkpoint has, and what made it; None for plain weights."""
    for name in names:
        for mark, maker in QUANTIZED.items():
            if name.endswith(mark) or ".quant_state.bitsandbytes" in name:
                return name, "bitsandbytes" if "quant_state" in name else maker
    return None
