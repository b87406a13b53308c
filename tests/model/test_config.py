"""Configuration files: what is left out means what Transformers means; what is not known is refused by name."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from config.errors import UserError
from model.config import ModelConfig, RopeConfig, from_hf, from_llama2c, from_meta, load_config, read_llama2c_header

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
MODEL_TYPES = (
    *("llama", "mistral", "granite", "qwen2", "qwen3", "phi3", "smollm3", "gemma2", "gemma3_text", "gemma3"),
    *("mllama_text_model", "mllama", "mixtral", "qwen3_moe", "olmoe"),
)
MIXTURES = ("mixtral", "qwen3_moe", "olmoe")
MULTIMODAL = ("gemma3", "mllama")
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
META = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 97, "norm_eps": 1e-5, "multiple_of": 32}


# Published files as they are, but for the lists of numbers: what they carry besides the shapes must not be refused.
PUBLISHED_FILES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "_name_or_path": "HuggingFaceTB/SmolLM2-135M", "architectures": ["LlamaForCausalLM"], "attention_bias": False,
        "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 0, "head_dim": 64, "hidden_act": "silu",
        "hidden_size": 576, "initializer_range": 0.0416, "intermediate_size": 1536, "is_llama_config": True,
        "max_position_embeddings": 8192, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 9,
        "num_hidden_layers": 30, "num_key_value_heads": 3, "pad_token_id": None, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.48.0", "use_cache": True,
        "vocab_size": 49152, "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    },
    "Qwen2.5-0.5B": {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
        "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2",
        "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1", "use_cache": True, "use_mrope": False, "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Phi-4-mini-instruct": {
        "_name_or_path": "Phi-4-mini-instruct", "architectures": ["Phi3ForCausalLM"], "attention_bias": False,
        "attention_dropout": 0.0, "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "bos_token_id": 199999,
        "embd_pdrop": 0.0, "eos_token_id": 199999, "full_attn_mod": 1, "hidden_act": "silu", "hidden_size": 3072,
        "initializer_range": 0.02, "intermediate_size": 8192, "interpolate_factor": 1, "lm_head_bias": False,
        "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "phi3", "num_attention_heads": 24,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "original_max_position_embeddings": 4096,
        "pad_token_id": 199999, "partial_rotary_factor": 0.75, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
        "rope_scaling": {"long_factor": [1] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
        "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0", "use_cache": True, "vocab_size": 200064,
    },
    "gemma-2-27b": {
        "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
        "final_logit_softcapping": 30.0, "head_dim": 128, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 4608, "initializer_range": 0.02,
        "intermediate_size": 36864, "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 32,
        "num_hidden_layers": 46, "num_key_value_heads": 16, "pad_token_id": 0, "query_pre_attn_scalar": 144,
        "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "sliding_window_size": 4096,
        "torch_dtype": "float32", "transformers_version": "4.42.0.dev0", "use_cache": True, "vocab_size": 256000,
        "_attn_implementation": "eager",
    },
    "gemma-3-4b-it": {
        "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
        "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
        "model_type": "gemma3", "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        },
        "vision_config": {"hidden_size": 1152, "image_size": 896, "model_type": "siglip_vision_model"},
    },
    "SmolLM3-3B": {
        "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": None, "eos_token_id": 128012, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 11008, "layer_types": ["full_attention"] * 36,
        "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": False, "model_type": "smollm3",
        "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16,
        "num_hidden_layers": 36, "num_key_value_heads": 4, "pad_token_id": 128004, "pretraining_tp": 2,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None,
        "torch_dtype": "bfloat16", "transformers_version": "4.54.0.dev0", "use_cache": False,
        "use_sliding_window": False, "vocab_size": 128256,
    },
    "Mixtral-8x7B-Instruct-v0.1": {
        "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.36.0.dev0", "use_cache": True, "vocab_size": 32000,
    },
    "Qwen3-30B-A3B": {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144,
        "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
    },
    "OLMoE-1B-7B-0125-Instruct": {
        "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None,
        "eos_token_id": 50279, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 1024, "max_position_embeddings": 4096, "model_type": "olmoe", "norm_topk_prob": False,
        "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16,
        "num_key_value_heads": 16, "output_router_logits": False, "pad_token_id": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.49.0.dev0", "use_cache": False, "vocab_size": 50304,
    },
}  # fmt: skip


def llama(**changes: Any) -> dict[str, Any]:
    return {**LLAMA, **changes}


def family(model_type: str, **changes: Any) -> dict[str, Any]:
    """A small file of that family without architectures; a multimodal one has the changes in its text part."""
    shape = {key: value for key, value in LLAMA.items() if key not in ("architectures", "model_type")}
    if model_type in MULTIMODAL:
        return {"model_type": model_type, "text_config": {**shape, **changes}}
    return {"model_type": model_type, **shape, **changes}


def refused(config: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        from_hf(config, "m/config.json")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("m/config.json")
    return message


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_an_empty_file_means_what_transformers_means(model_type: str) -> None:
    """What Transformers writes for a family's defaults is read as the same model as a file that says nothing."""
    transformers = pytest.importorskip("transformers")
    written = transformers.AutoConfig.for_model(model_type).to_dict()
    silent = {"model_type": model_type, **({"text_config": {}} if model_type in MULTIMODAL else {})}
    assert from_hf(json.loads(json.dumps(written, default=str)), "written") == from_hf(silent, "silent")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("key", ["a_new_feature", "num_experts", "quantization_config", "sliding_windows"])
