"""Text to token ids: trains the SentencePiece tokenizer, writes its files and lays out stories and dialogues as ids.

The layout is the one that the chat template renders; a test holds that the two agree.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from model.default.corpus import Example

UNK, BOS, EOS, PAD = 0, 1, 2, 3
USER_PIECE, ASSISTANT_PIECE = "<|user|>", "<|assistant|>"

# Unknown roles are refused; a system message is accepted and left out, because nothing in the corpora has one.
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{- '<|user|>' + message['content'] | trim -}}"
    "{%- elif message['role'] == 'assistant' -%}{{- '<|assistant|>' + message['content'] | trim + eos_token -}}"
    "{%- elif message['role'] != 'system' -%}{{- raise_exception('the roles are system, user and assistant') -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> bytes:
    """A SentencePiece BPE model, as a proto: no normalization and bytes for the rest, so that text comes back."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts,
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        character_coverage=1.0,
        max_sentence_length=1_000_000,
        control_symbols=[USER_PIECE, ASSISTANT_PIECE],
        unk_id=UNK,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=PAD,
        minloglevel=2,
    )
    return model.getvalue()


class Vocabulary:
    """A trained tokenizer and the layout of examples."""

    def __init__(self, model: bytes) -> None:
        self.model = model
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.size: int = self.pieces.vocab_size()
        self.user: int = self.pieces.piece_to_id(USER_PIECE)
        self.assistant: int = self.pieces.piece_to_id(ASSISTANT_PIECE)

    def encode_all(self, examples: list[Example]) -> list[list[int]]:
        """Ids of each example. A story: BOS text EOS. A dialogue: BOS, user turns, and assistant turns with EOS."""
        contents: list[str] = [content for example in examples for _, content in example.messages]
        encoded = iter(self.pieces.encode(contents, num_threads=8))
        return [self._lay_out(example, encoded) for example in examples]

    def _lay_out(self, example: Example, encoded: Iterator[list[int]]) -> list[int]:
        ids = [BOS]
        for role, _ in example.messages:
            if role != "story":
                ids.append(self.user if role == "user" else self.assistant)
            ids += next(encoded)
            if role != "user":
                ids.append(EOS)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of the ids; the marks of turns stay visible, BOS, EOS and padding are left out."""
        text = ""
        run: list[int] = []
        for token in ids:
            if token in (self.user, self.assistant):
                text += self.pieces.decode(run) + f"\n{self.pieces.id_to_piece(token)} "
                run = []
            elif token > PAD:
                run.append(token)
        return text + str(self.pieces.decode(run))

    def save(self, folder: Path, context: int) -> None:
        """Write tokenizer.model, tokenizer_config.json and chat_template.jinja."""
        (folder / "tokenizer.model").write_bytes(self.model)
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
        config = json.dumps(self._config(context), indent=2)
        (folder / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")

    def _config(self, context: int) -> dict[str, Any]:
        special = [UNK, BOS, EOS, PAD, self.user, self.assistant]
        plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
        return {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "add_prefix_space": False,
            "legacy": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": context,
            "bos_token": self.pieces.id_to_piece(BOS),
            "eos_token": self.pieces.id_to_piece(EOS),
            "unk_token": self.pieces.id_to_piece(UNK),
            "pad_token": self.pieces.id_to_piece(PAD),
            "added_tokens_decoder": {str(i): {"content": self.pieces.id_to_piece(i), **plain} for i in special},
            "chat_template": CHAT_TEMPLATE,
        }
