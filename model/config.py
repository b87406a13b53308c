"""The configuration of a model, from whichever file says what it is: config.json (Hugging Face), params.json (Meta),
the header or the arguments of a llama2.c checkpoint. Strict about what it does not know; torch only to open a `.pt`.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from config.errors import UserError
from model.config_fields import Fields, shown
from model.config_hf import from_hf, read_special_ids
from model.config_types import Activation, AttentionKind, LayerConfig, ModelConfig, RopeConfig, RopeKind

__all__ = [
    "Activation",
    "AttentionKind",
    "LayerConfig",
    "ModelConfig",
    "RopeConfig",
    "RopeKind",
    "from_hf",
    "from_llama2c",
    "from_meta",
    "hf_document",
    "load_config",
    "read_llama2c_header",
]

# Configuration files are a few kilobytes; tokenizers in JSON, which somebody may point at by mistake, are not.
_MAX_JSON_BYTES = 1 << 20
_LLAMA2C_MAGIC = 0x616B3432
_LLAMA2C_HEADER = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")


def load_config(path: Path) -> ModelConfig:
    """The configuration of the model at `path`: a directory, or one file of it.

    A directory is read by its config.json, else by its params.json, else by its only llama2.c checkpoint; one whose
    weights are in GGUF by those alone. Beside a config.json, the end tokens of generation_config.json count too. Raises
    UserError.
    """
    if (gguf := _find_gguf(path)) is not None:
        from model.gguf_config import gguf_config  # imports its package, for such files alone

        return gguf_config(gguf)
    if path.is_dir():
        return _load_directory(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file or directory")
    if path.name == "params.json":
        return from_meta(_read_json(path), str(path), vocab_size=_vocab_size_beside(path))
    if path.suffix == ".json":
        return _load_hf(path)
    if path.suffix == ".pt":
        return from_llama2c(_read_llama2c_pt(path), str(path))
    if path.suffix == ".bin" and not path.name.startswith("pytorch_model"):
        return from_llama2c(read_llama2c_header(path), str(path))
    return _load_directory(path.parent)


def hf_document(path: Path) -> dict[str, object]:
    """A config.json for the model at `path`: the one that it is read by, or one that says the same. Raises UserError.
    """
    if (gguf := _find_gguf(path)) is not None:
        from model.gguf_config import gguf_document

        return gguf_document(gguf)
    llama2c = path.is_file() and path.suffix in (".pt", ".bin") and not path.name.startswith("pytorch_model")
    file = (path if path.is_dir() else path.parent) / "config.json"
    if file.is_file() and not llama2c:
        return dict(_read_json(file))
    return _to_hf(load_config(path))


def _find_gguf(path: Path) -> Path | None:
    from model.checkpoint import find_gguf  # which imports this module

    return find_gguf(path)


def _to_hf(config: ModelConfig) -> dict[str, object]:
    """The inverse of `from_hf`, for what Meta's and llama2.c's files describe."""
    rope = config.layers[0].rope
    assert config.family == "llama"
    assert rope is not None
    document: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": len(config.layers),
        "rope_theta": rope.theta,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
    }
    if rope.kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        document["rope_scaling"] = {"rope_type": "llama3", **{name: vars(rope)[name] for name in names}}
    same = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
        *("max_position_embeddings", "rms_norm_eps", "hidden_act", "tie_word_embeddings"),
    )
    return document | {name: vars(config)[name] for name in same}


def from_meta(params: Mapping[str, object], where: str, *, vocab_size: int | None = None) -> ModelConfig:
    """The model that a params.json of Meta's Llama describes.

    `vocab_size` stands in where the file says -1 (Llama 2), and must be the tokenizer's. Meta's files leave out the
    context length and the factor of the scaled rotary embedding; both follow from what the releases are.
    """
    fields = Fields(params, where, {"norm_eps": 1e-5, "multiple_of": 256, "rope_theta": 10_000.0, "vocab_size": -1})
    fields.used |= {"max_batch_size", "max_seq_len"}  # limits of Meta's own program
    dim = fields.integer("dim")
    heads = fields.integer("n_heads")
    vocab = fields.integer("vocab_size", minimum=-1)
    if vocab < 1:
        if vocab_size is None:
            raise fields.error("vocab_size", f"is {vocab}, and there is no tokenizer.model beside it to count: add it")
        vocab = vocab_size
    theta = fields.number("rope_theta", above=0.0)
    rope = RopeConfig(theta=theta)
    if fields.flag("use_scaled_rope"):
        # The 1B and 3B of Llama 3.2 stretch by 32, the models of Llama 3.1 and 3.3 by 8.
        factor = fields.optional_number("rope_scaling_factor", above=0.0) or (32.0 if dim in (2048, 3072) else 8.0)
        high = fields.optional_number("rope_high_freq_factor", above=1.0) or 4.0
        rope = RopeConfig(
            theta=theta,
            kind="llama3",
            factor=factor,
            low_freq_factor=1.0,
            high_freq_factor=high,
            original_max_position_embeddings=8192,
        )
    llama3 = vocab >= 128_000
    if rope.kind == "llama3":
        max_positions = 131_072
    elif llama3:
        max_positions = 8192
    else:
        max_positions = 16_384 if theta >= 1_000_000 else 4096  # CodeLlama, Llama 2
    result = _llama(
        fields,
        dim=dim,
        heads=heads,
        vocab_size=vocab,
        intermediate_size=_rounded_ffn(fields, int(8 * dim / 3)),
        rope=rope,
        max_positions=max_positions,
    )
    fields.refuse_unread((), "Meta's params.json")
    if not llama3:
        return replace(result, bos_token_id=1, eos_token_ids=(2,))
    return replace(result, bos_token_id=128_000, eos_token_ids=(128_001, 128_008, 128_009))


def from_llama2c(args: Mapping[str, object], where: str) -> ModelConfig:
    """The model of a llama2.c checkpoint: the `model_args` of a .pt, or `read_llama2c_header` of a .bin.

    Its stories are divided by the start token, so that one ends a text as the end token does.
    """
    fields = Fields(
        args, where, {"norm_eps": 1e-5, "multiple_of": 256, "max_seq_len": 2048, "tie_word_embeddings": True}
    )
    fields.used.add("dropout")
    dim = fields.integer("dim")
    hidden = fields.optional_integer("hidden_dim")
    fields.used.add("multiple_of")
    result = _llama(
        fields,
        dim=dim,
        heads=fields.integer("n_heads"),
        vocab_size=fields.integer("vocab_size"),
        intermediate_size=hidden or _rounded_ffn(fields, int(2 * 4 * dim / 3)),
        rope=RopeConfig(),
        max_positions=fields.integer("max_seq_len"),
    )
    result = replace(result, tie_word_embeddings=fields.flag("tie_word_embeddings"))
    fields.refuse_unread((), "a llama2.c checkpoint")
    return replace(result, bos_token_id=1, eos_token_ids=(2, 1))


def read_llama2c_header(path: Path) -> dict[str, object]:
    """The arguments in the first bytes of a llama2.c .bin, of its first (headerless) or second (versioned) layout."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if len(head) < 64:
        raise UserError(f"{path}: {len(head)} bytes are too few for a llama2.c checkpoint: the file is truncated")
    magic, version = struct.unpack_from("<Ii", head)
    versioned = magic == _LLAMA2C_MAGIC
    if versioned and version != 1:
        raise UserError(f"{path}: is of version {version} of llama2.c's format (quantized): export version 0 or 1")
    values = struct.unpack_from("<7i", head, 8 if versioned else 0)
    args: dict[str, object] = dict(zip(_LLAMA2C_HEADER, values, strict=True))
    vocab_size = values[5]
    # The first layout marks an output matrix of its own by a negative vocabulary, the second by a byte.
    args["vocab_size"] = abs(vocab_size)
    args["tie_word_embeddings"] = bool(head[36]) if versioned else vocab_size > 0
    return args


