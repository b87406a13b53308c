"""Hugging Face's `tokenizer.json`, run by the `tokenizers` library. Knows which of its tokens text must not become.

The library finds added tokens in any text. It is told to leave special ones alone, and one token is added: a separator,
unguessable and thus in no text. Special tokens between pieces of a text are encoded as it and then put in its place, so
that what is around them is cut and joined exactly as the library would with the special tokens themselves.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Library

from config.errors import UserError
from model.config import ModelConfig
from model.tokenizer_base import BYTE_PIECE, SPACE, ByteStandIn, Metadata, PieceTokenizer, Special


def _byte_characters() -> dict[str, int]:
    """GPT-2's characters for bytes: printable Latin-1 for itself, and 256, 257, … for the others in turn."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_CHARACTERS = _byte_characters()


class HuggingFaceTokenizer(PieceTokenizer):
    """Encodes as `tokenizers` does. Text comes back as it was unless the file asks for it to be normalized."""

    def __init__(self, path: Path, data: bytes, metadata: Metadata, config: ModelConfig) -> None:
        """`data`: the tokenizer.json, which is at `path` or in what is there."""
        library = _library(path, data)
        self._decoder = _Decoder(path, library)
        added = library.get_added_tokens_decoder()
        special = {i: token for i, token in added.items() if _is_special(i, token, metadata)}
        self._added = {i: token.content for i, token in added.items()}
        self._piece = library.id_to_token
        count = 1 + max(library.get_vocab().values(), default=-1)
        first = library.encode("").ids[:1]
        bos = next((token.content for i, token in special.items() if first == [i]), None)
        super().__init__(
            path,
            count,
            {token.content: Special(i, token.lstrip, token.rstrip) for i, token in special.items()},
            metadata,
            config,
            bos=bos or _piece_of(config.bos_token_id, special),
            eos=(),
            add_bos=bos is not None,
            prefix_space=self._decoder.strips_space,
            holes=frozenset(i for i in range(config.vocab_size, count) if self._piece(i) is None),
        )
        steps = _steps(library.pre_tokenizer, "pretokenizers")
        self._metaspace = any(step["type"] == "Metaspace" and step["prepend_scheme"] != "never" for step in steps)
        self._library = _text_only(path, data, library, special)
        self._separator = f"\U000f0000{secrets.token_hex(16)}\U000f0000"
        self._library.add_tokens([AddedToken(self._separator, normalized=False, special=False)])
        self._separator_id = self._library.token_to_id(self._separator)
        byte_ids = {byte: library.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
        known = {byte: i for byte, i in byte_ids.items() if i is not None and not self._decoder.byte_level}
        private_use = map(chr, range(0xE000, 0xF900))
        self._stand_in = ByteStandIn(known, {c for c in private_use if library.token_to_id(c) is not None})

    def _encode(self, parts: Sequence[str | int]) -> list[int]:
        replaced, stand_in = self._stand_in.replace(parts)
        text = "".join(part if isinstance(part, str) else self._separator for part in replaced)
        ids = self._library.encode(text, add_special_tokens=False).ids
        specials = iter([part for part in parts if isinstance(part, int)])
        ids = self._stand_in.restore(ids, stand_in)
        return [next(specials) if token == self._separator_id else token for token in ids]

    def _kept_whole(self, text: str) -> str:
        # Metaspace puts no space before a text that begins with one; decoded, it would be without. SentencePiece does.
        return f" {text}" if self._metaspace and text.startswith(" ") else text

    def _bytes(self, token: int) -> bytes:
        if self._decoder.byte_level and token in self._added:
            # Added tokens are written as they are, not as characters for bytes.
            return self._added[token].encode()
        piece = self._piece(token)
        return b"" if piece is None else self._decoder.bytes(piece)


class _Decoder:
    """How pieces are written, known from the decoder that the file names: as characters for bytes, or with U+2581."""

    def __init__(self, path: Path, library: Library) -> None:
        steps = _steps(library.decoder, "decoders")
        kinds = {step["type"] for step in steps}
        self.byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        if not kinds or not (self.byte_level or kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}):
            raise UserError(
                f"{path}: joins tokens by {' and '.join(sorted(kinds)) or 'no decoder'}, which is not supported; "
                "ByteLevel, Metaspace and ByteFallback are"
            )
        self.strips_space = any(
            (step["type"] == "Strip" and step["start"] > 0)
            or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
            for step in steps
        )

    def bytes(self, piece: str) -> bytes:
        if self.byte_level:
            try:
                return bytes([BYTE_CHARACTERS[character] for character in piece])
            except KeyError:
                return piece.encode()
        if self._byte_fallback and (match := BYTE_PIECE.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        return piece.replace(SPACE, " ").encode()


def _steps(component: Any, inner: str) -> list[dict[str, Any]]:
    """What a component of the library does, step by step, as its file describes it."""
    if component is None:
        return []
    state = json.loads(component.__getstate__())
    return list(state[inner]) if state["type"] == "Sequence" else [state]


def _library(path: Path, data: bytes) -> Library:
    try:
        return Library.from_buffer(data)
    except Exception as error:  # the library raises nothing narrower
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: is no tokenizer.json, or damaged ({reason}); get it again") from None


def _is_special(token_id: int, token: AddedToken, metadata: Metadata) -> bool:
    return token.special or token.content in metadata.special_pieces or metadata.added.get(token_id, ("", False))[1]


def _piece_of(token: int | None, special: Mapping[int, AddedToken]) -> str | None:
    return special[token].content if token is not None and token in special else None


def _text_only(path: Path, data: bytes, library: Library, special: Mapping[int, AddedToken]) -> Library:
    """The library's tokenizer in a form that makes no special token of any text."""
    library.encode_special_tokens = True
    batch = library.encode_batch([token.content for token in special.values()], add_special_tokens=False)
    if type(library.model).__name__ == "BPE" and not any(set(encoding.ids) & set(special) for encoding in batch):
        return library
    # The model itself has pieces that are spelled so, or the file does not call them special: in a second tokenizer
    # they are spelled in a way that no text is.
    spelling = {token.content: f"\U000f0001{secrets.token_hex(16)}" for token in special.values()}
    file = json.loads(data)
    for token in file["added_tokens"]:
        token["content"] = spelling.get(token["content"], token["content"])
    file["post_processor"] = None
    model = file["model"]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {spelling.get(piece, piece): i for piece, i in vocab.items()}
    else:
        model["vocab"] = [[spelling.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token") in spelling:
        model["unk_token"] = spelling[model["unk_token"]]
    if "merges" in model:
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        model["merges"] = [[a, b] for a, b in pairs if not {a, b, a + b} & spelling.keys()]
    return _library(path, json.dumps(file).encode())
