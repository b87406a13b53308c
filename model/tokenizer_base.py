"""What every tokenizer does alike: special tokens apart from text, bytes out of ids. Knows no library and no format."""

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from config.errors import UserError
from model.checkpoint import read_json
from model.config import ModelConfig

SPACE = "▁"  # U+2581, how SentencePiece and its kin write a space
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class Tokenizer(Protocol):
    """Text to token ids and back. A special token is never made from text, however that spells it."""

    @property
    def vocab_size(self) -> int:
        """The ids that the tokenizer knows are below this; the model may know more."""

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text; None where the model has none."""

    @property
    def add_bos(self) -> bool:
        """Whether a text begins with BOS by the tokenizer's own convention."""

    @property
    def eos_ids(self) -> frozenset[int]:
        """The tokens that end what a model says."""

    @property
    def named(self) -> Mapping[str, str]:
        """Special tokens by the names that templates know: "bos_token" -> "<s>"."""

    @property
    def special_pieces(self) -> Collection[str]:
        """How the special tokens are spelled."""

    def encode(self, text: str, *, bos: bool) -> list[int]:
        """The ids of a text. Special tokens in it are text."""

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """The ids of one text in which special tokens, given by id, stand between pieces of plain text."""

    def split_specials(self, text: str) -> list[str | int]:
        """Trusted text to parts: what spells a special token becomes its id."""

    def special_id(self, piece: str) -> int | None:
        """The id of a special token; None when there is none of this spelling."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids that begin a text; special tokens are left out, bytes that are not UTF-8 become U+FFFD."""

    def decode_bytes(self, ids: Sequence[int], *, start: bool = False) -> bytes:
        """The bytes of ids, special tokens left out. Bytes of parts join to the bytes of the whole.

        start: nothing came before in this text, so that the space that the tokenizer puts before a first word goes.
        """


@dataclass(frozen=True)
class Special:
    """A special token; it may swallow white space beside it."""

    id: int
    lstrip: bool = False
    rstrip: bool = False


@dataclass(frozen=True)
class Metadata:
    """What the files beside a tokenizer say about it. None: they do not say."""

    named: Mapping[str, str]
    bos_is_set: bool
    add_bos: bool | None
    legacy: bool
    eos_ids: tuple[int, ...]
    added: Mapping[int, tuple[str, bool]]
    """Tokens by id, with whether they are special."""
    strips: Mapping[int, tuple[bool, bool]]
    """Of some of these, whether they swallow white space before and after them."""
    special_pieces: frozenset[str]
    no_config: bool
    """Neither config.json nor params.json is there: the model is one of llama2.c's."""


def read_metadata(directory: Path, config: ModelConfig) -> Metadata:
    """Reads tokenizer_config.json, special_tokens_map.json, added_tokens.json and generation_config.json, if there."""
    settings = {**_optional(directory / "special_tokens_map.json"), **_optional(directory / "tokenizer_config.json")}
    added = _optional(directory / "added_tokens.json")
    for piece, number in added.items():
        if not isinstance(number, int):
            raise UserError(f"{directory / 'added_tokens.json'}: {piece!r} has {number!r} where its id should be")
    no_config = not (directory / "config.json").exists() and not (directory / "params.json").exists()
    generation = _optional(directory / "generation_config.json")
    return metadata_of(settings, generation, config, directory / "tokenizer_config.json", added, no_config)


