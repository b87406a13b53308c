"""A Hugging Face config.json -> ModelConfig: what each family computes, and what it takes for granted when a file is
silent. Reads only what it knows; a key that could change the result and is not known is refused by name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

from config.errors import UserError
from model.config_fields import Fields, shown
from model.config_moe import everywhere, read_experts, where_sparse
from model.config_rope import read_rope, read_rope_by_attention
from model.config_tables import (
    DEFAULTS,
    GEMMA,
    GEMMA2,
    GEMMA3,
    GRANITE,
    HARMLESS,
    LLAMA,
    MISTRAL,
    MIXTRAL,
    MLLAMA,
    NO_BIASES,
    OLMOE,
    ONLY,
    PHI3,
    QWEN,
    QWEN3_MOE,
    REASONS,
    SMOLLM3,
)
from model.config_types import Activation, AttentionKind, LayerConfig, ModelConfig, RopeConfig

_ACTIVATIONS: dict[object, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_LAYER_TYPES: dict[object, AttentionKind] = {"full_attention": "full", "sliding_attention": "sliding"}


@dataclass(frozen=True)
class _Shape:
    """What every family's reader needs of the part that is read first."""

    num_layers: int
    head_dim: int
    max_positions: int


@dataclass(frozen=True)
class _Family:
    """One architecture: its defaults (Transformers'), the keys with one possible value, and what it adds."""

    architecture: str
    read: Callable[[Fields, _Shape], dict[str, Any]]
    defaults: Mapping[str, object]
    only: Mapping[str, tuple[object, ...]] = field(default_factory=lambda: MappingProxyType({}))
    activation_key: str = "hidden_act"


def from_hf(config: Mapping[str, object], where: str) -> ModelConfig:
    """The model that a config.json describes; `where` names the file in errors. Raises UserError.

    Both spellings of the rotary parameters are read; omitted keys take Transformers' defaults for the family.
    """
    model_type = _model_type(config, where)
    if model_type in _MULTIMODAL:
        return _from_multimodal(config, where, model_type)
    family = _FAMILIES[model_type]
    fields = Fields(config, where, {**DEFAULTS, **family.defaults})
    fields.used |= {"model_type", "architectures"}

    heads = fields.integer("num_attention_heads")
    hidden_size = fields.integer("hidden_size")
    kv_heads = fields.optional_integer("num_key_value_heads") or heads
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", f"is {kv_heads}, which does not divide num_attention_heads ({heads})")
    head_dim = fields.optional_integer("head_dim")
    if head_dim is None:
        if hidden_size % heads:
            raise fields.error("hidden_size", f"is {hidden_size}, not a multiple of num_attention_heads ({heads})")
        head_dim = hidden_size // heads
    shape = _Shape(fields.integer("num_hidden_layers"), head_dim, fields.integer("max_position_embeddings"))

    own = family.read(fields, shape)
    bos_token_id, eos_token_ids = read_special_ids(fields)
    for key, allowed in {**ONLY, **family.only}.items():
        if fields.data.get(key) is not None:
            fields.choice(key, allowed)
    for key, reason in REASONS.items():
        if fields.data.get(key) is not None and key not in fields.used:
            raise fields.error(key, reason)
    result = ModelConfig(
        family=model_type,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=shape.max_positions,
        rms_norm_eps=fields.number("rms_norm_eps", above=0.0),
        hidden_act=_activation(fields, family.activation_key),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        bos_token_id=bos_token_id,
        eos_token_ids=eos_token_ids,
        **own,
    )
    fields.refuse_unread(HARMLESS, f"a {model_type} model")
    return result


def read_special_ids(fields: Fields) -> tuple[int | None, tuple[int, ...]]:
    """`bos_token_id` and `eos_token_id`, which is a number or a list, as both kinds of file have them."""
    eos = fields.get("eos_token_id")
    if isinstance(eos, list):
        numbered = Fields({f"eos_token_id[{i}]": value for i, value in enumerate(eos)}, fields.where)
        eos_ids = tuple(numbered.integer(key, minimum=0) for key in numbered.data)
    else:
        eos_ids = () if eos is None else (fields.integer("eos_token_id", minimum=0),)
    return fields.optional_integer("bos_token_id", minimum=0), tuple(dict.fromkeys(eos_ids))


