"""Tiny tokenizers of every kind, trained here on a few sentences, written as the files that models come with."""

import base64
import io
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from model.config import LayerConfig, ModelConfig, RopeConfig

SENTENCES = [
    "Once upon a time there was a little dog who lived in a small house.",
    "The dog said hello to the cat, and they played together all day long!",
    "One day, 123 friends came to see them. \"What a nice day,\" said Tom.",
    "Ein kleines Haus, très joli; 한국어 и русский текст.",
    "<b>x</b> [1] | 10% {y}\n\tlines and\n\nmore   spaces",
] * 20  # fmt: skip

NASTY = [
    "",
    " ",
    "   ",
    "a",
    " a",
    "  two  spaces  ",
    "\n",
    "\n\n \t\r\n",
    "\ttab\ttab",
    "a\0b\0",
    "\0",
    "naïve café e\u0301 e\u0301\u0323",
    "日本語のテキスト、漢字。한국어",
    "שלום עולם \u200fمرحبا بالعالم",
    "👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪",
    "\ufffd",
    "a\ufffdb",
    "\ufeffBOM",
    "▁",
    "a▁b ▁▁ c",
    "\ue000\uf8ff\U000f0000\U0010ffff",
    "<s>",
    "</s> <s></s>",
    "<unk>",
    "<|user|>hi<|end|>",
    "<|end|",
    "<<|end|>>",
    "[INST] x [/INST]",
    "<|begin_of_text|><|eot_id|>",
    "<0x0A>",
    "<0x41>bc",
    "\x1b[31m\x7f\x80\u2028\u3000",
    "Once upon a time, there was a 1234567 dog's don't I'LL",
]


def tiny_config(vocab_size: int = 4096, bos: int | None = None, eos: tuple[int, ...] = ()) -> ModelConfig:
    return ModelConfig(
        family="llama",
        vocab_size=vocab_size,
        hidden_size=8,
        intermediate_size=8,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=16,
        layers=(LayerConfig("full", RopeConfig()),),
        bos_token_id=bos,
        eos_token_ids=eos,
    )


def train_sentencepiece(model_type: str = "bpe", **settings: Any) -> bytes:
    out = io.BytesIO()
    defaults = {
        "vocab_size": 420,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "character_coverage": 0.99,
        "hard_vocab_limit": False,
        "pad_id": -1,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=out, model_type=model_type, **{**defaults, **settings}
    )
    return out.getvalue()


MARKERS = ["<|user|>", "<|end|>"]


def write_sentencepiece(path: Path, model_type: str = "bpe", **settings: Any) -> Path:
    """With <|user|> and <|end|> user-defined, as chat models have them, and a double line end, as Gemma has."""
    symbols = {"user_defined_symbols": [*MARKERS, "\n\n"]}
    (path / "tokenizer.model").write_bytes(train_sentencepiece(model_type, **{**symbols, **settings}))
    return path


def write_byte_level(path: Path, *, bos: bool = True, markers: Sequence[str] = MARKERS) -> Path:
    """As Llama 3 and Qwen have it: bytes as characters; BOS by the post-processor."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens(["<s>", "</s>", *markers])
    tokenizer.add_tokens(["<think>"])
    if bos:
        template = [("<s>", tokenizer.token_to_id("<s>"))]
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=template)
    tokenizer.save(str(path / "tokenizer.json"))
    names = {
        "bos_token": "<s>" if bos else None,
        "eos_token": {"__type": "AddedToken", "content": "</s>"},
        "chat_template": None,
    }
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    return path


def write_metaspace(path: Path, scheme: str = "first") -> Path:
    """As Llama 2 and Mistral have it: U+2581 for spaces, bytes for the unknown; scheme "normalizer" is an older way."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(SENTENCES[:3] * 20, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    for piece in sorted(learned["vocab"], key=learned["vocab"].__getitem__):
        vocab[piece] = len(vocab)
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if scheme == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    if scheme != "never":
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<|user|>", AddedToken("<|end|>", rstrip=True)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(path / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    return path


def write_unigram(path: Path) -> Path:
    """As T5 and its kin have it: the model's own vocabulary spells the special tokens."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    alphabet = [chr(i) for i in range(32, 127)]
    special = ["<unk>", "<s>", "</s>", *MARKERS]
    trainer = trainers.UnigramTrainer(
        vocab_size=300, unk_token="<unk>", special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return path


def write_tiktoken(path: Path) -> Path:
    """Bytes and a few hundred merges, as Meta writes them."""
    merged: list[bytes] = [bytes([byte]) for byte in range(256)]
    for word in " ".join(SENTENCES[:4]).split(" "):
        for end in range(2, len(word.encode()) + 2):
            piece = f" {word}".encode()[:end]
            if piece not in merged and (piece[:-1] in merged):
                merged.append(piece)
    lines = [base64.b64encode(piece) + b" " + str(rank).encode() for rank, piece in enumerate(merged)]
    (path / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    return path


def write_llama2c(path: Path) -> sentencepiece.SentencePieceProcessor:
    """llama2.c's file of a SentencePiece model, as its tokenizer.py exports it; gives the original."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=train_sentencepiece())
    pieces = []
    for i in range(processor.vocab_size()):
        piece = {1: "\n<s>\n", 2: "\n</s>\n"}.get(i, processor.id_to_piece(i)).replace("▁", " ").encode()
        pieces.append((piece, processor.get_score(i)))
    with (path / "tokenizer.bin").open("wb") as out:
        out.write(struct.pack("<I", max(len(piece) for piece, _ in pieces)))
        for piece, score in pieces:
            out.write(struct.pack("<fI", score, len(piece)) + piece)
    return processor
