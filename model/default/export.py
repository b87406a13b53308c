"""Writes a trained model as a Hugging Face directory: config, weights, tokenizer, template, generation defaults."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from model.default.llama import NORM_EPS, ROPE_THETA, Llama, to_hugging_face
from model.default.vocabulary import BOS, EOS, PAD, Vocabulary


def export(model: Llama, vocabulary: Vocabulary, folder: Path) -> None:
    """Write the files into an existing folder; weights in bfloat16."""
    shape = model.shape
    ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.dim,
        "intermediate_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.context,
        "hidden_act": "silu",
        "rms_norm_eps": NORM_EPS,
        "rope_theta": ROPE_THETA,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        **ids,
    }
    # The penalty keeps a small model from going round in circles; the README says how these were chosen.
    generation = {**ids, "do_sample": True, "temperature": 0.7, "min_p": 0.05, "repetition_penalty": 1.05}
    save_file(to_hugging_face(model, torch.bfloat16), folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    vocabulary.save(folder, shape.context)
