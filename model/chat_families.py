"""The chat formats of the families of models, for those that bring no template: which one a model was taught, as its
special tokens, the ends of its texts and its name tell. Knows how formats are told apart; not how they are rendered.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from model.config import ModelConfig
from model.tokenizer_base import Tokenizer

TEMPLATES = Path(__file__).parent / "templates"
CHAT_NAMES = ("chat", "instruct", "-it")


@dataclass(frozen=True)
class Format:
    """One way of writing a conversation. `template`: a file in TEMPLATES. `stop`: texts that end an answer. `settings`:
    what the file leaves open, by name.
    """

    name: str
    template: str
    stop: tuple[str, ...] = ()
    settings: tuple[tuple[str, str], ...] = ()

    def read(self) -> str:
        head = "".join(f"{{%- set {name} = {value!r} -%}}" for name, value in self.settings)
        return head + (TEMPLATES / self.template).read_text(encoding="utf-8")


PLAIN = Format("plain text", "plain.jinja", ("\nUser:", "\nAssistant:"))


@dataclass(frozen=True)
class _Family:
    """A format and what tells it: special tokens that must all be there, the one that ends a turn first. A model that
    was taught the format also ends its texts there; its base model has the tokens too, and does not.
    """

    format: Format
    pieces: tuple[str, ...]
    also: Callable[[ModelConfig], bool] = lambda config: True


def _large(config: ModelConfig) -> bool:
    """Whether the vocabulary is one of words as bytes, which needs more of them than SentencePiece's."""
    return config.vocab_size > 100_000


_FAMILIES = (
    _Family(Format("Llama 3", "llama3.jinja"), ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")),
    _Family(Format("Phi-4", "phi4.jinja"), ("<|im_end|>", "<|im_start|>", "<|im_sep|>")),
    _Family(Format("Qwen", "qwen.jinja"), ("<|im_end|>", "<|im_start|>"), lambda config: config.family == "qwen2"),
    _Family(Format("ChatML", "chatml.jinja"), ("<|im_end|>", "<|im_start|>")),
    _Family(Format("Gemma", "gemma.jinja"), ("<end_of_turn>", "<start_of_turn>")),
    _Family(Format("Granite", "granite.jinja"), ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>")),
    _Family(
        Format("Phi-4-mini", "phi4_mini.jinja"),
        ("<|end|>", "<|user|>", "<|assistant|>"),
        _large,
    ),
    _Family(Format("Phi-3", "phi3.jinja"), ("<|end|>", "<|user|>", "<|assistant|>")),
)
WORD, NO_WORD = (("space", " "),), (("space", ""),)


@dataclass(frozen=True)
class _Named:
    """A format whose end of a turn is the end of any text: only a name with one of `words` says who was taught it."""

    format: Format
    words: tuple[str, ...]
    pieces: tuple[str, ...] = ()
    also: Callable[[ModelConfig], bool] = lambda config: True


_MISTRAL = ("mistral", "mixtral", "ministral", "codestral")
_BY_NAME = (
    _Named(Format("Mistral", "mistral7.jinja", settings=NO_WORD), _MISTRAL, ("[INST]", "[SYSTEM_PROMPT]"), _large),
    _Named(Format("Mistral", "mistral7.jinja", settings=WORD), _MISTRAL, ("[INST]", "[SYSTEM_PROMPT]")),
    _Named(Format("Mistral", "mistral.jinja", settings=NO_WORD), _MISTRAL, ("[INST]", "[/INST]"), _large),
    _Named(Format("Mistral", "mistral.jinja", settings=WORD), _MISTRAL, ("[INST]", "[/INST]")),
    _Named(Format("Mistral", "mistral1.jinja"), _MISTRAL),
    _Named(Format("Llama 2", "llama2.jinja"), ("llama-2", "llama2", "llama_2", "codellama")),
)


def find_format(tokenizer: Tokenizer, config: ModelConfig, name: str) -> Format:
    """The format that a model was taught as far as can be told, else PLAIN. name: the model's, or its path's."""
    ends = tokenizer.eos_ids | set(config.eos_token_ids)
    for family in _FAMILIES:
        ids = [tokenizer.special_id(piece) for piece in family.pieces]
        if None not in ids and ids[0] in ends and family.also(config):
            return family.format
    lowered = name.lower()
    if any(word in lowered for word in CHAT_NAMES):
        for named in _BY_NAME:
            there = all(tokenizer.special_id(piece) is not None for piece in named.pieces)
            if there and any(word in lowered for word in named.words) and named.also(config):
                return named.format
    return PLAIN
