"""From logits to tokens: small pure functions of per-row tensors. Knows nothing of models, sequences or the device's
random numbers: noise is a function of seed, position and token, so that neighbours in a batch never change what a row
samples.

Shapes in names: B rows, V vocabulary, K candidates, S slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from config.settings import SamplingParams
from model.ops import register_op
from model.tracing import is_tracing

CANDIDATES = (64, 256, 1024)
"""Sizes that a batch's largest top_k is rounded up to, so that few different steps are ever compiled."""


@dataclass(frozen=True)
class SamplingPlan:
    """What a batch needs of sampling, known to the host: a compiled step has one form for each plan.

    candidates: how many of the likeliest tokens must be ranked for top-k and top-p: 0 for none, the whole vocabulary
    for a row with top-p alone. A row's tokens never depend on which plan ran it.
    """

    greedy: bool = True
    candidates: int = 0
    penalties: bool = False

    @classmethod
    def of(cls, rows: Sequence[SamplingParams], vocab_size: int) -> "SamplingPlan":
        """The least that serves all `rows`."""
        return cls(
            greedy=all(row.temperature == 0 for row in rows),
            candidates=max((_candidates(row, vocab_size) for row in rows), default=0),
            penalties=any(row.repetition_penalty != 1 for row in rows),
        )


@dataclass(frozen=True)
class RowParams:
    """SamplingParams of each row, on the device: float32 but for top_k and seed, which are int64."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition_penalty: Tensor
    seed: Tensor

    @classmethod
    def create(cls, rows: int, device: torch.device | str) -> "RowParams":
        """Greedy rows; `write` fills them."""
        return cls(
            temperature=torch.zeros(rows, device=device),
            top_k=torch.zeros(rows, device=device, dtype=torch.int64),
            top_p=torch.ones(rows, device=device),
            min_p=torch.zeros(rows, device=device),
            repetition_penalty=torch.ones(rows, device=device),
            seed=torch.zeros(rows, device=device, dtype=torch.int64),
        )

    def write(self, row: int, params: SamplingParams) -> None:
        """Fill one row, without waiting for the device."""
        self.temperature[row] = params.temperature
        self.top_k[row] = params.top_k
        self.top_p[row] = params.top_p
        self.min_p[row] = params.min_p
        self.repetition_penalty[row] = params.repetition_penalty
        self.seed[row] = params.seed

    def at(self, rows_B: Tensor) -> "RowParams":
        """The parameters of some rows."""
        return RowParams(
            self.temperature[rows_B],
            self.top_k[rows_B],
            self.top_p[rows_B],
            self.min_p[rows_B],
            self.repetition_penalty[rows_B],
            self.seed[rows_B],
        )


def sample(logits_BV: Tensor, positions_B: Tensor, params: RowParams | None, plan: SamplingPlan) -> Tensor:
    """One token a row, int64 [B]. The order is Transformers': temperature, top-k, top-p, min-p (penalties come before).

    positions_B: the position in its sequence of the token that is sampled: the counter of the noise. params: of the
    rows; a greedy plan needs none.
    """
    greedy_B = logits_BV.argmax(-1)
    if plan.greedy:
        return greedy_B
    assert params is not None
    scaled_BV = scale(logits_BV, params.temperature)
    threshold_B = min_p_threshold(params.min_p)
    if plan.candidates:
        threshold_B = threshold_B.maximum(rank_threshold(scaled_BV, params.top_k, params.top_p, plan.candidates))
    noise_BV = exponential_noise(params.seed, positions_B, logits_BV.shape[-1])
    # The exponential race: argmax(p / E) has probability p (also known as the Gumbel trick), here in logarithms.
    scores_BV = torch.where(scaled_BV >= threshold_B[:, None], scaled_BV - noise_BV.log(), -torch.inf)
    return torch.where(params.temperature == 0, greedy_B, scores_BV.argmax(-1))


def penalize(logits_BV: Tensor, seen_BV: Tensor, penalty_B: Tensor) -> Tensor:
    """The repetition penalty of CTRL (arXiv:1909.05858), on tokens of the prompt and of the answer so far."""
    penalized_BV = torch.where(logits_BV < 0, logits_BV * penalty_B[:, None], logits_BV / penalty_B[:, None])
    return torch.where(seen_BV, penalized_BV, logits_BV)


def scale(logits_BV: Tensor, temperature_B: Tensor) -> Tensor:
    """Logits over temperature, the row's largest moved to 0 first, so that no temperature overflows."""
    divisor_B = torch.where(temperature_B == 0, 1.0, temperature_B)
    return (logits_BV - logits_BV.amax(-1, keepdim=True)) / divisor_B[:, None]


