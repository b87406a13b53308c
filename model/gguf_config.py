"""What a GGUF file says of its model, as the config.json that says the same, which `model.config_hf` then reads and
checks. Knows GGUF's keys and what its converters leave out.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from config.errors import UserError
from model.config_fields import shown
from model.config_hf import from_hf
from model.config_types import ModelConfig
from model.gguf_file import Gguf, GgufTensor, as_written, read_gguf

Document = dict[str, Any]
ENDS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))


def gguf_config(path: Path) -> ModelConfig:
    """The configuration in a GGUF file. Raises UserError."""
    return from_hf(gguf_document(path), str(path))


def gguf_document(path: Path) -> Document:
    """A config.json that says what the GGUF file does. Raises UserError."""
    model = read_gguf(path)
    architecture = model.architecture
    if architecture not in _FAMILIES:
        raise UserError(
            f"{path}: its architecture {shown(architecture)} cannot be run here from GGUF; "
            f"{', '.join(_FAMILIES)} can"
        )
    if model.whole_number("{arch}.expert_count") and architecture not in _MIXTURES:
        raise UserError(
            f"{path}: is a mixture of experts, which {architecture} cannot be here; {', '.join(_MIXTURES)} can"
        )
    model_type, hf_class, add = _FAMILIES[architecture]
    document = {"model_type": model_type, "architectures": [hf_class], **_common(model)}
    document |= add(model, document)
    return document


def _common(model: Gguf) -> Document:
    """What every family has."""
    embeddings = model.tensors.get("token_embd.weight")
    if embeddings is None or len(embeddings.shape) != 2:
        raise UserError(f"{model.path}: tensor 'token_embd.weight' is missing or no table; it is no language model")
    heads = _number(model, "{arch}.attention.head_count")
    hidden = _number(model, "{arch}.embedding_length")
    kv_heads = _number(model, "{arch}.attention.head_count_kv", heads)
    head_dim = _number(model, "{arch}.attention.key_length", hidden // max(heads, 1))
    if _number(model, "{arch}.attention.value_length", head_dim) != head_dim:
        raise model.error("{arch}.attention.value_length", f"is not key_length ({head_dim}), which cannot be run here")
    return {
        "vocab_size": embeddings.shape[0],
        "hidden_size": hidden,
        "intermediate_size": _number(model, "{arch}.feed_forward_length"),
        "num_hidden_layers": _number(model, "{arch}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": _number(model, "{arch}.context_length"),
        "rms_norm_eps": _float(model, "{arch}.attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in model.tensors,
        "bos_token_id": model.whole_number("tokenizer.ggml.bos_token_id"),
        "eos_token_id": [number for name in ENDS if (number := model.whole_number(name)) is not None],
    }


def _number(model: Gguf, key: str, default: int | None = None) -> int:
    """A whole number, which some files write for each layer."""
    value = model.get(key)
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.size:
        if (value != value[0]).any():
            raise model.error(key, "differs from layer to layer, which cannot be run here")
        return int(value[0])
    number = model.whole_number(key)
    if number is None:
        number = default
    if number is None:
        raise model.error(key, "is missing")
    return number


def _float(model: Gguf, key: str, default: float | None = None) -> float:
    value = model.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise model.error(key, "is missing" if value is None else f"is {shown(value)}, not a number")
    return as_written(value)


# ---- Rotary embeddings ----


def _rope(model: Gguf, document: Document) -> Document:
    """`rope_theta` and `rope_scaling`; of llama.cpp's: "linear" where a factor stands alone."""
    theta = _float(model, "{arch}.rope.freq_base", 10_000.0)
    head_dim = document["head_dim"]
    if (rotary := _number(model, "{arch}.rope.dimension_count", head_dim)) != head_dim:
        raise model.error("{arch}.rope.dimension_count", f"is {rotary}, where heads have {head_dim}")
    scaling = _scaling(model)
    if (factors := model.tensors.get("rope_freqs.weight")) is not None:
        if scaling is not None:
            raise UserError(f"{model.path}: has both rope_freqs.weight and rope.scaling, one of which must be wrong")
        scaling = _by_factors(model, factors, document)
    return {"rope_theta": theta} | ({} if scaling is None else {"rope_scaling": scaling})


