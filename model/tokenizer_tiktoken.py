"""Llama 3's `tokenizer.model`: tiktoken's lines of base64 and rank; the special tokens that Meta counts after them."""

import base64
import re
from collections.abc import Sequence
from pathlib import Path

import tiktoken

from config.errors import UserError
from model.config import ModelConfig
from model.tokenizer_base import Metadata, PieceTokenizer, Special

# How Llama 3 cuts text into words before it merges bytes: contractions, letters with one sign before them, up to three
# digits, signs, line ends, spaces. (Meta's llama3 repository, llama/tokenizer.py.)
WORDS = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
SPECIAL_COUNT = 256
# By their distance from the first; the rest are reserved and numbered. (Llama 3.1's names; 3.0 left three unused.)
NAMED_SPECIALS = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
ENDS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
# tiktoken's search for words recurses; a text without an end of a word is cut, as Meta does.
MAX_CHARACTERS = 400_000
LONG_RUN = re.compile(r"(?:\s{1,25000}|\S{1,25000})")


class TiktokenTokenizer(PieceTokenizer):
    """Encodes bytes as they are: every text comes back as it was."""

    def __init__(self, path: Path, metadata: Metadata, config: ModelConfig) -> None:
        ranks = _read_ranks(path)
        reserved = (f"<|reserved_special_token_{i}|>" for i in range(SPECIAL_COUNT))
        names = [NAMED_SPECIALS.get(i) or next(reserved) for i in range(SPECIAL_COUNT)]
        specials = {name: Special(len(ranks) + i) for i, name in enumerate(names)}
        # No special tokens are told to the library: it knows only text.
        self._encoding = tiktoken.Encoding("llama3", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={})
        self._pieces = list(ranks)
        super().__init__(
            path,
            len(ranks) + SPECIAL_COUNT,
            specials,
            metadata,
            config,
            bos="<|begin_of_text|>",
            eos=ENDS,
            add_bos=True,
            prefix_space=False,
        )

    def _encode(self, parts: Sequence[str | int]) -> list[int]:
        ids: list[int] = []
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
            else:
                for piece in _manageable(part):
                    ids += self._encoding.encode_ordinary(piece)
        return ids

    def _bytes(self, token: int) -> bytes:
        return self._pieces[token]


def _manageable(text: str) -> list[str]:
    """The text in pieces that tiktoken can take: almost always the text itself."""
    if len(text) < 25_000:
        return [text]
    pieces: list[str] = []
    current: list[str] = []
    size = 0
    previous = ""
    for run in LONG_RUN.findall(text):
        # A run that goes on where the last one was cut begins a new piece, and so does what would be too much.
        cut = previous and previous[-1].isspace() == run[0].isspace()
        if cut or size + len(run) > MAX_CHARACTERS:
            pieces.append("".join(current))
            current, size = [], 0
        current.append(run)
        size += len(run)
        previous = run
    return [*pieces, "".join(current)]


def _read_ranks(path: Path) -> dict[bytes, int]:
    """The pieces in order of their ranks, which are their ids."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines()):
        piece, _, rank = line.partition(b" ")
        try:
            ranks[base64.b64decode(piece, validate=True)] = int(rank)
        except ValueError:
            raise UserError(
                f"{path}: line {number + 1} is not a token in base64 and its rank; the file is damaged"
            ) from None
        if int(rank) != number or len(ranks) != number + 1:
            raise UserError(f"{path}: line {number + 1} should be a new token of rank {number}; the file is damaged")
    if missing := next((byte for byte in range(256) if bytes([byte]) not in ranks), None):
        raise UserError(f"{path}: has no token for byte {missing}; the file is cut short")
    return ranks