def _model_type(config: Mapping[str, object], where: str) -> str:
    """The family, by `architectures`, or by `model_type` where that is missing; they must not disagree."""
    by_architecture = {family.architecture: name for name, family in _FAMILIES.items()}
    by_architecture |= {part.architecture: name for name, part in _MULTIMODAL.items()}
    architectures, model_type = config.get("architectures"), config.get("model_type")
    if architectures is not None and (not isinstance(architectures, list) or len(architectures) != 1):
        raise UserError(f"{where}: architectures is {shown(architectures)}, not a list of one name")
    if isinstance(architectures, list):
        key, name, known = "architectures", architectures[0], by_architecture
    else:
        key, name, known = "model_type", model_type, {name: name for name in by_architecture.values()}
        if name is None:
            raise UserError(f"{where}: neither architectures nor model_type is there to say what the model is")
    if not isinstance(name, str) or name not in known:
        near = get_close_matches(str(name), known, n=1, cutoff=0.3)
        hint = f"; the nearest is {near[0]}" if near else ""
        raise UserError(f"{where}: {key} {shown(name)} cannot be run here{hint}; known are {', '.join(known)}")
    if model_type is not None and model_type != known[name]:
        raise UserError(f"{where}: model_type is {shown(model_type)}, but {name} is of {known[name]!r}")
    return known[name]


def _from_multimodal(config: Mapping[str, object], where: str, model_type: str) -> ModelConfig:
    """A model of text and images with its vision part left out: the language model of `text_config`."""
    part = _MULTIMODAL[model_type]
    outer = Fields(config, where, part.defaults)
    outer.used |= {"model_type", "architectures", "vision_config", "mm_tokens_per_image", "vocab_size", "text_config"}
    outer.used |= {f"{token}_token_{kind}" for token in ("boi", "eoi", "image") for kind in ("index", "id")}
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise outer.error("text_config", f"is {shown(text)}, not an object")
    if text.get("final_logit_softcapping") is not None:
        # The multimodal class applies none, the text one does: what the weights were trained with is not known.
        raise outer.error("text_config.final_logit_softcapping", "is set, which this architecture does not apply")
    merged = {"model_type": part.text_type, **text}
    refused = [key for key in REASONS if key != "text_config"]
    for key in (*part.rules, *refused):
        # The outer object rules; the inner one has the defaults of a text model where it is written at all.
        value = outer.get(key)
        if value is not None:
            merged[key] = value
    text_defaults = _FAMILIES[part.text_type].defaults
    if "vocab_size" in config and config["vocab_size"] != {**text_defaults, **text}["vocab_size"]:
        raise outer.error("vocab_size", "differs from text_config.vocab_size")
    for key, allowed in ONLY.items():
        if outer.data.get(key) is not None:
            outer.choice(key, allowed)
    outer.refuse_unread(HARMLESS | part.ignored, f"a {model_type} model")
    return from_hf(merged, f"{where} (text_config)")


def _activation(fields: Fields, key: str) -> Activation:
    name = fields.choice(key, list(_ACTIVATIONS))
    if key != "hidden_act":
        # Gemma's files may carry both; hidden_activation rules.
        fields.used.add("hidden_act")
        other = fields.data.get("hidden_act")
        if other is not None and (not isinstance(other, str) or _ACTIVATIONS.get(other) != _ACTIVATIONS[name]):
            raise fields.error("hidden_act", f"is {shown(other)}, but {key} is {name!r}: leave one")
    return _ACTIVATIONS[name]


def _kinds(fields: Fields, shape: _Shape, computed: Sequence[AttentionKind], *, free: bool) -> list[AttentionKind]:
    """`layer_types`, or what the family computes where they are missing; `free`: whether they may differ from that."""
    given = fields.sequence("layer_types")
    if given is None:
        return list(computed)
    for name in given:
        if not isinstance(name, str) or name not in _LAYER_TYPES:
            known = ", ".join(map(str, _LAYER_TYPES))
            raise fields.error("layer_types", f"has {shown(name)}; only {known} can be run here")
    kinds = [_LAYER_TYPES[name] for name in given]
    if len(kinds) != shape.num_layers:
        raise fields.error("layer_types", f"has {len(kinds)} entries for {shape.num_layers} layers")
    if not free and kinds != list(computed):
        raise fields.error("layer_types", "says otherwise than sliding_window, which alone decides in this family")
    return kinds