def _scaling(model: Gguf) -> Document | None:
    factor = _float(model, "{arch}.rope.scaling.factor", _float(model, "{arch}.rope.scale_linear", 0.0))
    kind = model.get("{arch}.rope.scaling.type") or "linear"
    if kind in ("none", "longrope") or factor in (0.0, 1.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise model.error("{arch}.rope.scaling.type", f"is {shown(kind)}, which cannot be run here")
    scaling: Document = {"rope_type": "yarn", "factor": factor}
    if (original := model.whole_number("{arch}.rope.scaling.original_context_length")) is not None:
        scaling["original_max_position_embeddings"] = original
    for name in ("beta_fast", "beta_slow"):
        if (beta := _float(model, f"{{arch}}.rope.scaling.yarn_{name}", 0.0)) != 0:
            scaling[name] = beta
    # What it multiplies by the usual factor of YaRN (Peng et al., arXiv:2309.00071, equation 22).
    keys = ("{arch}.rope.scaling.attn_factor", "{arch}.rope.scaling.yarn_attn_factor")
    more = math.prod(_float(model, key, 1.0) for key in keys)
    if more != 1:
        scaling["attention_factor"] = more * (0.1 * math.log(factor) + 1.0)
    return scaling


def _by_factors(model: Gguf, tensor: GgufTensor, document: Document) -> Document:
    """Llama 3.1's scaling, whose converters write down what each frequency is divided by."""
    factors = _floats(model, tensor, document["head_dim"] // 2)
    length = document["max_position_embeddings"]
    return {
        "rope_type": "longrope",
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": length,
        "short_factor": factors,
        "long_factor": factors,
    }


def _floats(model: Gguf, tensor: GgufTensor, length: int) -> list[float]:
    """The numbers of a small tensor."""
    if tensor.kind.name != "F32" or tensor.shape != (length,):
        raise UserError(
            f"{tensor.file}: tensor {tensor.name!r} is {tensor.kind.name} {list(tensor.shape)}, "
            f"where F32 [{length}] is expected"
        )
    with tensor.file.open("rb") as file:
        file.seek(tensor.offset)
        data = file.read(tensor.nbytes)
    return [as_written(float(number)) for number in np.frombuffer(data, "<f4")]


# ---- Families ----


def _has(model: Gguf, name: str) -> bool:
    return f"blk.0.{name}" in model.tensors


def _llama(model: Gguf, document: Document) -> Document:
    """Llama, Mistral and Mixtral, which are one architecture in GGUF."""
    added = _rope(model, document)
    if model.whole_number("{arch}.expert_count"):
        window = model.whole_number("{arch}.attention.sliding_window") or None
        named = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "sliding_window": window}
        return {**added, **named, **_experts(model, "num_local_experts")}
    if window := model.whole_number("{arch}.attention.sliding_window"):
        return {**added, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}
    return {**added, **_biases(model), "mlp_bias": _has(model, "ffn_up.bias")}


def _biases(model: Gguf) -> Document:
    return {"attention_bias": _has(model, "attn_q.bias")}


def _granite(model: Gguf, document: Document) -> Document:
    names = {
        "embedding_multiplier": "{arch}.embedding_scale",
        "attention_multiplier": "{arch}.attention.scale",
        "residual_multiplier": "{arch}.residual_scale",
        "logits_scaling": "{arch}.logit_scale",
    }
    scales = {name: _float(model, key, 0.0) for name, key in names.items()}
    defaults = {"attention_multiplier": document["head_dim"] ** -0.5}
    chosen = {name: scale or defaults.get(name, 1.0) for name, scale in scales.items()}
    return {**_llama(model, document), **chosen}


def _qwen(model: Gguf, document: Document) -> Document:
    return _rope(model, document) | {"use_sliding_window": False, "max_window_layers": document["num_hidden_layers"]}


def _qwen3(model: Gguf, document: Document) -> Document:
    return _qwen(model, document) | _biases(model)


def _experts(model: Gguf, count_key: str) -> Document:
    return {
        count_key: _number(model, "{arch}.expert_count"),
        "num_experts_per_tok": _number(model, "{arch}.expert_used_count"),
    }


def _qwen3_moe(model: Gguf, document: Document) -> Document:
    layers = range(document["num_hidden_layers"])
    return {
        **_qwen3(model, document),
        **_experts(model, "num_experts"),
        "moe_intermediate_size": _number(model, "{arch}.expert_feed_forward_length"),
        "mlp_only_layers": [i for i in layers if f"blk.{i}.ffn_gate_inp.weight" not in model.tensors],
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,  # the files do not say; llama.cpp does so
    }


def _olmoe(model: Gguf, document: Document) -> Document:
    return _rope(model, document) | _biases(model) | _experts(model, "num_experts") | {"norm_topk_prob": False}


def _smollm3(model: Gguf, document: Document) -> Document:
    return {**_llama(model, document), "no_rope_layer_interval": 4}


def _phi3(model: Gguf, document: Document) -> Document:
    head_dim, length = document["head_dim"], document["max_position_embeddings"]
    rotary = _number(model, "{arch}.rope.dimension_count", head_dim)
    original = _number(model, "{arch}.rope.scaling.original_context_length", length)
    added: Document = {
        "rope_theta": _float(model, "{arch}.rope.freq_base", 10_000.0),
        "partial_rotary_factor": rotary / head_dim,
        "original_max_position_embeddings": original,
        "sliding_window": model.whole_number("{arch}.attention.sliding_window") or None,
    }
    tensors = [model.tensors.get(f"rope_factors_{name}.weight") for name in ("short", "long")]
    short, long = tensors
    if short is not None and long is not None:
        scaling: Document = {
            "rope_type": "longrope",
            "short_factor": _floats(model, short, rotary // 2),
            "long_factor": _floats(model, long, rotary // 2),
        }
        if (factor := _float(model, "{arch}.rope.scaling.attn_factor", 0.0)) != 0:
            scaling["attention_factor"] = factor
        added["rope_scaling"] = scaling
    return added


def _gemma2(model: Gguf, document: Document) -> Document:
    return _rope(model, document) | {
        "hidden_activation": "gelu_pytorch_tanh",
        # The files do not say; of the 27B alone it is not the size of a head.
        "query_pre_attn_scalar": _query_scalar(document, layers_of_27b=46),
        "sliding_window": _number(model, "{arch}.attention.sliding_window", 4096),
        "attn_logit_softcapping": _float(model, "{arch}.attn_logit_softcapping", 50.0),
        "final_logit_softcapping": _float(model, "{arch}.final_logit_softcapping", 30.0),
    }


def _query_scalar(document: Document, layers_of_27b: int) -> int:
    if document["num_hidden_layers"] == layers_of_27b:
        return int(document["hidden_size"] // document["num_attention_heads"])
    return int(document["head_dim"])


def _pattern(model: Gguf, document: Document, usual: int) -> Document:
    """Which layers slide: all but every so many, or as a list says."""
    key = "{arch}.attention.sliding_window_pattern"
    slides = model.get(key)
    if not isinstance(slides, np.ndarray):
        return {"sliding_window_pattern": _number(model, key, usual)}
    if len(slides) != document["num_hidden_layers"]:
        raise model.error(key, f"has {len(slides)} entries for {document['num_hidden_layers']} layers")
    return {"layer_types": ["sliding_attention" if slide else "full_attention" for slide in slides]}


def _gemma3(model: Gguf, document: Document) -> Document:
    rope = _rope(model, document)
    local = _float(model, "{arch}.rope.freq_base_swa", 10_000.0)
    return rope | {
        "rope_local_base_freq": local,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": _query_scalar(document, layers_of_27b=62),
        "sliding_window": _number(model, "{arch}.attention.sliding_window"),
        **_pattern(model, document, usual=6),
        "final_logit_softcapping": _float(model, "{arch}.final_logit_softcapping", 0.0) or None,
    }


_FAMILIES: dict[str, tuple[str, str, Callable[[Gguf, Document], Document]]] = {
    "llama": ("llama", "LlamaForCausalLM", _llama),
    "granite": ("granite", "GraniteForCausalLM", _granite),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", _qwen),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", _qwen3),
    "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM", _qwen3_moe),
    "olmoe": ("olmoe", "OlmoeForCausalLM", _olmoe),
    "phi3": ("phi3", "Phi3ForCausalLM", _phi3),
    "smollm3": ("smollm3", "SmolLM3ForCausalLM", _smollm3),
    "gemma": ("gemma", "GemmaForCausalLM", _rope),
    "gemma2": ("gemma2", "Gemma2ForCausalLM", _gemma2),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM", _gemma3),
}
"""GGUF's architecture -> model_type, class, and what it adds to the document."""
_MIXTURES = ("llama", "qwen3moe", "olmoe")
"""Those that may have experts."""