def test_an_unknown_key_is_refused_by_name(model_type: str, key: str) -> None:
    key = "n_shared_experts" if key == "num_experts" and model_type in MIXTURES else key
    from_hf(family(model_type), "m/config.json")
    assert key in refused(family(model_type, **{key: 4}))
    if model_type in MULTIMODAL:
        assert key in refused({**family(model_type), key: 4})


def test_an_unknown_key_of_null_says_that_a_feature_is_absent() -> None:
    assert from_hf(llama(a_new_feature=None, quantization_config=None), "x") == from_hf(LLAMA, "x")


@pytest.mark.parametrize("name", PUBLISHED_FILES)
def test_published_files_are_read(name: str) -> None:
    config = from_hf(PUBLISHED_FILES[name], name)
    # Read from model_type alone it is the same model, and Transformers reads the same shapes.
    assert from_hf({**PUBLISHED_FILES[name], "architectures": None}, name) == config
    theirs = pytest.importorskip("transformers").AutoConfig.for_model(**PUBLISHED_FILES[name]).get_text_config()
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        assert getattr(config, key) == getattr(theirs, key)
    assert (len(config.layers), config.rms_norm_eps) == (theirs.num_hidden_layers, theirs.rms_norm_eps)
    assert config.tie_word_embeddings == theirs.tie_word_embeddings


def test_the_nearest_known_key_is_offered() -> None:
    assert "rms_norm_eps" in refused(llama(rms_norm_epsilon=1e-5))


def test_bookkeeping_keys_change_nothing() -> None:
    keys = {"transformers_version": "4.40", "torch_dtype": "bfloat16", "use_cache": True, "pretraining_tp": 1}
    assert from_hf(llama(**keys, temperature=0.6, initializer_range=0.1), "x") == from_hf(LLAMA, "x")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "nearest is LlamaForCausalLM"),
        ({"architectures": ["MistralForCausalLM"]}, "model_type"),
        ({"architectures": []}, "architectures"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"architectures": None, "model_type": "lama"}, "nearest is llama"),
        ({"architectures": None, "model_type": None}, "neither"),
    ],
)
def test_an_unknown_architecture_is_refused_with_the_nearest(changes: dict[str, Any], word: str) -> None:
    assert word in refused(llama(**changes))


