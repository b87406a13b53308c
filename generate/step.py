"""One step of a model: prefill() and decode(), forward and sample, and read(), which samples nothing, as free functions
of tensors. These get compiled; they know no sequences, wait for nothing, and change nothing but the cache and the
DecodeState that they are given.

Shapes in names: B rows of a batch, T tokens, S slots, V vocabulary.
"""

from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from generate.sampling import RowParams, SamplingPlan, penalize, sample
from model.kv_cache import KVCache


class LanguageModel(Protocol):
    """What a step asks of a model: `Transformer.forward`, and its two halves."""

    def __call__(
        self,
        tokens_BT: Tensor,
        start_B: Tensor,
        cache: KVCache,
        slots_B: Tensor,
        context: int | Tensor,
        logits_at_B: Tensor | None = None,
    ) -> Tensor: ...

    def hidden(
        self, tokens_BT: Tensor, start_B: Tensor, cache: KVCache, slots_B: Tensor, context: int | Tensor
    ) -> Tensor: ...

    def logits(self, x_BTD: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class DecodeState:
    """Where each slot stands, on the device: the next step can be issued before the last one's token was read.

    tokens, positions: int64 [S], the newest token of each slot and the position that it will be read at. advance: int64
    [S], by how much a step moves a position: 1, and 0 for the scratch slot, which so stays at 0. seen: bool [S, V], the
    tokens of prompt and answer, kept for slots with a repetition penalty.
    """

    tokens: Tensor
    positions: Tensor
    advance: Tensor
    params: RowParams
    seen: Tensor

    @classmethod
    def create(
        cls, num_slots: int, vocab_size: int, device: torch.device | str, scratch_slot: int | None = None
    ) -> "DecodeState":
        advance = torch.ones(num_slots, dtype=torch.int64, device=device)
        if scratch_slot is not None:
            advance[scratch_slot] = 0
        return cls(
            tokens=torch.zeros(num_slots, dtype=torch.int64, device=device),
            positions=torch.zeros(num_slots, dtype=torch.int64, device=device),
            advance=advance,
            params=RowParams.create(num_slots, device),
            seen=torch.zeros(num_slots, vocab_size, dtype=torch.bool, device=device),
        )

    def tensors(self) -> list[Tensor]:
        """All that it is made of, in a fixed order."""
        params = [getattr(self.params, f.name) for f in fields(self.params)]
        return [self.tokens, self.positions, self.advance, self.seen, *params]

    def next_positions(self, slots_B: Tensor) -> Tensor:
        """Where the tokens go that a decode step samples."""
        return self.positions[slots_B] + self.advance[slots_B]


def prefill(
    model: LanguageModel,
    cache: KVCache,
    tokens_1T: Tensor,
    start_1: Tensor,
    slots_1: Tensor,
    last_1: Tensor,
    context: int | Tensor,
) -> Tensor:
    """Reads one chunk of one prompt into the cache; the logits of the token after it, float32 [1, V].

    start_1: position of the chunk's first token. last_1: index in T of its last real token; what is right of it is
    padding. context: start + T (a tensor on the CPU while the step is traced).
    """
    return model(tokens_1T, start_1, cache, slots_1, context, last_1)


def prefill_rows(
    model: LanguageModel, cache: KVCache, tokens_1T: Tensor, start_1: Tensor, slots_1: Tensor, last_1: Tensor
) -> Tensor:
    """`prefill`, each token a row of its own as in decoding: all rows write their keys and values before any of them
    attends. Needs no context, and so nothing that the host would have to know. What is right of `last_1` is read as if
    it were that last token again, which changes nothing.
    """
    at_T = torch.arange(tokens_1T.shape[1], device=tokens_1T.device).minimum(last_1)
    slots_T = slots_1.repeat(at_T.shape[0])
    x_T1D = model.hidden(tokens_1T[0, at_T][:, None], start_1 + at_T, cache, slots_T, cache.max_seq_len)
    return model.logits(x_T1D[-1:]).squeeze(1)


def read(
    model: LanguageModel, cache: KVCache, tokens_BT: Tensor, start_B: Tensor, slots_B: Tensor, context: int | Tensor
) -> Tensor:
    """Reads tokens of many rows into the cache; what `model.logits` makes logits of, [B, T, D]. Shorter rows are padded
    on the right.

    start_B: position of each row's first token. context: max(start_B) + T (a tensor on the CPU while the step is
    traced).
    """
    return model.hidden(tokens_BT, start_B, cache, slots_B, context)


def decode(
    model: LanguageModel, cache: KVCache, state: DecodeState, slots_B: Tensor, plan: SamplingPlan | None
) -> Tensor:
    """Reads the newest token of each row and samples the next, int64 [B]; without a plan the logits that it is to be
    sampled from, float32 [B, V]. All arguments are the same from step to step.

    slots_B: the slot of each row; only the scratch slot may come more than once.
    """
    positions_B = state.positions[slots_B]
    # The context is only a bound here: how far to read the cache, a single token knows from its position.
    logits_BV = model(
        state.tokens[slots_B][:, None], positions_B, cache, slots_B, cache.max_seq_len, torch.zeros_like(slots_B)
    )
    return logits_BV if plan is None else choose(state, logits_BV, slots_B, state.next_positions(slots_B), plan)


def choose(
    state: DecodeState, logits_BV: Tensor, slots_B: Tensor, positions_B: Tensor, plan: SamplingPlan
) -> Tensor:
    """Samples the tokens at `positions_B`, int64 [B], and notes them in the state."""
    if plan.penalties:
        logits_BV = penalize(logits_BV, state.seen[slots_B], state.params.repetition_penalty[slots_B])
    # Each parameter of the rows is a kernel of its own: none is looked up that is not needed.
    tokens_B = sample(logits_BV, positions_B, None if plan.greedy else state.params.at(slots_B), plan)
    if plan.penalties:
        # Not `= True`: a constant of its own would be an input that nobody passes to the compiled step.
        state.seen[slots_B, tokens_B] = torch.ones_like(tokens_B, dtype=torch.bool)
    state.tokens[slots_B] = tokens_B
    state.positions[slots_B] = positions_B
    return tokens_B