def _llama(
    fields: Fields,
    *,
    dim: int,
    heads: int,
    vocab_size: int,
    intermediate_size: int,
    rope: RopeConfig,
    max_positions: int,
) -> ModelConfig:
    """What Meta's and llama2.c's descriptions share."""
    kv_heads = fields.optional_integer("n_kv_heads") or heads
    if heads % kv_heads:
        raise fields.error("n_kv_heads", f"is {kv_heads}, which does not divide n_heads ({heads})")
    if dim % heads or dim // heads % 2:
        raise fields.error("dim", f"is {dim}, which does not make even heads of n_heads ({heads})")
    return ModelConfig(
        family="llama",
        vocab_size=vocab_size,
        hidden_size=dim,
        intermediate_size=intermediate_size,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=dim // heads,
        max_position_embeddings=max_positions,
        layers=(LayerConfig("full", rope),) * fields.integer("n_layers"),
        rms_norm_eps=fields.number("norm_eps", above=0.0),
    )


def _rounded_ffn(fields: Fields, width: int) -> int:
    """Meta's feed-forward width: two thirds of 4 * dim, scaled, rounded up to `multiple_of`."""
    width = int((fields.optional_number("ffn_dim_multiplier", above=0.0) or 1.0) * width)
    multiple = fields.integer("multiple_of")
    return multiple * -(-width // multiple)


def _load_directory(path: Path) -> ModelConfig:
    if (path / "config.json").is_file():
        return _load_hf(path / "config.json")
    if (path / "params.json").is_file():
        return load_config(path / "params.json")
    checkpoints = [p for p in sorted(path.glob("*.pt")) + sorted(path.glob("*.bin")) if p.name != "tokenizer.bin"]
    if len(checkpoints) == 1:
        return load_config(checkpoints[0])
    if checkpoints:
        names = ", ".join(p.name for p in checkpoints[:5])
        raise UserError(f"{path}: has several checkpoints and no config.json; name one of them: {names}")
    raise UserError(f"{path}: no config.json, params.json or llama2.c checkpoint there: it is not a model's directory")


def _load_hf(path: Path) -> ModelConfig:
    config = from_hf(_read_json(path), str(path))
    generation = path.with_name("generation_config.json")
    if not generation.is_file():
        return config
    bos, eos = read_special_ids(Fields(_read_json(generation), str(generation)))
    merged = tuple(dict.fromkeys((*config.eos_token_ids, *eos)))
    return replace(config, eos_token_ids=merged, bos_token_id=config.bos_token_id if bos is None else bos)


def _read_json(path: Path) -> Mapping[str, object]:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise UserError(f"{path}: is larger than {_MAX_JSON_BYTES} bytes; it is not a model's configuration")
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: is {shown(data)}, not a JSON object")
    return data


def _read_llama2c_pt(path: Path) -> Mapping[str, object]:
    """`model_args` of a llama2.c training checkpoint; no tensor is read."""
    import torch

    try:
        checkpoint = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for a damaged or unsafe file; all mean the same to its owner
        first_line = str(error).partition("\n")[0][:200]
        raise UserError(f"{path}: cannot be read as a PyTorch checkpoint: {first_line}") from error
    args = checkpoint.get("model_args") if isinstance(checkpoint, dict) else None
    if not isinstance(args, dict):
        raise UserError(f"{path}: has no model_args; only the .pt checkpoints of llama2.c are read")
    return args


def _vocab_size_beside(path: Path) -> int | None:
    """The number of pieces in the SentencePiece tokenizer.model beside params.json; None without one."""
    tokenizer = path.with_name("tokenizer.model")
    if not tokenizer.is_file():
        return None
    import sentencepiece

    try:
        return int(sentencepiece.SentencePieceProcessor(model_file=str(tokenizer)).vocab_size())
    except (RuntimeError, OSError) as error:
        # Llama 3's tokenizer.model is another format; its params.json says the size itself.
        if b" " in tokenizer.read_bytes()[:64]:
            return None
        raise UserError(f"{tokenizer}: cannot be read as a SentencePiece model: {error}") from error
