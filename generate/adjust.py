"""What a request may ask of the logits beyond how to sample from them: penalties by what was generated, biases, a least
length, a guide. And how likely tokens were. Eager: no compiled step contains it, so that none depends on it.

Shapes in names: B rows of a batch, V vocabulary, S slots, R rows that ask for something, N entries.
"""

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from config.settings import SamplingParams
from generate.guide import Guide, masked
from generate.sequence import Sequence, TokenLogprobs


def is_adjusted(params: SamplingParams, guide: Guide | None) -> bool:
    """Whether a sequence's logits are changed here at all."""
    return bool(
        guide is not None
        or params.presence_penalty
        or params.frequency_penalty
        or params.logit_bias
        or params.min_new_tokens
    )


class Adjustments:
    """Changes logits as the sequences of a batch ask, each row by its own sequence alone. For one engine."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device, eos_ids: frozenset[int]) -> None:
        self.num_slots, self.vocab_size, self.device = num_slots, vocab_size, device
        self.eos_ids = eos_ids
        self._counts_SV: Tensor | None = None
        self._biases: tuple[tuple[tuple[int, int, float], ...], tuple[Tensor, Tensor, Tensor]] | None = None

    def begin(self, sequence: Sequence) -> None:
        """A sequence has got its slot: nothing is generated in it yet."""
        if _counted(sequence.params):
            assert sequence.slot is not None
            self._counts()[sequence.slot] = 0

    def apply(self, logits_BV: Tensor, sequences: SequenceOf[Sequence]) -> Tensor:
        """The logits of the sequences in the first rows, adjusted, for the token that each was issued last."""
        logits_BV = self._penalized(logits_BV, sequences)
        entries = tuple(
            (row, token, bias)
            for row, sequence in enumerate(sequences)
            for token, bias in self._biases_of(sequence)
            if token < self.vocab_size
        )
        if entries:
            if self._biases is None or self._biases[0] != entries:
                rows, tokens, values = zip(*entries, strict=True)
                self._biases = (entries, (self._tensor(rows), self._tensor(tokens), self._tensor(values)))
            rows_N, tokens_N, values_N = self._biases[1]
            logits_BV = logits_BV.index_put((rows_N, tokens_N), values_N, accumulate=True)
        guided = [(row, sequence.guide) for row, sequence in enumerate(sequences) if sequence.guide is not None]
        if guided:
            logits_BV = masked(logits_BV, [row for row, _ in guided], [guide.allowed() for _, guide in guided])
        return logits_BV

    def note(self, sequences: SequenceOf[Sequence], tokens_B: Tensor) -> None:
        """These tokens were sampled for the sequences in the first rows."""
        counted = [(row, sequence) for row, sequence in enumerate(sequences) if _counted(sequence.params)]
        if counted:
            tokens_R = tokens_B[self._tensor([row for row, _ in counted])]
            slots_R = self._tensor([_slot(sequence) for _, sequence in counted])
            self._counts().index_put_((slots_R, tokens_R), torch.ones_like(tokens_R).int(), accumulate=True)

    def _penalized(self, logits_BV: Tensor, sequences: SequenceOf[Sequence]) -> Tensor:
        """OpenAI's penalties: c occurrences among the generated tokens take frequency * c, and presence if c > 0."""
        counted = [(row, sequence) for row, sequence in enumerate(sequences) if _counted(sequence.params)]
        if not counted:
            return logits_BV
        rows_R = self._tensor([row for row, _ in counted])
        counts_RV = self._counts()[self._tensor([_slot(sequence) for _, sequence in counted])]
        presence_R = self._tensor([sequence.params.presence_penalty for _, sequence in counted])
        frequency_R = self._tensor([sequence.params.frequency_penalty for _, sequence in counted])
        taken_RV = frequency_R[:, None] * counts_RV + presence_R[:, None] * (counts_RV > 0)
        return logits_BV.index_add(0, rows_R, -taken_RV)

    def _biases_of(self, sequence: Sequence) -> SequenceOf[tuple[int, float]]:
        params = sequence.params
        if sequence.num_issued > params.min_new_tokens:
            return params.logit_bias
        ends = self.eos_ids | set(params.stop_token_ids)
        return (*params.logit_bias, *((token, -torch.inf) for token in sorted(ends)))

    def _counts(self) -> Tensor:
        if self._counts_SV is None:
            self._counts_SV = torch.zeros(self.num_slots, self.vocab_size, dtype=torch.int32, device=self.device)
        return self._counts_SV

    def _tensor(self, values: SequenceOf[int] | SequenceOf[float]) -> Tensor:
        """int64 or float32 on the device, without waiting for it."""
        host = torch.tensor(values, pin_memory=self.device.type == "cuda")
        return host.to(self.device, non_blocking=True)


def logprobs(logits_BV: Tensor, tokens_B: Tensor, top: int) -> Tensor:
    """Log-probabilities as float32 [B, 1 + 2 * top]: of the tokens; then of the `top` likeliest, and their ids, which
    float32 holds exactly below 2^24.
    """
    assert logits_BV.shape[1] < 1 << 24
    all_BV = logits_BV.float().log_softmax(-1)
    best = all_BV.topk(min(top, all_BV.shape[1]))
    return torch.cat((all_BV.gather(1, tokens_B[:, None]), best.values, best.indices.float()), 1)


def token_logprobs(row: SequenceOf[float], token_id: int, top: int) -> TokenLogprobs:
    """One row of `logprobs`, of which the sequence wants the `top` likeliest."""
    count = (len(row) - 1) // 2
    values, ids = row[1 : 1 + count], row[1 + count :]
    return TokenLogprobs(token_id, row[0], tuple((int(i), v) for i, v in zip(ids[:top], values[:top], strict=True)))


def _counted(params: SamplingParams) -> bool:
    return params.presence_penalty != 0 or params.frequency_penalty != 0


def _slot(sequence: Sequence) -> int:
    assert sequence.slot is not None
    return sequence.slot
