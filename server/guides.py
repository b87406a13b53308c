"""Answers that keep to a JSON schema, through llguidance. Knows grammars and the bytes of tokens, no requests."""

import json
import threading
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import llguidance
import torch
from torch import Tensor

from generate.guide import WORD_BITS
from model.tokenizer import Tokenizer
from server.errors import invalid

WHITE_SPACE = r"( |\n[ \t]{0,16})?"
"""Between the parts of JSON: a space, or a new line with its indent. Without a bound small models never end with it."""
LIMITS = llguidance.LLParserLimits(max_lexer_states=50_000, max_grammar_size=200_000, verbose_errors=False)


class Guide:
    """Follows one sequence. Never raises: when the grammar becomes too much, the text ends, and `failed` says why."""

    def __init__(self, matcher: Any, words: int, ends: frozenset[int]) -> None:
        self._matcher, self._words = matcher, words
        self._only_ends = _bits(ends, words)
        self.failed = ""

    def allowed(self) -> Tensor:
        if self.failed:
            return self._only_ends
        mask = bytearray(self._matcher.compute_bitmask())
        self._note()
        if self.failed or not any(mask):
            return self._only_ends
        return torch.frombuffer(mask, dtype=torch.int32)[: self._words]

    def advance(self, token_id: int) -> None:
        if not self.failed and not self._matcher.consume_token(token_id):
            self._note()

    def _note(self) -> None:
        if self._matcher.is_error():
            self.failed = str(self._matcher.get_error())


class Grammars:
    """Makes guides for one model. Threads may share it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: frozenset[int]) -> None:
        self._tokenizer, self._vocab_size, self._ends = tokenizer, vocab_size, ends
        self._lock = threading.Lock()

    def guide(self, schema: Mapping[str, Any], param: str) -> Guide:
        """One that lets pass what is valid by the schema and nothing else. Raises RequestError for a schema that cannot
        be held to.
        """
        with self._lock:  # the vocabulary is read once
            vocabulary = self._vocabulary
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(
                json.dumps(schema), overrides={"whitespace_pattern": WHITE_SPACE}
            )
        except ValueError as error:
            raise invalid(param, f"the schema cannot be used: {_one_line(str(error))}", "invalid_schema") from None
        matcher = llguidance.LLMatcher(vocabulary, grammar, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise invalid(param, f"the schema cannot be used: {_one_line(matcher.get_error())}", "invalid_schema")
        return Guide(matcher, -(-self._vocab_size // WORD_BITS), self._ends)

    @cached_property
    def _vocabulary(self) -> Any:
        words = llguidance.TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocab_size, min(self._ends)))
        return llguidance.LLTokenizer(words, n_vocab=self._vocab_size, eos_token=sorted(self._ends))


class _Vocabulary:
    """A tokenizer as llguidance takes it: the bytes of each token; special ones have none."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end: int) -> None:
        self.eos_token_id, self.bos_token_id = end, tokenizer.bos_id
        self.tokens = [tokenizer.decode_bytes((token,)) for token in range(vocab_size)]
        self.special_token_ids = [token for token, data in enumerate(self.tokens) if not data]
        self._tokenizer = tokenizer

    def __call__(self, text: bytes | str) -> list[int]:
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode(errors="replace"), bos=False)


def _bits(tokens: frozenset[int], words: int) -> Tensor:
    bits = torch.zeros(words * WORD_BITS, dtype=torch.bool)
    bits[sorted(tokens)] = True
    shifts = torch.arange(WORD_BITS, dtype=torch.int64)
    return (bits.view(words, WORD_BITS).long() << shifts).sum(1).to(torch.int32)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
