"""Which tokenizer a model has, known from its files. Knows names and first bytes; each kind has a module of its own."""

import re
from pathlib import Path

from config.errors import UserError
from model.checkpoint import find_gguf, first_bytes, wrong_file
from model.config import ModelConfig
from model.tokenizer_base import PieceTokenizer, Tokenizer, read_metadata

__all__ = ["FILES", "Tokenizer", "has_tokenizer", "load_tokenizer"]

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer.bin")
"""Where a tokenizer may be, the first that is there."""

MAX_BYTES = 128 << 20
TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
# A SentencePiece model begins with its first piece: field 1 of the model, then field 1 of the piece.
SENTENCEPIECE = re.compile(rb"\n[\x00-\xff]{1,3}\n", re.DOTALL)


def load_tokenizer(path: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer of the model at `path`, a directory or a file of weights with the tokenizer beside it.

    tokenizer.json comes first, as in Transformers; a tokenizer.model is SentencePiece's or tiktoken's, as its first
    bytes say; a tokenizer.bin is llama2.c's; a GGUF file has its own in it. Raises UserError when there is none, when
    it is damaged or something else, or when it has tokens that the model does not know.
    """
    if (gguf := _gguf_with_tokenizer(path)) is not None:
        from model.tokenizer_gguf import load_gguf_tokenizer

        return load_gguf_tokenizer(gguf, config)
    file = _find(path)
    if file is None:
        directory = path if path.is_dir() else path.parent
        raise UserError(f"{directory}: no tokenizer here; looked for {', '.join(FILES[:-1])} and {FILES[-1]}")
    return _load(file, config)


def has_tokenizer(path: Path) -> bool:
    """Whether there is one to load."""
    return _gguf_with_tokenizer(path) is not None or _find(path) is not None


def _gguf_with_tokenizer(path: Path) -> Path | None:
    if (gguf := find_gguf(path)) is None:
        return None
    from model.tokenizer_gguf import has_gguf_tokenizer

    return gguf if has_gguf_tokenizer(gguf) else None


def _find(path: Path) -> Path | None:
    directory = path if path.is_dir() else path.parent
    return next((directory / name for name in FILES if (directory / name).exists()), None)


def _load(path: Path, config: ModelConfig) -> Tokenizer:
    metadata = read_metadata(path.parent, config)
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path}: is larger than {MAX_BYTES >> 20} MiB, too large for a tokenizer")
    head = first_bytes(path, 4096)
    tokenizer: PieceTokenizer
    # Only the library that is needed is imported.
    if path.suffix == ".json":
        if head.lstrip()[:1] != b"{":
            raise wrong_file(path, "a tokenizer.json")
        from model.tokenizer_hf import HuggingFaceTokenizer

        tokenizer = HuggingFaceTokenizer(path, path.read_bytes(), metadata, config)
    elif path.suffix == ".bin":
        # The length of the longest piece, a small number, is the first of four bytes.
        if head[2:4] != b"\0\0":
            raise wrong_file(path, "a tokenizer of llama2.c's")
        from model.tokenizer_sentencepiece import load_llama2c

        tokenizer = load_llama2c(path, metadata, config)
    elif TIKTOKEN_LINE.match(head):
        from model.tokenizer_tiktoken import TiktokenTokenizer

        tokenizer = TiktokenTokenizer(path, metadata, config)
    elif SENTENCEPIECE.match(head):
        from model.tokenizer_sentencepiece import load_sentencepiece

        tokenizer = load_sentencepiece(path, metadata, config)
    else:
        raise wrong_file(path, "a tokenizer of SentencePiece's or tiktoken's")
    return tokenizer
