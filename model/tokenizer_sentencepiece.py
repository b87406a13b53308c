"""SentencePiece models (`tokenizer.model`), and llama2.c's `tokenizer.bin`, which is one written differently. Knows the
protocol buffer that they are, as far as it has to.

SentencePiece finds "user defined" symbols in any text. Those that are special tokens are made control symbols in
memory, which it does not find. A separator, unguessable and thus in no text, is added to the vocabulary: special tokens
between pieces of a text are encoded as it and then put in its place, so that all around them is one text.
"""

import re
import secrets
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece

from config.errors import UserError
from model.config import ModelConfig
from model.tokenizer_base import BYTE_PIECE, SPACE, ByteStandIn, Metadata, PieceTokenizer, Special

# Numbers of fields: in ModelProto, in its pieces, its trainer_spec and its normalizer_spec.
PIECES, TRAINER_SPEC, NORMALIZER_SPEC = 1, 2, 3
PIECE, SCORE, TYPE = 1, 2, 3
MODEL_TYPE, SUFFIX, BYTE_FALLBACK, PAD_ID = 3, 24, 35, 43
NORMALIZER_NAME, ADD_DUMMY_PREFIX, REMOVE_EXTRA_WHITESPACES = 1, 3, 4
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of pieces
BPE = 2  # a type of model

# Without metadata, a symbol in brackets is special: <|user|>, <start_of_turn>, [INST]. Spaces, tabs and words are not.
MARKER = re.compile(r"[<\[]\S+[>\]]")


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, value: bytes | int | float) -> bytes:
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value)


def _fields(data: bytes | bytearray, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int, int]]:
    """The fields of a message: number, and where the value begins and ends. Raises ValueError when it is cut short."""
    at, end = start, len(data) if end is None else end

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            if at >= end or shift > 63:
                raise ValueError("a number is cut short")
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while at < end:
        key = varint()
        begin = at
        if key & 7 == 0:
            varint()
        elif key & 7 in (1, 2, 5):
            size = varint() if key & 7 == 2 else 8 if key & 7 == 1 else 4
            begin, at = at, at + size
        else:
            raise ValueError(f"field {key >> 3} is of no known kind")
        if at > end:
            raise ValueError(f"field {key >> 3} is cut short")
        yield key >> 3, begin, at


def _piece(text: str, score: float, kind: int) -> bytes:
    return _field(PIECE, text.encode()) + _field(SCORE, score) + _field(TYPE, kind)


class _Model:
    """A model's protocol buffer: where its pieces are, and the few of its settings that matter here."""

    def __init__(self, data: bytes) -> None:
        """Raises ValueError when it is cut short or nothing of the kind."""
        self.data = bytearray(data)
        self._spans: list[tuple[int, int]] = []
        flags: dict[tuple[int, int], int] = {}
        for number, start, end in _fields(data):
            if number == PIECES:
                self._spans.append((start, end))
            elif number in (TRAINER_SPEC, NORMALIZER_SPEC):
                flags |= {(number, inner): data[at] for inner, at, to in _fields(data, start, end) if to - at == 1}
        self.suffix = bool(flags.get((TRAINER_SPEC, SUFFIX), 0))
        self.dummy_prefix = bool(flags.get((NORMALIZER_SPEC, ADD_DUMMY_PREFIX), 1))
        self.strips_spaces = bool(flags.get((NORMALIZER_SPEC, REMOVE_EXTRA_WHITESPACES), 1))
        self.is_bpe = flags.get((TRAINER_SPEC, MODEL_TYPE), 1) == BPE
        specs = [(start, end) for number, start, end in _fields(data) if number == NORMALIZER_SPEC]
        names = [data[at:to] for spec in specs for field, at, to in _fields(data, *spec) if field == NORMALIZER_NAME]
        self.normalizer = names[0] if names else b""

    def kind(self, token: int) -> int:
        """The type of a piece."""
        found = [self.data[at] for number, at, _ in _fields(self.data, *self._spans[token]) if number == TYPE]
        return found[0] if found else NORMAL

    def make_control(self, token: int) -> bool:
        """Makes a user-defined symbol a control symbol; False when the piece is of another type."""
        for number, at, _ in _fields(self.data, *self._spans[token]):
            if number == TYPE and self.data[at] in (USER_DEFINED, CONTROL):
                self.data[at] = CONTROL
                return True
        return False