def metadata_of(
    settings: Mapping[str, Any],
    generation: Mapping[str, Any],
    config: ModelConfig,
    where: Path,
    added_by_piece: Mapping[str, int] = MappingProxyType({}),
    no_config: bool = False,
) -> Metadata:
    """What the objects in a tokenizer_config.json, `where`, and a generation_config.json say, and in added_tokens.json.
    """
    named = {
        key: content
        for key, value in settings.items()
        if key.endswith("_token") and isinstance(content := _content(value), str)
    }
    added = {number: (piece, True) for piece, number in added_by_piece.items()}
    strips: dict[int, tuple[bool, bool]] = {}
    try:
        for i, token in settings.get("added_tokens_decoder", {}).items():
            added[int(i)] = (str(token["content"]), bool(token.get("special")))
            strips[int(i)] = (token.get("lstrip") is True, token.get("rstrip") is True)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f'{where}: "added_tokens_decoder" is not a list of tokens by their ids') from None
    extra = [*_as_list(settings.get("additional_special_tokens")), *_as_list(settings.get("extra_special_tokens"))]
    eos = _as_list(generation.get("eos_token_id"))
    add_bos = settings.get("add_bos_token")
    return Metadata(
        named=named,
        bos_is_set="bos_token" in settings,
        add_bos=add_bos if isinstance(add_bos, bool) else None,
        legacy=settings.get("legacy") is True,
        eos_ids=tuple(i for i in eos if isinstance(i, int)) or config.eos_token_ids,
        added=added,
        strips=strips,
        special_pieces=frozenset([*named.values(), *(piece for t in extra if isinstance(piece := _content(t), str))]),
        no_config=no_config,
    )


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _content(token: Any) -> Any:
    """A token is written as its text, or as an object with that text under "content"."""
    return token.get("content") if isinstance(token, dict) else token


def _as_list(tokens: Any) -> list[Any]:
    """What is written as a list, as an object of named ones, as a single one, or not at all."""
    if isinstance(tokens, dict):
        return list(tokens.values())
    return tokens if isinstance(tokens, list) else [tokens]


class PieceTokenizer(ABC):
    """A tokenizer over a library's: subclasses encode plain text and give the bytes of a token."""

    def __init__(
        self,
        source: Path,
        vocab_size: int,
        specials: Mapping[str, Special],
        metadata: Metadata,
        config: ModelConfig,
        *,
        bos: str | None,
        eos: Sequence[str],
        add_bos: bool,
        prefix_space: bool,
        bos_ends: bool = False,
        holes: Collection[int] = (),
    ) -> None:
        """`bos`, `eos` and `add_bos` hold where the metadata do not say. `prefix_space`: a text is encoded with a space
        before it. `bos_ends`: BOS ends a text too. `holes`: ids of no token. Raises UserError for tokens of text that
        the model does not know.
        """
        self.vocab_size = vocab_size
        # A multimodal model's tokenizer may know tokens that its language model alone does not.
        self._specials = {piece: token for piece, token in specials.items() if piece and token.id < config.vocab_size}
        self._special_ids = {token.id for token in specials.values()}
        for token in range(config.vocab_size, vocab_size):
            if token not in self._special_ids and token not in holes:
                raise UserError(
                    f"{source}: has token {token}, but the model's vocabulary is {config.vocab_size}; "
                    "tokenizer and model do not belong together"
                )
        self._known_to_model = max(config.vocab_size, vocab_size)
        self._prefix_space = prefix_space
        bos = metadata.named.get("bos_token") if metadata.bos_is_set else bos
        self.bos_id = self.special_id(bos) if bos is not None else None
        self.add_bos = self.bos_id is not None and (add_bos if metadata.add_bos is None else metadata.add_bos)
        eos_pieces = [metadata.named["eos_token"]] if "eos_token" in metadata.named else eos
        known = {"bos_token": bos, "eos_token": next(iter(eos_pieces), None)}
        self.named = {**{name: piece for name, piece in known.items() if piece is not None}, **metadata.named}
        ends = {*metadata.eos_ids, *(self.special_id(piece) for piece in eos_pieces)}
        if bos_ends:
            ends.add(self.bos_id)
        self.eos_ids = frozenset(i for i in ends if i is not None and i < config.vocab_size)
        alternatives = sorted(map(re.escape, self._specials), key=len, reverse=True)
        self._special_pattern = re.compile("|".join(alternatives)) if alternatives else None

    @abstractmethod
    def _encode(self, parts: Sequence[str | int]) -> list[int]:
        """The ids of valid Unicode text and of special tokens between."""

    def _kept_whole(self, text: str) -> str:
        """The text to encode so that this text comes back, where that is not the same."""
        return text

    @abstractmethod
    def _bytes(self, token: int) -> bytes:
        """The bytes of a token below `vocab_size` that is not special."""

    @property
    def special_pieces(self) -> Collection[str]:
        return self._specials.keys()

    def special_id(self, piece: str) -> int | None:
        token = self._specials.get(piece)
        return None if token is None else token.id

    def encode(self, text: str, *, bos: bool) -> list[int]:
        ids = self.encode_parts([self._kept_whole(text)])
        return [self.bos_id, *ids] if bos and self.bos_id is not None else ids

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        for part in parts:
            if isinstance(part, str):
                try:
                    part.encode()
                except UnicodeEncodeError as error:
                    raise UserError(
                        f"the text holds {part[error.start]!r} at character {error.start}, which is no character of "
                        "Unicode; write the text as UTF-8"
                    ) from None
        return self._encode([part for part in parts if part != ""])

    def split_specials(self, text: str) -> list[str | int]:
        return list(self._split(text)) if self._special_pattern is not None else [text]

    def _split(self, text: str) -> Iterator[str | int]:
        assert self._special_pattern is not None
        at, rstrip = 0, False
        for match in self._special_pattern.finditer(text):
            special = self._specials[match[0]]
            between = text[at : match.start()]
            between = between.lstrip() if rstrip else between
            if between := between.rstrip() if special.lstrip else between:
                yield between
            yield special.id
            at, rstrip = match.end(), special.rstrip
        if rest := text[at:].lstrip() if rstrip else text[at:]:
            yield rest

    def decode_bytes(self, ids: Sequence[int], *, start: bool = False) -> bytes:
        pieces = [self._checked_bytes(token) for token in ids]
        if start and self._prefix_space:
            first = next((i for i, piece in enumerate(pieces) if piece), None)
            if first is not None:
                pieces[first] = pieces[first].removeprefix(b" ")
        return b"".join(pieces)

    def decode(self, ids: Sequence[int]) -> str:
        return self.decode_bytes(ids, start=True).decode(errors="replace")

    def _checked_bytes(self, token: int) -> bytes:
        if not 0 <= token < self._known_to_model:
            raise UserError(f"token {token} is none of this model's: its vocabulary ends at {self._known_to_model - 1}")
        # Models pad their vocabulary: ids that no tokenizer gives have no text.
        if token >= self.vocab_size or token in self._special_ids:
            return b""
        return self._bytes(token)


