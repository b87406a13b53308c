"""The tokenizer in a GGUF file, as the files that the same tokenizer has elsewhere: a tokenizer.model or a
tokenizer.json, and a tokenizer_config.json, for the readers of those. Knows GGUF's keys, and the ways to cut text into
words, of which a GGUF file has only the name.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.config import ModelConfig
from model.config_fields import shown
from model.gguf_file import Gguf, Strings, as_written, read_gguf
from model.tokenizer_base import SPACE, PieceTokenizer, metadata_of

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of tokens, as SentencePiece counts them

SPECIAL_LOOK = re.compile(r"<\|[^|].*\|>|<｜.+｜>|<(start|end)_of_turn>")
"""What old converters took for text."""
MARKER = re.compile(r"[<\[]\S+[>\]]")
ENDS = frozenset(
    """
    <|eot_id|> <|eom_id|> <|im_end|> <|end|> <end_of_turn> <|endoftext|> <|end_of_text|> <|eot|> <EOT> [EOT]
    <|return|> <|call|> <｜end▁of▁sentence｜> <end_of_utterance>
    """.split()  # noqa: SIM905
)
"""Tokens that end what a model says whichever model it is: a file names one or two of its own."""


@dataclass(frozen=True)
class TokenizerFiles:
    """What a directory of the same model would have."""

    name: str
    """Of the tokenizer's file."""
    data: bytes
    settings: Mapping[str, Any]
    """tokenizer_config.json."""
    generation: Mapping[str, Any]
    """generation_config.json."""

    def documents(self) -> dict[str, bytes]:
        """Files by their names."""
        written = {"tokenizer_config.json": self.settings, "generation_config.json": self.generation}
        return {self.name: self.data} | {
            name: (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
            for name, document in written.items()
        }


@dataclass(frozen=True)
class _Vocabulary:
    """The tokens: how they are spelled, and of which types they are."""

    pieces: list[str]
    types: list[int]

    def special(self, token: int) -> bool:
        return self.types[token] == CONTROL

    def added(self) -> list[int]:
        """Tokens that text is not made of, and those that are found in it whole."""
        return [i for i, kind in enumerate(self.types) if kind in (CONTROL, USER_DEFINED)]


def has_gguf_tokenizer(path: Path) -> bool:
    """Whether there is one in the file."""
    return read_gguf(path).get("tokenizer.ggml.model") not in (None, "none", "no_vocab")


def load_gguf_tokenizer(path: Path, config: ModelConfig) -> PieceTokenizer:
    """The tokenizer of a GGUF file. Raises UserError."""
    files = tokenizer_files(read_gguf(path))
    metadata = metadata_of(files.settings, files.generation, config, path)
    if files.name == "tokenizer.json":
        from model.tokenizer_hf import HuggingFaceTokenizer

        return HuggingFaceTokenizer(path, files.data, metadata, config)
    from model.tokenizer_sentencepiece import SentencePieceTokenizer

    return SentencePieceTokenizer(path, files.data, metadata, config)


def tokenizer_files(model: Gguf) -> TokenizerFiles:
    """Raises UserError for a tokenizer of a kind that is not known, and for one that contradicts itself."""
    kind = model.text("tokenizer.ggml.model")
    if kind not in ("llama", "gpt2"):
        raise model.error("tokenizer.ggml.model", f"is {shown(kind)}; only llama and gpt2 can be read here")
    vocabulary = _vocabulary(model)
    if kind == "llama":
        name, data, add_bos = "tokenizer.model", _sentencepiece(model, vocabulary), True
        named_by_default = {"bos": 1, "eos": 2}
    else:
        words = _words(model)
        name, data, add_bos = "tokenizer.json", _byte_level(model, vocabulary, words), words.add_bos
        named_by_default = {}
    return TokenizerFiles(
        name, data, _settings(model, vocabulary, named_by_default, add_bos), _generation(model, vocabulary)
    )


def _vocabulary(model: Gguf) -> _Vocabulary:
    pieces = model.strings("tokenizer.ggml.tokens")
    types = model.numbers("tokenizer.ggml.token_type", "iu", len(pieces))
    kinds = [NORMAL] * len(pieces) if types is None else [int(kind) for kind in types]
    for token, piece in enumerate(pieces):
        if not piece:
            pieces[token], kinds[token] = f"[EMPTY_{token}]", UNUSED
        elif kinds[token] == USER_DEFINED and SPECIAL_LOOK.fullmatch(piece):
            kinds[token] = CONTROL
    for name in ("bos", "eos", "eot", "eom"):
        # Files that call these plain text exist.
        end = model.whole_number(f"tokenizer.ggml.{name}_token_id")
        if end is not None and 0 <= end < len(pieces) and MARKER.fullmatch(pieces[end]):
            kinds[end] = CONTROL
    if len(set(pieces)) < len(pieces):
        ((twice, _),) = Counter(pieces).most_common(1)
        raise model.error("tokenizer.ggml.tokens", f"has {shown(twice)} twice; get the file again")
    return _Vocabulary(pieces, kinds)


# ---- tokenizer_config.json, generation_config.json ----


def _settings(
    model: Gguf, vocabulary: _Vocabulary, defaults: Mapping[str, int], add_bos: bool
) -> dict[str, Any]:
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    named: dict[str, str] = {}
    for key, name in names.items():
        token: int | None = model.whole_number(f"tokenizer.ggml.{key}_token_id")
        token = defaults.get(key) if token is None else token
        if token is not None and 0 <= token < len(vocabulary.pieces) and vocabulary.types[token] in (CONTROL, UNKNOWN):
            named[name] = vocabulary.pieces[token]
    swallows = _swallowing(model, vocabulary)
    added = {
        str(i): {"content": vocabulary.pieces[i], "special": vocabulary.special(i), "rstrip": i in swallows}
        for i in vocabulary.added()
    }
    flags = {
        "add_bos_token": model.flag("tokenizer.ggml.add_bos_token", add_bos),
        "add_eos_token": model.flag("tokenizer.ggml.add_eos_token", False),
    }
    templates = chat_templates(model)
    listed = [{"name": name, "template": text} for name, text in templates.items()]
    return {
        "legacy": False,
        **flags,
        **named,
        "added_tokens_decoder": added,
        **({"chat_template": listed if len(listed) > 1 else templates["default"]} if templates else {}),
    }


def chat_templates(model: Gguf) -> dict[str, str]:
    """The chat templates in the file by name, one of them "default"; none where it brings none."""
    key = "tokenizer.chat_template"
    default, names = model.get(key), model.get("tokenizer.chat_templates")
    if not isinstance(default, str):
        return {}
    others = {name: model.get(f"{key}.{name}") for name in (names.decode() if isinstance(names, Strings) else ())}
    return {**{name: text for name, text in others.items() if isinstance(text, str)}, "default": default}


def _swallowing(model: Gguf, vocabulary: _Vocabulary) -> frozenset[int]:
    """Phi-3's special tokens swallow white space after them, which no GGUF file says."""
    if model.architecture != "phi3" or model.get("tokenizer.ggml.model") != "llama":
        return frozenset()
    plain = ("<unk>", "<s>", "<|endoftext|>")
    return frozenset(i for i in vocabulary.added() if vocabulary.special(i) and vocabulary.pieces[i] not in plain)


_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def sampling_document(model: Gguf) -> dict[str, Any]:
    """The sampling that a file recommends, as a generation_config.json does."""
    document: dict[str, Any] = {}
    for key, name in _SAMPLING.items():
        value = model.get(f"general.sampling.{key}")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            document[name] = as_written(value)
    return document


def _generation(model: Gguf, vocabulary: _Vocabulary) -> dict[str, Any]:
    named = (model.whole_number(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    ends = dict.fromkeys(token for token in named if token is not None)
    for token in vocabulary.added():
        if vocabulary.pieces[token] in ENDS:
            ends[token] = None
    return {"eos_token_id": list(ends)} | sampling_document(model)


# ---- tokenizer.model ----


def _sentencepiece(model: Gguf, vocabulary: _Vocabulary) -> bytes:
    scores = model.numbers("tokenizer.ggml.scores", "fiu", len(vocabulary.pieces))
    if scores is None:
        raise model.error("tokenizer.ggml.scores", "is missing")
    from model.tokenizer_sentencepiece import model_file

    def spelled(piece: str, kind: int) -> str:
        return piece.replace(" ", SPACE) if kind in (NORMAL, USER_DEFINED) else piece

    types = [kind if NORMAL <= kind <= BYTE else UNUSED for kind in vocabulary.types]
    if UNKNOWN not in types:
        unknown = model.whole_number("tokenizer.ggml.unknown_token_id") or 0
        types[min(max(unknown, 0), len(types) - 1)] = UNKNOWN
    pieces = [spelled(piece, kind) for piece, kind in zip(vocabulary.pieces, types, strict=True)]
    return model_file(
        list(zip(pieces, scores.astype(float).tolist(), types, strict=True)),
        dummy_prefix=model.flag("tokenizer.ggml.add_space_prefix", True),
        removes_spaces=model.flag("tokenizer.ggml.remove_extra_whitespaces", False),
    )


# ---- tokenizer.json ----


@dataclass(frozen=True)
class _Words:
    """How text is cut into words before bytes are merged."""

    steps: tuple[Mapping[str, Any], ...]
    """What `tokenizers` does before it takes bytes for characters."""
    regex: bool = False
    """Whether GPT-2's words are looked for then."""
    whole_words: bool = False
    """Whether a word that is a token becomes that, whatever merges lead to."""
    add_bos: bool = False
    nfc: bool = False


def _split(*alternatives: str) -> tuple[Mapping[str, Any], ...]:
    pattern = {"Regex": "|".join(alternatives)}
    return ({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False},)


# The published regular expressions of Llama 3, Qwen 2, Mistral's Tekken and GPT-4o have these in common.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS, _SIGNS_AND_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASES = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_DIGITS = ({"type": "Digits", "individual_digits": True},)

_THREES = _split(_CONTRACTIONS, _LETTERS, r"\p{N}{1,3}", _SIGNS, _SPACES)
_ONES = _split(_CONTRACTIONS, _LETTERS, r"\p{N}", _SIGNS, _SPACES)
_GPT2 = _Words((), regex=True)
_STARCODER = _Words(_DIGITS, regex=True)
_LLAMA3 = _Words(_THREES, whole_words=True, add_bos=True)
_GPT4O = _Words(_split(*(case + _CONTRACTIONS + "?" for case in _CASES), r"\p{N}{1,3}", _SIGNS_AND_SLASHES, _SPACES))

WORDS: dict[str, _Words] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "minerva-7b"), _STARCODER),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _Words(_THREES)),
    "qwen2": _Words(_ONES, nfc=True),
    **dict.fromkeys(("deepseek-r1-qwen", "stablelm2", "megrez"), _Words(_ONES)),
    "tekken": _Words(_split(*_CASES, r"\p{N}", _SIGNS_AND_SLASHES, _SPACES), whole_words=True, add_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
}
"""tokenizer.ggml.pre -> what it means."""


def _words(model: Gguf) -> _Words:
    name = model.get("tokenizer.ggml.pre")
    if name in (None, "default"):
        raise model.error(
            "tokenizer.ggml.pre",
            "does not say how text is cut into words: the file is of an old converter; get a newer one",
        )
    if not isinstance(name, str) or name not in WORDS:
        raise model.error("tokenizer.ggml.pre", f"is {shown(name)}; known here are {', '.join(WORDS)}")
    return WORDS[name]


def _byte_level(model: Gguf, vocabulary: _Vocabulary, words: _Words) -> bytes:
    merges = [merge.partition(" ") for merge in model.strings("tokenizer.ggml.merges")]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": words.regex}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    file = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": vocabulary.pieces[i], **plain, "special": vocabulary.special(i)}
            for i in vocabulary.added()
        ],
        "normalizer": {"type": "NFC"} if words.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*words.steps, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "ignore_merges": words.whole_words,
            "vocab": {piece: i for i, piece in enumerate(vocabulary.pieces)},
            "merges": [[left, right] for left, _, right in merges],
        },
    }
    return json.dumps(file).encode()
