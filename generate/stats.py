"""One ledger of where the time went: load, quantize, compile, prefill, decode. Counts what it is told of, real tokens
only, and derives the rates; does not measure memory or bandwidth itself.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from model.layers import Table
from model.moe_experts import Stack

Phase = Literal["load", "quantize", "compile"]


@dataclass
class Ledger:
    """Seconds and counts of one engine. Padding, tokens after a sequence's end and compilation are in no rate."""

    weight_bytes_per_token: int = 0
    phase_s: dict[Phase, float] = field(default_factory=lambda: {"load": 0.0, "quantize": 0.0, "compile": 0.0})
    ttft_s: float | None = None
    """From the first request's arrival to its first token; None before that."""
    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0
    decode_steps: int = 0
    decode_s: float = 0.0

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Adds the time inside the `with` block to a phase, less what phases inside it took."""
        before, start = sum(self.phase_s.values()), time.perf_counter()
        try:
            yield
        finally:
            inside = sum(self.phase_s.values()) - before
            self.phase_s[name] += time.perf_counter() - start - inside

    def first_token(self, seconds: float) -> None:
        """A sequence's first token came `seconds` after its request; the first of all is kept."""
        if self.ttft_s is None:
            self.ttft_s = seconds

    def prefill(self, tokens: int, seconds: float) -> None:
        """Prompt tokens were read; the first new token of a sequence is part of this."""
        self.prefill_tokens += tokens
        self.prefill_s += seconds

    def decode(self, tokens: int, seconds: float) -> None:
        """One decode step gave `tokens` tokens that were wanted."""
        self.decode_tokens += tokens
        self.decode_steps += 1
        self.decode_s += seconds

    @property
    def prefill_tok_s(self) -> float | None:
        return self.prefill_tokens / self.prefill_s if self.prefill_s else None

    @property
    def decode_tok_s(self) -> float | None:
        return self.decode_tokens / self.decode_s if self.decode_s else None

    @property
    def weight_bytes_s(self) -> float | None:
        """Bytes of weights that decoding read in a second: each step reads them once, however many rows it has."""
        return self.weight_bytes_per_token * self.decode_steps / self.decode_s if self.decode_s else None

    def bandwidth_share(self, read_bytes_s: float | None) -> float | None:
        """The part of the machine's read bandwidth that decoding used for weights alone."""
        rate = self.weight_bytes_s
        return rate / read_bytes_s if rate is not None and read_bytes_s else None


def weight_bytes_per_token(model: nn.Module) -> int:
    """Bytes of weights that one decode step reads: every parameter once, but one row of a table that is not also the
    output layer's; of a layer's experts those that a token is sent to. (Several rows are sent to more.)
    """
    stacks = {id(p): m for m in model.modules() if isinstance(m, Stack) for p in m.parameters(recurse=False)}
    tables = {id(p) for m in model.modules() if isinstance(m, Table) for p in m.parameters(recurse=False)}
    others = {id(p) for m in model.modules() if not isinstance(m, Table) for p in m.parameters(recurse=False)}

    def read(p: nn.Parameter) -> int:
        if (stack := stacks.get(id(p))) is not None:
            return p.nbytes // stack.num_experts * stack.chosen
        return (p if id(p) in others or id(p) not in tables else p[0]).nbytes

    return sum(read(p) for p in model.parameters())