def _layers(
    fields: Fields, kinds: Sequence[AttentionKind], ropes: Sequence[RopeConfig | None], window: int | None
) -> dict[str, Any]:
    if "sliding" in kinds and window is None:
        raise fields.error("layer_types", "names sliding_attention, but no sliding_window is in force")
    layers = tuple(LayerConfig(kind, rope) for kind, rope in zip(kinds, ropes, strict=True))
    return {"layers": layers, "sliding_window": window if "sliding" in kinds else None}


def _plain_layers(fields: Fields, shape: _Shape) -> dict[str, Any]:
    """All layers see everything (Llama, Granite)."""
    if fields.get("sliding_window") is not None:
        raise fields.error("sliding_window", "is set, but this family has none: it may be another architecture")
    rope = read_rope(fields, shape.head_dim, shape.max_positions, phi=False)
    kinds = _kinds(fields, shape, ["full"] * shape.num_layers, free=False)
    return _layers(fields, kinds, [rope] * shape.num_layers, None)


def _windowed_layers(fields: Fields, shape: _Shape, *, phi: bool) -> dict[str, Any]:
    """All layers slide where there is a window, none where there is not (Mistral, Phi-3)."""
    window = fields.optional_integer("sliding_window")
    rope = read_rope(fields, shape.head_dim, shape.max_positions, phi=phi)
    kinds = _kinds(fields, shape, ["full" if window is None else "sliding"] * shape.num_layers, free=False)
    return _layers(fields, kinds, [rope] * shape.num_layers, window)


def _biases(fields: Fields, *, mlp: bool) -> dict[str, Any]:
    attention = fields.flag("attention_bias")
    return {"qkv_bias": attention, "o_bias": attention, "mlp_bias": fields.flag("mlp_bias") if mlp else False}


def _read_llama(fields: Fields, shape: _Shape) -> dict[str, Any]:
    return {**_plain_layers(fields, shape), **_biases(fields, mlp=True)}


def _read_mllama(fields: Fields, shape: _Shape) -> dict[str, Any]:
    """Without its layers that attend to images: where there is none, they are passed over. They keep their numbers in
    the checkpoint, whose embedding has eight rows more than the vocabulary, for images.
    """
    fields.used.add("dropout")
    crossing = fields.sequence("cross_attention_layers") or []
    for number in crossing:
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise fields.error("cross_attention_layers", f"has {shown(number)}, not the number of a layer")
    stored = tuple(number for number in range(shape.num_layers) if number not in crossing)
    if not stored:
        raise fields.error("cross_attention_layers", "leaves no layer for text")
    layers = _plain_layers(fields, replace(shape, num_layers=len(stored)))
    return {**layers, "stored_layers": stored, "stored_extra_embeddings": 8}


def _read_granite(fields: Fields, shape: _Shape) -> dict[str, Any]:
    return {
        **_read_llama(fields, shape),
        "embedding_multiplier": fields.number("embedding_multiplier"),
        "residual_multiplier": fields.number("residual_multiplier"),
        "attention_scale": fields.number("attention_multiplier"),
        "logits_divisor": fields.number("logits_scaling", above=0.0),
    }


def _read_mistral(fields: Fields, shape: _Shape) -> dict[str, Any]:
    return _windowed_layers(fields, shape, phi=False)


def _read_mixtral(fields: Fields, shape: _Shape) -> dict[str, Any]:
    read = _read_mistral(fields, shape)
    return {**read, **read_experts(fields, everywhere(read["layers"]), normalizes=True)}


def _read_phi3(fields: Fields, shape: _Shape) -> dict[str, Any]:
    return _windowed_layers(fields, shape, phi=True)


def _qwen_layers(fields: Fields, shape: _Shape) -> dict[str, Any]:
    """The layers from max_window_layers on slide, if use_sliding_window."""
    first = fields.integer("max_window_layers", minimum=0)
    window = fields.optional_integer("sliding_window")
    if not fields.flag("use_sliding_window"):
        window = None
    computed: list[AttentionKind] = [
        "sliding" if window is not None and i >= first else "full" for i in range(shape.num_layers)
    ]
    rope = read_rope(fields, shape.head_dim, shape.max_positions, phi=False)
    return _layers(fields, _kinds(fields, shape, computed, free=True), [rope] * shape.num_layers, window)


