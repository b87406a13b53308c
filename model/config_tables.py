"""What Hugging Face config.json files contain, as data: each family's defaults, the keys that change nothing, and the
keys that may have one value only. Reads nothing.
"""

# Keys that say nothing about what a forward pass computes: bookkeeping, training, how Transformers runs the model,
# and the sampling defaults that older files carry (these are of generation_config.json).
HARMLESS = frozenset(
    """
    _name_or_path name_or_path transformers_version transformers.js_config auto_map tokenizer_class model_max_length
    max_sequence_length is_llama_config unsloth_fixed unsloth_version task_specific_params finetuning_task problem_type
    id2label label2id num_labels prefix torch_dtype dtype use_cache cache_implementation attn_implementation
    _attn_implementation _attn_implementation_autoset use_flash_attention_2 torchscript output_attentions
    output_hidden_states return_dict return_dict_in_generate tie_last_hidden_states initializer_range
    output_router_logits router_aux_loss_coef router_jitter_noise
    _commit_hash attention_dropout resid_pdrop embd_pdrop hidden_dropout neftune_noise_alpha gradient_checkpointing
    use_reentrant_checkpointing pretraining_tp use_bfloat16
    tf_legacy_loss pad_token_id unk_token_id sep_token_id decoder_start_token_id
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    """.split()  # noqa: SIM905
)

# Keys that do change the result, each with the values that change nothing.
ONLY: dict[str, tuple[object, ...]] = {
    "is_decoder": (True, False),  # a causal language model is a decoder whatever this says
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "per_layer_config": ({},),
    "chunk_size_feed_forward": (0,),
    "rope_interleaved": (False,),
    "lm_head_bias": (False,),
    "use_mrope": (False,),
    "use_bidirectional_attention": (False,),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
}

_QUANTIZED = "says that the weights are stored quantized, which cannot be read yet: use the unquantized model"
# Keys that deserve a better word than "not known".
REASONS = {
    "quantization_config": _QUANTIZED,
    "quantization": _QUANTIZED,
    "compression_config": _QUANTIZED,
    "num_local_experts": "makes this a mixture of experts, which this family cannot be here",
    "num_experts": "makes this a mixture of experts, which this family cannot be here",
    "text_config": "is of a multimodal model; known of those are Gemma3… and MllamaForConditionalGeneration",
}

# What Transformers takes where a file says nothing. Every family starts from these.
DEFAULTS: dict[str, object] = {
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 1.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}

LLAMA: dict[str, object] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MLLAMA: dict[str, object] = {
    **LLAMA,
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
GRANITE: dict[str, object] = {
    **LLAMA,
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"), 1.0),
}
MISTRAL: dict[str, object] = {
    **LLAMA,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
QWEN: dict[str, object] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
MIXTRAL: dict[str, object] = {
    **MISTRAL,
    "sliding_window": None,
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-5,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
QWEN3_MOE: dict[str, object] = {
    **QWEN,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_key_value_heads": 4,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
OLMOE: dict[str, object] = {
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 50279,
    "num_experts": 64,
    "num_experts_per_tok": 8,
}
PHI3: dict[str, object] = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 32000,
}
SMOLLM3: dict[str, object] = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_theta": 2_000_000.0,
    "no_rope_layer_interval": 4,
    "tie_word_embeddings": True,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
GEMMA: dict[str, object] = {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
GEMMA2: dict[str, object] = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
GEMMA3: dict[str, object] = {
    **{key: value for key, value in GEMMA2.items() if not key.endswith("_softcapping")},
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "sliding_window_pattern": 6,
}
NO_BIASES: dict[str, tuple[object, ...]] = {"attention_bias": (False,), "mlp_bias": (False,)}
