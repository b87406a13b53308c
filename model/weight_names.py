"""What checkpoints call the tensors that make up ours. Knows names, not tensors.

A parameter of ours is made of one tensor of the checkpoint or of several, one after another in its rows: q, k and v;
gate and up. Checkpoints name them in Transformers' way, in Meta's, which llama2.c shares, or in GGUF's.
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
    unused_rows: int = 0
    """Rows that it has at its end beside those."""
    experts: int = 0
    """The number of experts that it holds in a dimension of their own, before the rows of each; 0 without that."""
    expert: int | None = None
    """The one of them whose rows these are; None: all of them, one after the other."""


# Where Transformers' models are within a checkpoint; multimodal ones hold a language model.
PREFIXES = ("model.", "model.language_model.", "language_model.model.", "")
OUTPUTS = ("lm_head.weight", "language_model.lm_head.weight")
# What a multimodal checkpoint holds besides the language model.
NOT_TEXT = re.compile(r"(model\.)?(vision_tower|vision_model|multi_modal_projector)\.")
# Buffers that older versions saved: functions of the configuration.
BUFFERS = re.compile(
    r"(.*\.)?rotary_emb\.inv_freq|rope\.freqs|freqs_(cis|cos|sin)|rope_freqs\.weight|rope_factors_(long|short)\.weight"
)

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
_GGUF = {
    "embed_tokens": "token_embd",
    "lm_head": "output",
    "norm": "output_norm",
    "attention.o_proj": "attn_output",
    "attention.q_norm": "attn_q_norm",
    "attention.k_norm": "attn_k_norm",
    "attention_norm": "attn_norm",
    "attention_post_norm": "post_attention_norm",
    "feed_forward.down_proj": "ffn_down",
    "ffn_norm": "ffn_norm",
    "ffn_post_norm": "post_ffw_norm",
}
# Of these GGUF has q and k in Meta's order.
_GGUF_INTERLEAVED = ("llama", "mistral", "mixtral", "granite", "smollm3")
_TABLES = {"meta": _META, "gguf": _GGUF}
_QKV: dict[str, tuple[str, str, str]] = {
    "hf": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "meta": ("attention.wq", "attention.wk", "attention.wv"),
    "gguf": ("attn_q", "attn_k", "attn_v"),
}
_GATE_UP: dict[str, tuple[str, str]] = {
    "hf": ("mlp.gate_proj", "mlp.up_proj"),
    "meta": ("feed_forward.w1", "feed_forward.w3"),
    "gguf": ("ffn_gate", "ffn_up"),
}
# Where Transformers' mixtures of experts are within a layer, today's first, and what they call an expert's gate, up and
# down.
_MIXTURES = {"mlp": ("gate_proj", "up_proj", "down_proj"), "block_sparse_moe": ("w1", "w3", "w2")}
_GGUF_EXPERTS = {"gate_up_proj": ("ffn_gate", "ffn_up"), "down_proj": ("ffn_down",)}
# What Phi-3 has in their place.
_FUSED = {"hf": ("self_attn.qkv_proj", "mlp.gate_up_proj"), "gguf": ("attn_qkv", "ffn_up")}


class WeightNames:
    """The names that one checkpoint uses, known from those that it holds."""

    def __init__(self, names: Collection[str], config: ModelConfig) -> None:
        self._names, self._config = names, config
        marks: dict[str, Literal["meta", "gguf"]] = {"tok_embeddings.weight": "meta", "token_embd.weight": "gguf"}
        self.style: Literal["hf", "meta", "gguf"] = next((marks[name] for name in marks if name in names), "hf")
        prefixes = PREFIXES if self.style == "hf" else ("",)
        self._prefix = next((prefix for prefix in prefixes if f"{prefix}embed_tokens.weight" in names), prefixes[0])
        self._output = next((name for name in OUTPUTS if name in names), OUTPUTS[0])

    def parts(self, parameter: str, rows: int) -> tuple[Part, ...]:
        """The tensors that make up a parameter of ours with this many rows, in the order of its rows."""
        module, _, kind = parameter.rpartition(".")
        layer, leaf = "", module
        if in_layer := re.fullmatch(r"layers\.(\d+)\.(.+)", module):
            blocks = "blk" if self.style == "gguf" else "layers"
            layer, leaf = f"{blocks}.{self._stored_number(int(in_layer[1]))}.", in_layer[2]
        if leaf == "attention.qkv_proj":
            return self._qkv(layer, kind, rows)
        if leaf == "feed_forward.gate_up_proj":
            gate, up = (f"{self._prefix}{layer}{name}.{kind}" for name in _GATE_UP[self.style])
            fused = self._fused(layer, 1, kind)
            if fused in self._names and gate not in self._names:
                return (Part(fused, rows),)
            return (Part(gate, rows // 2), Part(up, rows // 2))
        if leaf == "feed_forward.router" or leaf.startswith("feed_forward.experts."):
            mixture = self._gguf_mixture if self.style == "gguf" else self._mixture
            return mixture(f"{self._prefix}{layer}", leaf.rpartition(".")[2], rows)
        if leaf == "lm_head" and self.style == "hf":
            return (Part(self._output, rows),)
        table = _TABLES.get(self.style, _HF_POST_NORMS if self._config.post_norms else _HF)
        unused_rows = self._config.stored_extra_embeddings if leaf == "embed_tokens" else 0
        return (Part(f"{self._prefix}{layer}{table.get(leaf, leaf)}.{kind}", rows, unused_rows=unused_rows),)

    def _stored_number(self, layer: int) -> int:
        """The number in the checkpoint of a layer of ours."""
        return self._config.stored_layers[layer] if self._config.stored_layers else layer

    def _fused(self, layer: str, which: int, kind: str) -> str:
        return f"{self._prefix}{layer}{_FUSED[self.style][which]}.{kind}" if self.style in _FUSED else ""

    def _qkv(self, layer: str, kind: str, rows: int) -> tuple[Part, ...]:
        fused = self._fused(layer, 0, kind)
        if fused in self._names:
            return (Part(fused, rows),)
        config = self._config
        q, k, v = (f"{self._prefix}{layer}{name}.{kind}" for name in _QKV[self.style])
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        interleaved = self.style == "meta" or (self.style == "gguf" and config.family in _GGUF_INTERLEAVED)
        return (
            Part(q, heads * config.head_dim, heads if interleaved else 0),
            Part(k, kv_heads * config.head_dim, kv_heads if interleaved else 0),
            Part(v, kv_heads * config.head_dim),
        )

    def _mixture(self, layer: str, what: str, rows: int) -> tuple[Part, ...]:
        """A router, or the gates and ups or the downs of all experts: in one tensor, or a tensor each."""
        place = next((place for place in _MIXTURES if f"{layer}{place}.gate.weight" in self._names), "mlp")
        if what == "router":
            return (Part(f"{layer}{place}.gate.weight", rows),)
        count, before = self._config.num_experts, f"{layer}{place}.experts."
        if before + what in self._names:
            return (Part(before + what, rows, experts=count),)
        gate, up, down = _MIXTURES[place]
        leaves = (gate, up) if what == "gate_up_proj" else (down,)
        each = rows // count // len(leaves)
        return tuple(Part(f"{before}{expert}.{leaf}.weight", each) for expert in range(count) for leaf in leaves)

    def _gguf_mixture(self, layer: str, what: str, rows: int) -> tuple[Part, ...]:
        """The same in GGUF: gates, ups and downs in a tensor each; older files have a tensor for each expert."""
        if what == "router":
            return (Part(f"{layer}ffn_gate_inp.weight", rows),)
        count, leaves = self._config.num_experts, _GGUF_EXPERTS[what]
        each = rows // count // len(leaves)
        if f"{layer}ffn_gate.0.weight" in self._names:
            return tuple(Part(f"{layer}{leaf}.{expert}.weight", each) for expert in range(count) for leaf in leaves)
        return tuple(
            Part(f"{layer}{leaf}_exps.weight", each, experts=count, expert=expert)
            for expert in range(count)
            for leaf in leaves
        )

    def may_be_unused(self, name: str) -> bool:
        """Whether a tensor is known to be nothing that the model needs."""
        if self._config.tie_word_embeddings and name in (*OUTPUTS, "output.weight"):
            return True
        if self._config.stored_layers:
            number = re.match(re.escape(self._prefix) + r"layers\.(\d+)\.", name)
            if number is not None and int(number[1]) not in self._config.stored_layers:
                return True
        return bool(BUFFERS.fullmatch(name) or NOT_TEXT.match(name))


def quantized_by(names: Collection[str]) -> tuple[str, str] | None:
    """The first tensor that only a quantized checkpoint has, and what made it; None for plain weights."""
    for name in names:
        for mark, maker in QUANTIZED.items():
            if name.endswith(mark) or ".quant_state.bitsandbytes" in name:
                return name, "bitsandbytes" if "quant_state" in name else maker
    return None