def _read_qwen2(fields: Fields, shape: _Shape) -> dict[str, Any]:
    return {**_qwen_layers(fields, shape), "qkv_bias": True}


def _read_qwen3(fields: Fields, shape: _Shape) -> dict[str, Any]:
    return {**_qwen_layers(fields, shape), **_biases(fields, mlp=False), "qk_norm": True}


def _read_qwen3_moe(fields: Fields, shape: _Shape) -> dict[str, Any]:
    window = fields.optional_integer("sliding_window")
    if not fields.flag("use_sliding_window"):
        window = None
    fields.used.add("max_window_layers")  # all layers slide, or none, whatever this says
    rope = read_rope(fields, shape.head_dim, shape.max_positions, phi=False)
    kinds = _kinds(fields, shape, ["full" if window is None else "sliding"] * shape.num_layers, free=False)
    read = _layers(fields, kinds, [rope] * shape.num_layers, window)
    experts = read_experts(fields, where_sparse(fields, read["layers"]), normalizes=None)
    return {
        **read,
        **experts,
        **_biases(fields, mlp=False),
        "moe_intermediate_size": fields.integer("moe_intermediate_size"),
        "qk_norm": True,
    }


def _read_olmoe(fields: Fields, shape: _Shape) -> dict[str, Any]:
    if fields.get("clip_qkv") is not None:
        raise fields.error("clip_qkv", "is set, which cannot be run here")
    read = _plain_layers(fields, shape)
    experts = read_experts(fields, everywhere(read["layers"]), normalizes=None)
    return {**read, **experts, **_biases(fields, mlp=False), "qk_norm": True, "qk_norm_whole": True}


def _read_smollm3(fields: Fields, shape: _Shape) -> dict[str, Any]:
    """Every fourth layer (or where no_rope_layers has a 0) is without positions; those slide, if any do."""
    interval = fields.integer("no_rope_layer_interval")
    rotates = fields.sequence("no_rope_layers")
    if rotates is None:
        rotates = [int((i + 1) % interval != 0) for i in range(shape.num_layers)]
    if len(rotates) < shape.num_layers or any(isinstance(r, bool) or r not in (0, 1) for r in rotates):
        raise fields.error("no_rope_layers", f"is {shown(rotates)}, not a 0 or 1 for each of {shape.num_layers} layers")
    rotates = rotates[: shape.num_layers]
    window = fields.optional_integer("sliding_window")
    if not fields.flag("use_sliding_window"):
        window = None
    fields.used.add("max_window_layers")  # written by its exporter, read by nothing
    computed: list[AttentionKind] = ["sliding" if window is not None and not r else "full" for r in rotates]
    rope = read_rope(fields, shape.head_dim, shape.max_positions, phi=False)
    ropes = [rope if r else None for r in rotates]
    return {
        **_layers(fields, _kinds(fields, shape, computed, free=True), ropes, window),
        **_biases(fields, mlp=True),
    }


def _read_gemma(fields: Fields, shape: _Shape) -> dict[str, Any]:
    """The first, whose layers are Llama's but for the norms and the activation."""
    return {
        **_plain_layers(fields, shape),
        **_biases(fields, mlp=False),
        "norm_plus_one": True,
        "embedding_multiplier": fields.integer("hidden_size") ** 0.5,
    }


def _gemma(fields: Fields) -> dict[str, Any]:
    """What Gemma 2 and 3 share."""
    return {
        **_biases(fields, mlp=False),
        "norm_plus_one": True,
        "post_norms": True,
        "embedding_multiplier": fields.integer("hidden_size") ** 0.5,
        "attention_scale": fields.number("query_pre_attn_scalar", above=0.0) ** -0.5,
        "logits_softcap": fields.optional_number("final_logit_softcapping", above=0.0),
    }


