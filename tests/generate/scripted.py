"""Models small enough to reason about, with the forward signature of the Transformer, and an engine around them; a
stand-in for the compilers.
"""

import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from generate import compilation
from generate.backends import Backend
from generate.engine import Engine
from generate.scheduler import slots_needed
from model.kv_cache import KVCache

VOCAB = 97


def make_cache(max_num_seqs: int = 1, max_seq_len: int = 64) -> KVCache:
    """One layer, one head, one number a token: enough for a model that remembers token ids."""
    shape = (slots_needed(max_num_seqs), 1, max_seq_len, 1)
    return KVCache([torch.zeros(shape)], [torch.zeros(shape)], [], max_seq_len)


class RecallModel:
    """Logits that depend on every token before and on its position: a wrong slot, position or chunk changes them.

    Rows are computed one by one, so that a batch gives bit for bit what each row gives alone.
    """

    def __init__(self, vocab_size: int = VOCAB, sharpness: float = 2.0) -> None:
        generator = torch.Generator().manual_seed(1)
        self.table = torch.randn(vocab_size, 16, generator=generator)
        self.head = torch.randn(16, vocab_size, generator=generator) * sharpness
        self.calls: list[tuple[int, int]] = []

    def __call__(
        self,
        tokens_BT: Tensor,
        start_B: Tensor,
        cache: KVCache,
        slots_B: Tensor,
        context: int,
        logits_at_B: Tensor | None = None,
    ) -> Tensor:
        assert logits_at_B is not None
        self.calls.append((tokens_BT.shape[0], tokens_BT.shape[1]))
        memory = cache.keys[0][:, 0, :, 0]
        rows = []
        for tokens, start, slot, at in zip(
            tokens_BT, start_B.tolist(), slots_B.tolist(), logits_at_B.tolist(), strict=True
        ):
            assert start + len(tokens) <= min(context, cache.max_seq_len)
            memory[slot, start : start + len(tokens)] = tokens.float()
            seen = memory[slot, : start + at + 1].long()
            angles = torch.arange(1, len(seen) + 1)[:, None] * torch.linspace(0.1, 1.0, 16)
            rows.append(torch.tanh((self.table[seen] * angles.cos()).sum(0)) @ self.head)
        return torch.stack(rows)


class ScriptedModel:
    """Says the given tokens, one for each position from `begin` on, whatever it reads."""

    def __init__(self, tokens: list[int], begin: int, vocab_size: int = VOCAB) -> None:
        self.tokens, self.begin, self.vocab_size = tokens, begin, vocab_size

    def __call__(
        self,
        tokens_BT: Tensor,
        start_B: Tensor,
        cache: KVCache,
        slots_B: Tensor,
        context: int,
        logits_at_B: Tensor | None = None,
    ) -> Tensor:
        assert logits_at_B is not None
        logits_BV = torch.zeros(len(tokens_BT), self.vocab_size)
        for row, position in enumerate((start_B + logits_at_B + 1 - self.begin).tolist()):
            logits_BV[row, self.tokens[max(0, position) % len(self.tokens)]] = 100.0
        return logits_BV


class Utf8Tokenizer:
    """A token a byte; those above 255, of which there are none in text, are special and show nothing."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode_bytes(self, ids: list[int] | tuple[int, ...], *, start: bool = False) -> bytes:
        return bytes(i for i in ids if i < 256)


def make_engine(
    model=None, *, max_num_seqs: int = 1, max_seq_len: int = 64, vocab_size: int = VOCAB, **options
) -> Engine:
    return Engine(
        RecallModel(vocab_size) if model is None else model,
        make_cache(max_num_seqs, max_seq_len),
        Utf8Tokenizer(),
        vocab_size=vocab_size,
        max_num_seqs=max_num_seqs,
        **options,
    )


def run(engine: Engine, *requests) -> list[tuple[list[int], str, str | None]]:
    """Every request of (prompt ids, params) to its end, all at once: tokens, text and finish_reason of each."""
    sequences = [engine.add(prompt, params) for prompt, params in requests]
    texts = {sequence.seq_id: "" for sequence in sequences}
    while engine.has_unfinished:
        for output in engine.step():
            texts[output.seq_id] += output.text
    return [(sequence.token_ids, texts[sequence.seq_id], sequence.finish_reason) for sequence in sequences]


class StandIn:
    """In the place of the compilers, and takes no time: its files name the functions that it was given."""

    def __init__(self) -> None:
        self.functions: list[Callable[..., Tensor]] = []
        self.compilers: list[str] = []
        self.error: BaseException | None = None
        self.takes_s = 0.0

    @classmethod
    def install(cls, monkeypatch: pytest.MonkeyPatch) -> "StandIn":
        """One that compiled steps are made with from here on."""
        backend = cls()
        monkeypatch.setattr(compilation, "_backend", lambda device: Backend(backend.compile, backend.load))
        return backend

    def compile(self, function, inputs, dynamic, largest, path: Path, compiler: str) -> None:
        time.sleep(self.takes_s)
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        path.write_bytes(b"half")
        if self.error is not None:
            raise self.error
        path.write_bytes(f"function {len(self.functions)}".encode())
        self.functions.append(function)
        self.compilers.append(compiler)

    def load(self, path: Path, device: torch.device) -> Callable[[list[Tensor]], Tensor]:
        word, number = path.read_text().split()
        if word != "function":
            raise RuntimeError("no such package")
        return lambda inputs: self.functions[int(number)](*inputs)