@pytest.mark.parametrize("value", [0, -1, 4.0, "4", True, None, [4], 2**40, float("nan")])
@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"])
def test_a_size_is_a_whole_number_within_bounds(key: str, value: object) -> None:
    assert key in refused(llama(**{key: value}))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "hidden_size"),
        ({"head_dim": 7}, "7"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"attention_bias": "yes"}, "attention_bias"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"eos_token_id": "2"}, "eos_token_id"),
        ({"eos_token_id": [2, True]}, "eos_token_id[1]"),
        ({"bos_token_id": -1}, "bos_token_id"),
        ({"rope_theta": "10000"}, "rope_theta"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_scaling": {"rope_type": "linaer", "factor": 2.0}}, "nearest: linear"),
        ({"rope_scaling": {"rope_type": 3}}, "rope_type"),
        ({"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2.0}}, "type"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "alpha": 1.0}}, "alpha"),
        ({"rope_scaling": {**LLAMA3_ROPE, "factor": None}}, "factor"),
        ({"rope_scaling": {**LLAMA3_ROPE, "high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_scaling": {**LLAMA3_ROPE, "low_freq_factor": None}}, "low_freq_factor"),
        ({"rope_parameters": {"rope_theta": 1e4}, "rope_theta": 1e5}, "rope_theta"),
        ({"rope_parameters": {"factor": 2.0}, "rope_scaling": {"factor": 3.0}}, "rope_scaling"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"sliding_window": 16}, "sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ({"quantization_config": {"quant_method": "gptq"}}, "unquantized"),
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(changes: dict[str, Any], word: str) -> None:
    assert word in refused(llama(**changes))


@pytest.mark.parametrize(
    ("model_type", "changes", "word"),
    [
        ("mistral", {"attention_bias": True}, "attention_bias"),
        ("mistral", {"sliding_window": 0}, "sliding_window"),
        ("mistral", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ("qwen2", {"attention_bias": False}, "attention_bias"),
        ("qwen2", {"layer_types": ["sliding_attention", "full_attention"]}, "sliding_window"),
        ("qwen2", {"use_mrope": True}, "use_mrope"),
        ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4}}, "long_factor"),
        ("phi3", {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0] * 4}}, "short_factor"),
        ("phi3", {"rope_scaling": {"type": "su", "short_factor": [1.0, 1, 1, 0], "long_factor": [1.0] * 4}}, "[3]"),
        ("phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ("phi3", {"partial_rotary_factor": 0.4}, "partial_rotary_factor"),
        ("phi3", {"lm_head_bias": True}, "lm_head_bias"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers"),
        ("smollm3", {"no_rope_layers": [1, 2]}, "no_rope_layers"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval"),
        ("gemma2", {"sliding_window": None}, "sliding_window"),
        ("gemma2", {"sliding_window_size": 5}, "sliding_window_size"),
        ("gemma2", {"hidden_act": "silu"}, "hidden_act"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters.rope_type"),
        ("gemma3_text", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("mllama", {"cross_attention_layers": [0, "1"]}, "cross_attention_layers"),
        ("mllama", {"cross_attention_layers": [0, 1]}, "leaves no layer"),
        ("mllama", {"tie_word_embeddings": True}, "tie_word_embeddings"),
        ("granite", {"logits_scaling": 0}, "logits_scaling"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts"),
        ("mixtral", {"num_local_experts": 8, "num_experts": 4}, "differs from num_experts"),
        ("mixtral", {"num_experts_per_tok": 9}, "more than the 8 experts"),
        ("mixtral", {"num_experts_per_tok": "2"}, "num_experts_per_tok"),
        ("mixtral", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("mixtral", {"attention_bias": True}, "attention_bias"),
        ("qwen3_moe", {"decoder_sparse_step": 3}, "decoder_sparse_step leaves no layer"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1]}, "mlp_only_layers leaves no layer"),
        ("qwen3_moe", {"mlp_only_layers": ["0"]}, "mlp_only_layers"),
        ("qwen3_moe", {"moe_intermediate_size": 0}, "moe_intermediate_size"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
        ("olmoe", {"norm_topk_prob": "no"}, "norm_topk_prob"),
        ("llama", {"num_experts_per_tok": 2}, "num_experts_per_tok"),
    ],
)
def test_what_a_family_cannot_be_is_refused(model_type: str, changes: dict[str, Any], word: str) -> None:
    assert word in refused(family(model_type, **changes))


WEIRD = [None, True, -1, 0, 2, 1.5, "x", [], {}, ["x"], {"rope_type": [1]}, 10**400, float("nan"), 1e308]


@pytest.mark.parametrize("name", PUBLISHED_FILES)
def test_whatever_a_key_holds_the_answer_is_a_model_or_one_line(name: str) -> None:
    published = PUBLISHED_FILES[name]
    accepted, messages = 0, []
    for inner in (None, "text_config", "rope_scaling"):
        section = published if inner is None else published.get(inner) or {}
        for key in section:
            for value in WEIRD:
                changed = {**section, key: value}
                try:
                    from_hf(changed if inner is None else {**published, inner: changed}, "m/config.json")
                    accepted += 1
                except UserError as error:
                    messages.append(str(error))
    assert accepted > 0
    assert all("\n" not in message and len(message) < 600 for message in messages)


def test_llama_3_stretches_its_rotary_embedding() -> None:
    config = from_hf(llama(rope_theta=500_000.0, rope_scaling=LLAMA3_ROPE, eos_token_id=[5, 7]), "x")
    expected = RopeConfig(
        theta=500_000.0, kind="llama3", factor=8.0, high_freq_factor=4.0, original_max_position_embeddings=64
    )
    assert [layer.rope for layer in config.layers] == [expected, expected]
    assert config.eos_token_ids == (5, 7)


def test_the_stretch_that_a_file_leaves_out_follows_from_the_lengths() -> None:
    scaling = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = from_hf(family("phi3", rope_scaling=scaling, original_max_position_embeddings=32), "x")
    rope = config.layers[0].rope
    assert rope is not None
    assert (rope.kind, rope.factor, rope.original_max_position_embeddings) == ("longrope", 4.0, 32)
    config = from_hf(llama(rope_scaling={"type": "yarn", "factor": None, "original_max_position_embeddings": 16}), "x")
    assert config.layers[0].rope == RopeConfig(kind="yarn", factor=8.0, original_max_position_embeddings=16)


def kinds(config: ModelConfig) -> str:
    return "".join(layer.attention[0] for layer in config.layers)


def test_which_layers_slide() -> None:
    assert kinds(from_hf(family("mistral"), "x")) == "ss"
    assert kinds(from_hf(family("mistral", sliding_window=None), "x")) == "ff"
    qwen = {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8}
    assert kinds(from_hf(family("qwen2", **qwen), "x")) == "fs"
    assert kinds(from_hf(family("qwen2", **{**qwen, "use_sliding_window": False}), "x")) == "ff"
    assert kinds(from_hf(family("gemma2", num_hidden_layers=4), "x")) == "sfsf"
    assert kinds(from_hf(family("gemma3_text", num_hidden_layers=7), "x")) == "sssssfs"
    assert from_hf(family("mistral", sliding_window=None), "x").sliding_window is None


def test_gemma_3_has_a_rotary_embedding_for_each_kind_of_layer() -> None:
    config = from_hf(
        family("gemma3_text", num_hidden_layers=6, rope_theta=1e6, rope_scaling={"rope_type": "linear", "factor": 8.0}),
        "x",
    )
    assert config.layers[0].rope == RopeConfig(theta=10_000.0)
    assert config.layers[5].rope == RopeConfig(theta=1_000_000.0, kind="linear", factor=8.0)


def test_a_multimodal_file_gives_its_text_model() -> None:
    outer = {"eos_token_id": [1, 106], "vision_config": {"hidden_size": 8}, "boi_token_index": 5}
    config = from_hf({**family("gemma3"), **outer}, "x")
    assert (config.family, config.eos_token_ids, config.tie_word_embeddings) == ("gemma3_text", (1, 106), True)


def test_the_layers_for_images_are_left_out_and_the_others_keep_their_numbers() -> None:
    text = family("mllama", num_hidden_layers=5, cross_attention_layers=[1, 3])
    config = from_hf({**text, "image_token_index": 9}, "x")
    assert (len(config.layers), config.stored_layers, config.stored_extra_embeddings) == (3, (0, 2, 4), 8)


def test_the_end_tokens_of_generation_config_count_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(llama(eos_token_id=7)))
    assert load_config(tmp_path).eos_token_ids == (7,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7], "bos_token_id": 4}))
    config = load_config(tmp_path)
    assert (config.eos_token_ids, config.bos_token_id) == ((7, 9), 4)
    assert load_config(tmp_path / "config.json") == config
    (tmp_path / "model.safetensors").touch()
    assert load_config(tmp_path / "model.safetensors") == config


@pytest.mark.parametrize("text", ["", "{", "[1]", "nothing", "[" * 100_000, '{"a": "\xff"}'])
def test_a_damaged_file_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"config\.json") as caught:
        load_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_nothing_to_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_config(tmp_path / "absent")
    with pytest.raises(UserError, match=r"no config\.json"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text(" " * 2_000_000 + "{}")
    with pytest.raises(UserError, match="larger"):
        load_config(tmp_path)


def test_metas_file_gives_the_published_shapes() -> None:
    """The 8B of Llama 3.1 and the 7B of Llama 2, whose config.json files say the widths that Meta's only imply."""
    params = {"dim": 4096, "n_layers": 32, "n_heads": 32, "norm_eps": 1e-5}
    llama3 = {"n_kv_heads": 8, "vocab_size": 128256, "ffn_dim_multiplier": 1.3, "multiple_of": 1024}
    config = from_meta({**params, **llama3, "rope_theta": 500_000.0, "use_scaled_rope": True}, "params.json")
    assert (config.intermediate_size, config.num_key_value_heads, config.head_dim) == (14336, 8, 128)
    assert (config.max_position_embeddings, config.bos_token_id) == (131_072, 128_000)
    assert config.layers[0].rope == RopeConfig(
        theta=500_000.0, kind="llama3", factor=8.0, original_max_position_embeddings=8192
    )
    config = from_meta({**params, "vocab_size": -1, "multiple_of": 256}, "params.json", vocab_size=32000)
    assert (config.intermediate_size, config.num_key_value_heads, config.vocab_size) == (11008, 32, 32000)
    assert (config.max_position_embeddings, config.eos_token_ids) == (4096, (2,))


def test_the_small_models_of_llama_3_2_are_stretched_by_32() -> None:
    params = {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "norm_eps": 1e-5}
    scaled = {"ffn_dim_multiplier": 1.5, "multiple_of": 256, "rope_theta": 500_000.0, "use_scaled_rope": True}
    config = from_meta({**params, **scaled}, "params.json")
    rope = config.layers[0].rope
    assert rope is not None
    assert (rope.factor, config.intermediate_size) == (32.0, 8192)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"vocab_size": -1}, r"tokenizer\.model"),
        ({"dim": 65}, "dim"),
        ({"n_kv_heads": 3}, "n_kv_heads"),
        ({"n_layers": True}, "n_layers"),
        ({"vision_chunk_size": 560}, "vision_chunk_size"),
        ({"ffn_dim_multiplier": "1.3"}, "ffn_dim_multiplier"),
    ],
)
def test_what_metas_file_cannot_say(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        from_meta({**META, **changes}, "params.json")


def test_a_vocabulary_that_meta_leaves_out_is_counted(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(f"once upon a time there was number {i}" for i in range(50)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "tokenizer"), vocab_size=30, minloglevel=2
    )
    (tmp_path / "params.json").write_text(json.dumps({**META, "vocab_size": -1}))
    assert load_config(tmp_path).vocab_size == 30
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.model"):
        load_config(tmp_path)


HEADER = {
    "dim": 64,
    "hidden_dim": 176,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 97,
    "max_seq_len": 32,
}


def test_both_layouts_of_llama2c_are_read(tmp_path: Path) -> None:
    ints = list(HEADER.values())
    old = struct.pack("<7i", *ints)
    untied = struct.pack("<7i", *ints[:5], -97, 32)
    new = struct.pack("<Ii7iB", 0x616B3432, 1, *ints, 0)
    configs = []
    for i, head in enumerate((old, untied, new)):
        path = tmp_path / f"{i}.bin"
        path.write_bytes(head.ljust(256, b"\0"))
        configs.append(load_config(path))
    assert configs[1] == configs[2]
    assert [config.tie_word_embeddings for config in configs] == [True, False, False]
    assert configs[0] == from_llama2c({**HEADER}, "x")
    assert (configs[0].intermediate_size, configs[0].vocab_size, configs[0].max_position_embeddings) == (176, 97, 32)


def test_a_llama2c_checkpoint_of_the_trainer_is_read(tmp_path: Path) -> None:
    args = {"dim": 288, "n_layers": 6, "n_heads": 6, "n_kv_heads": 6, "vocab_size": 32000, "multiple_of": 32}
    model = {"weight": torch.zeros(3)}
    torch.save({"model_args": {**args, "max_seq_len": 256, "dropout": 0.0}, "model": model}, tmp_path / "ckpt.pt")
    config = load_config(tmp_path)
    assert (config.intermediate_size, config.max_position_embeddings) == (768, 256)
    assert config.tie_word_embeddings
    torch.save({"model": model}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="model_args"):
        load_config(tmp_path)
    (tmp_path / "ckpt.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"ckpt\.pt") as caught:
        load_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_damaged_llama2c_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"\0" * 10)
    with pytest.raises(UserError, match="truncated"):
        read_llama2c_header(path)
    path.write_bytes(struct.pack("<Ii", 0x616B3432, 2).ljust(256, b"\0"))
    with pytest.raises(UserError, match="version 2"):
        read_llama2c_header(path)
    path.write_bytes(b"\xff" * 256)
    with pytest.raises(UserError, match="dim"):
        load_config(path)
    (tmp_path / "other.bin").write_bytes(b"\0" * 256)
    with pytest.raises(UserError, match="several checkpoints"):
        load_config(tmp_path)