def _read_gemma2(fields: Fields, shape: _Shape) -> dict[str, Any]:
    window = fields.optional_integer("sliding_window")
    if fields.optional_integer("sliding_window_size") not in (None, window):
        raise fields.error("sliding_window_size", "differs from sliding_window, which decides")
    computed: list[AttentionKind] = ["full" if i % 2 else "sliding" for i in range(shape.num_layers)]
    rope = read_rope(fields, shape.head_dim, shape.max_positions, phi=False)
    return {
        **_layers(fields, _kinds(fields, shape, computed, free=True), [rope] * shape.num_layers, window),
        **_gemma(fields),
        "attention_softcap": fields.optional_number("attn_logit_softcapping", above=0.0),
    }


def _read_gemma3(fields: Fields, shape: _Shape) -> dict[str, Any]:
    pattern = fields.integer("sliding_window_pattern")
    fields.used.add("_sliding_window_pattern")  # what layer_types, written beside it, were made of
    window = fields.optional_integer("sliding_window")
    computed: list[AttentionKind] = ["sliding" if (i + 1) % pattern else "full" for i in range(shape.num_layers)]
    kinds = _kinds(fields, shape, computed, free=True)
    by_kind = read_rope_by_attention(fields, shape.head_dim, shape.max_positions)
    ropes = [by_kind["full_attention" if kind == "full" else "sliding_attention"] for kind in kinds]
    if fields.get("attn_logit_softcapping") is not None:
        raise fields.error("attn_logit_softcapping", "is set, which this architecture does not apply: remove it")
    return {**_layers(fields, kinds, ropes, window), **_gemma(fields), "qk_norm": True}


_FAMILIES: dict[str, _Family] = {
    "llama": _Family("LlamaForCausalLM", _read_llama, LLAMA),
    "mllama_text_model": _Family(
        "MllamaForCausalLM", _read_mllama, MLLAMA, {**NO_BIASES, "tie_word_embeddings": (False,)}
    ),
    "mistral": _Family("MistralForCausalLM", _read_mistral, MISTRAL, NO_BIASES),
    "mixtral": _Family("MixtralForCausalLM", _read_mixtral, MIXTRAL, NO_BIASES),
    "granite": _Family("GraniteForCausalLM", _read_granite, GRANITE),
    "qwen2": _Family(
        "Qwen2ForCausalLM", _read_qwen2, QWEN, {"attention_bias": (True,), "qkv_bias": (True,), "mlp_bias": (False,)}
    ),
    "qwen3": _Family("Qwen3ForCausalLM", _read_qwen3, {**QWEN, "head_dim": 128}, {"mlp_bias": (False,)}),
    "qwen3_moe": _Family("Qwen3MoeForCausalLM", _read_qwen3_moe, QWEN3_MOE, {"mlp_bias": (False,)}),
    "olmoe": _Family("OlmoeForCausalLM", _read_olmoe, OLMOE, {"mlp_bias": (False,)}),
    "phi3": _Family("Phi3ForCausalLM", _read_phi3, PHI3, NO_BIASES),
    "smollm3": _Family("SmolLM3ForCausalLM", _read_smollm3, SMOLLM3),
    "gemma": _Family("GemmaForCausalLM", _read_gemma, GEMMA, {"hidden_activation": ("gelu_pytorch_tanh",)}),
    "gemma2": _Family("Gemma2ForCausalLM", _read_gemma2, GEMMA2, {}, "hidden_activation"),
    "gemma3_text": _Family("Gemma3ForCausalLM", _read_gemma3, GEMMA3, {}, "hidden_activation"),
}


@dataclass(frozen=True)
class _Multimodal:
    """A model of text and images: the family of its text part, and what its file says of that outside of it."""

    architecture: str
    text_type: str
    rules: tuple[str, ...]
    """The keys that count where they stand outside."""
    defaults: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    ignored: frozenset[str] = frozenset()


_MULTIMODAL: dict[str, _Multimodal] = {
    "gemma3": _Multimodal(
        "Gemma3ForConditionalGeneration",
        "gemma3_text",
        ("tie_word_embeddings", "bos_token_id", "eos_token_id"),
        {"tie_word_embeddings": True},
    ),
    # Its output matrix is its own whatever is said outside.
    "mllama": _Multimodal(
        "MllamaForConditionalGeneration", "mllama_text_model", (), ignored=frozenset({"tie_word_embeddings"})
    ),
}