def min_p_threshold(min_p_B: Tensor) -> Tensor:
    """The least scaled logit whose token is at least min_p times as likely as the likeliest, whose logit is 0."""
    return min_p_B.log()


def rank_threshold(scaled_BV: Tensor, top_k_B: Tensor, top_p_B: Tensor, candidates: int) -> Tensor:
    """The least scaled logit that top-k and then top-p keep, [B]. As a threshold it keeps or drops equal logits
    together, and comes out the same whether all of the vocabulary was ranked or only the candidates that a row asked
    for.
    """
    if candidates < scaled_BV.shape[-1]:
        ranked_BK = scaled_BV.topk(candidates).values
    else:
        ranked_BK = scaled_BV.sort(descending=True).values
    last_B1 = (top_k_B.clamp(1, ranked_BK.shape[-1]) - 1)[:, None]
    threshold_B1 = torch.where(top_k_B[:, None] > 0, ranked_BK.gather(1, last_B1), -torch.inf)
    probs_BK = torch.where(ranked_BK >= threshold_B1, ranked_BK, -torch.inf).softmax(-1)
    # A token stays while those before it are together less likely than top_p: the first one always does.
    kept_BK = (probs_BK > 0) & (probs_BK.cumsum(-1) - probs_BK < top_p_B[:, None])
    nucleus_B1 = torch.where(kept_BK, ranked_BK, torch.inf).amin(-1, keepdim=True)
    return torch.where(top_p_B[:, None] < 1, nucleus_B1, threshold_B1)[:, 0]


def exponential_noise(seeds_B: Tensor, positions_B: Tensor, vocab_size: int) -> Tensor:
    """Exp(1) noise of (seed, position, token), float32 [B, V]: the same on every device, in every batch."""
    keys_2B = (_noise_keys_op if is_tracing() else noise_keys)(seeds_B, positions_B)
    tokens_V = torch.arange(vocab_size, device=seeds_B.device)
    bits_BV = hash32(hash32(tokens_V ^ keys_2B[0, :, None]) ^ keys_2B[1, :, None])
    # Within (0, 1), and finest near 0, where the exponential is small and the race is won.
    uniform_BV = ((bits_BV.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -torch.log1p(-uniform_BV)


def noise_keys(seeds_B: Tensor, positions_B: Tensor) -> Tensor:
    """Two keys of 32 bits a row, int64 [2, B]: with one, two steps in 2^32 would share their noise, and near keys would
    permute it.
    """
    low_B = hash32((seeds_B & MASK32) ^ 0x243F6A88)
    high_B = hash32(low_B ^ (seeds_B >> 32))
    first_B = hash32(high_B ^ positions_B)
    return torch.stack((first_B, hash32(first_B ^ low_B ^ 0x13198A2E)))


# An op of its own for the compiler, which would otherwise write all of these hashes into the expression of every token,
# each twice as long as the one before.
_noise_keys_op = register_op("noise_keys", noise_keys, lambda seeds_B, _: seeds_B.new_empty(2, seeds_B.shape[0]))


MASK32 = 0xFFFFFFFF


def hash32(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers (held in int64) that changes half of the bits for any change of its input:
    xor-shift and multiply, with the constants of lowest bias in C. Wellons' hash prospector (2018). Both multipliers
    are below 2^31, so that no product leaves int64.
    """
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & MASK32
    x = ((x ^ (x >> 15)) * 0x735A2D97) & MASK32
    return x ^ (x >> 15)


def _candidates(row: SamplingParams, vocab_size: int) -> int:
    """How many of the likeliest tokens one row's filters look at."""
    if row.temperature == 0 or (row.top_k == 0 and row.top_p == 1):
        return 0
    bucket = next((size for size in CANDIDATES if 0 < row.top_k <= size), vocab_size)
    return min(bucket, vocab_size)