class ByteStandIn:
    """Keeps U+2581 in a text apart from the spaces that are written with it.

    Where unknown characters fall back to bytes, a character that neither text nor vocabulary knows stands for it while
    the text is encoded; its three bytes are then exchanged for those of U+2581. It would come back a space otherwise.
    """

    def __init__(self, byte_ids: Mapping[int, int], in_vocabulary: Collection[str]) -> None:
        """`byte_ids`: byte value -> token; `in_vocabulary`: pieces of a single character."""
        self._byte_ids, self._taken = byte_ids, in_vocabulary

    def replace(self, parts: Sequence[str | int]) -> tuple[list[str | int], str | None]:
        """The parts with another character for U+2581, and which one it is."""
        texts = [part for part in parts if isinstance(part, str)]
        if len(self._byte_ids) < 256 or not any(SPACE in text for text in texts):
            return list(parts), None
        characters = set().union(*texts)
        free = (c for c in map(chr, range(0xE000, 0xF900)) if c not in characters and c not in self._taken)
        stand_in = next(free, None)
        if stand_in is None:
            return list(parts), None
        return [part.replace(SPACE, stand_in) if isinstance(part, str) else part for part in parts], stand_in

    def restore(self, ids: list[int], stand_in: str | None) -> list[int]:
        """The ids with the bytes of U+2581 where those of the stand-in are."""
        if stand_in is None:
            return ids
        theirs, ours = ([self._byte_ids[byte] for byte in text.encode()] for text in (stand_in, SPACE))
        i = 0
        while i <= len(ids) - len(theirs):
            if ids[i : i + len(theirs)] == theirs:
                ids[i : i + len(theirs)] = ours
            i += 1
        return ids