@dataclass(frozen=True)
class Facts:
    """How a model encodes, for programs that do it themselves."""

    kind: str
    """ "bpe" or "unigram"."""
    normalizer: str
    """ "identity" where texts are encoded as they are, or "other"."""
    strips_spaces: bool
    prefix: bool
    """Whether a space is put before a text."""
    unknown: int | None


class SentencePieceTokenizer(PieceTokenizer):
    """Encodes as the SentencePiece library does. Text comes back as it was unless the model normalizes it."""

    def __init__(self, source: Path, data: bytes, metadata: Metadata, config: ModelConfig) -> None:
        try:
            model = _Model(data)
        except ValueError as error:
            raise UserError(f"{source}: is no SentencePiece model, or damaged ({error}); get it again") from None
        if model.suffix:
            raise UserError(f"{source}: writes spaces after words (treat_whitespace_as_suffix), which is not supported")
        processor = _processor(source, bytes(model.data))
        count = processor.vocab_size()
        try:
            self._pieces: list[str] = processor.id_to_piece(list(range(count)))
        except UnicodeDecodeError as error:
            raise UserError(f"{source}: holds a piece that is not UTF-8 ({error}); get it again") from None
        candidates = [i for i, piece in enumerate(self._pieces) if _may_be_special(i, piece, metadata)]
        controls = [i for i in candidates if model.make_control(i)]
        controls += [i for i in range(count) if processor.is_control(i)]
        specials = {self._pieces[i]: Special(i, *metadata.strips.get(i, ())) for i in controls}
        # Tokens that Transformers keeps beside the model, after its own.
        beyond = {piece: i for i, (piece, _) in metadata.added.items() if i >= count}
        specials |= {piece: Special(i, *metadata.strips.get(i, ())) for piece, i in beyond.items()}

        self._model, self._count = model, count
        self._separator, self._separator_id = f"\U000f0000{secrets.token_hex(16)}\U000f0000", count
        model.data += _field(PIECES, _piece(self._separator, 0.0, USER_DEFINED))
        self._processor = _processor(source, bytes(model.data))
        self._unknown = processor.unk_id()
        self._byte_values = {
            i: int(match[1], 16)
            for i, piece in enumerate(self._pieces)
            if (match := BYTE_PIECE.fullmatch(piece)) and processor.is_byte(i)
        }
        self._stand_in = ByteStandIn({byte: i for i, byte in self._byte_values.items()}, set(self._pieces))
        self._prefix_each = metadata.legacy and model.dummy_prefix
        bos, eos = processor.bos_id(), processor.eos_id()
        super().__init__(
            source,
            max([count, *(i + 1 for i in beyond.values())]),
            specials,
            metadata,
            config,
            bos=self._pieces[bos] if bos >= 0 else None,
            eos=[self._pieces[eos]] if eos >= 0 else [],
            add_bos=True,
            prefix_space=model.dummy_prefix or model.strips_spaces,
            # llama2.c's models begin the next story where one ends.
            bos_ends=metadata.no_config,
        )

    def facts(self) -> Facts:
        """How it encodes."""
        model = self._model
        normalizer = "identity" if model.normalizer in (b"", b"identity") else "other"
        unknown = self._unknown if self._unknown >= 0 else None
        return Facts("bpe" if model.is_bpe else "unigram", normalizer, model.strips_spaces, model.dummy_prefix, unknown)

    def pieces(self) -> Iterator[tuple[str, float, bytes]]:
        """Of each id its kind (n: normal, c: control, b: a byte, u: unknown, x: unused, d: user-defined), its score,
        and the bytes that it stands for.
        """
        letters = {UNKNOWN: "u", CONTROL: "c", USER_DEFINED: "d", BYTE: "b", UNUSED: "x"}
        for token in range(self.vocab_size):
            if token >= self._count or token in self._special_ids:
                yield "c", 0.0, b""
            else:
                kind = letters.get(self._model.kind(token), "n")
                yield kind, self._processor.get_score(token), self._bytes(token)

    def _encode(self, parts: Sequence[str | int]) -> list[int]:
        if self._prefix_each and len(parts) > 1:
            # As Transformers: a space is put before each piece of text, unless it has one.
            texts = (part.removeprefix(" ") or part if isinstance(part, str) else part for part in parts)
            return [token for part in texts for token in ([part] if isinstance(part, int) else self._encode([part]))]
        replaced, stand_in = self._stand_in.replace(parts)
        text = "".join(part if isinstance(part, str) else self._separator for part in replaced)
        ids: list[int] = self._processor.encode(text)
        if parts and isinstance(parts[0], int):
            # What comes before a special token that begins the text is the space that SentencePiece adds.
            ids = ids[ids.index(self._separator_id) :]
        ids = self._stand_in.restore(ids, stand_in)
        specials = iter([part for part in parts if isinstance(part, int)])
        return [next(specials) if token == self._separator_id else token for token in ids]

    def _bytes(self, token: int) -> bytes:
        if token in self._byte_values:
            return bytes([self._byte_values[token]])
        if token == self._unknown:
            return " \u2047 ".encode()  # what SentencePiece shows for it
        return self._pieces[token].replace(SPACE, " ").encode() if token < len(self._pieces) else b""


def _may_be_special(token: int, piece: str, metadata: Metadata) -> bool:
    """Whether a symbol that is user-defined is special."""
    if piece in metadata.special_pieces:
        return True
    return metadata.added[token][1] if token in metadata.added else MARKER.fullmatch(piece) is not None


def _processor(source: Path, model: bytes) -> Any:
    """The library's tokenizer of a model."""
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, OSError, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{source}: is not accepted by SentencePiece ({reason}); get it again") from None


def load_sentencepiece(path: Path, metadata: Metadata, config: ModelConfig) -> SentencePieceTokenizer:
    """A `tokenizer.model` of SentencePiece's."""
    return SentencePieceTokenizer(path, path.read_bytes(), metadata, config)


def load_llama2c(path: Path, metadata: Metadata, config: ModelConfig) -> SentencePieceTokenizer:
    """A `tokenizer.bin` of llama2.c's: the longest piece's length, then score, length and bytes of each piece.

    It encodes as SentencePiece's BPE: a space before the text, the best score merged first, the unknown as bytes.
    """
    data = path.read_bytes()
    out, at, count = bytearray(), 4, 0
    while at < len(data):
        if at + 8 > len(data):
            raise UserError(f"{path}: is cut short in the header of token {count}; get it again")
        score, length = struct.unpack_from("<fi", data, at)
        at += 8
        if not 0 < length <= len(data) - at:
            raise UserError(f"{path}: is cut short or damaged in token {count}; get it again")
        try:
            text = data[at : at + length].decode()
        except UnicodeDecodeError:
            raise UserError(f"{path}: token {count} is not UTF-8; it is no tokenizer of llama2.c's") from None
        at += length
        out += _field(PIECES, _llama2c_piece(count, text, score))
        count += 1
    if count < 259:
        raise UserError(f"{path}: holds {count} tokens; a tokenizer of llama2.c's has 259 or more")
    out += _specs(dummy_prefix=True, removes_spaces=False, byte_fallback=True)
    return SentencePieceTokenizer(path, bytes(out), metadata, config)


def model_file(
    pieces: Sequence[tuple[str, float, int]], *, dummy_prefix: bool, removes_spaces: bool
) -> bytes:
    """A `tokenizer.model` that merges by scores, of pieces with their scores and types in the order of their ids."""
    bytes_known = sum(kind == BYTE for _, _, kind in pieces) == 256
    out = bytearray()
    for text, score, kind in pieces:
        out += _field(PIECES, _piece(text, score, kind))
    return bytes(out) + _specs(dummy_prefix, removes_spaces, bytes_known)


def _specs(dummy_prefix: bool, removes_spaces: bool, byte_fallback: bool) -> bytes:
    trainer = _field(MODEL_TYPE, BPE) + _field(BYTE_FALLBACK, byte_fallback) + _field(PAD_ID, -1)
    normalizer = _field(NORMALIZER_NAME, b"identity") + _field(REMOVE_EXTRA_WHITESPACES, removes_spaces)
    return _field(TRAINER_SPEC, trainer) + _field(
        NORMALIZER_SPEC, normalizer + _field(ADD_DUMMY_PREFIX, dummy_prefix)
    )


def _llama2c_piece(token: int, text: str, score: float) -> bytes:
    """llama2.c counts on ids 0, 1, 2 for unknown, BOS and EOS and on 3 to 258 for the bytes, as Llama 2 has them."""
    if token < 3:
        kind = UNKNOWN if token == 0 else CONTROL
        return _piece(("<unk>", "<s>", "</s>")[token], score, kind)
    if token < 259:
        return _piece(f"<0x{token - 3:02X}>", score, BYTE)
    return _piece(text.replace(" ", SPACE), score, NORMAL)
