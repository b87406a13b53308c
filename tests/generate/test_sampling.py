"""Sampling: Transformers' filters give the same support and the same probabilities, and the noise is noise."""

import math

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from config.settings import SamplingParams
from generate.sampling import (
    CANDIDATES,
    RowParams,
    SamplingPlan,
    exponential_noise,
    hash32,
    min_p_threshold,
    penalize,
    rank_threshold,
    sample,
    scale,
)

V = 300


def rows(*params: SamplingParams) -> RowParams:
    table = RowParams.create(len(params), "cpu")
    for row, p in enumerate(params):
        table.write(row, p)
    return table


def probabilities(logits_BV: Tensor, seen_BV: Tensor, params: list[SamplingParams], plan: SamplingPlan) -> Tensor:
    """The distribution that `sample` races over, built from its own parts."""
    table = rows(*params)
    scaled_BV = scale(penalize(logits_BV, seen_BV, table.repetition_penalty), table.temperature)
    threshold_B = min_p_threshold(table.min_p)
    if plan.candidates:
        ranked_B = rank_threshold(scaled_BV, table.top_k, table.top_p, plan.candidates)
        threshold_B = threshold_B.maximum(ranked_B)
    return torch.where(scaled_BV >= threshold_B[:, None], scaled_BV, -torch.inf).softmax(-1)


def theirs(logits_BV: Tensor, prompt: Tensor, p: SamplingParams) -> Tensor:
    chain = LogitsProcessorList()
    if p.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(p.repetition_penalty))
    chain.append(TemperatureLogitsWarper(float(p.temperature)))
    if p.top_k:
        chain.append(TopKLogitsWarper(p.top_k))
    if p.top_p < 1:
        chain.append(TopPLogitsWarper(p.top_p))
    if p.min_p:
        chain.append(MinPLogitsWarper(p.min_p))
    return chain(prompt, logits_BV.clone()).softmax(-1)


SETTINGS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.3),
    SamplingParams(temperature=2.5, top_k=1),
    SamplingParams(temperature=1.0, top_k=50),
    SamplingParams(temperature=1.0, top_k=299),
    SamplingParams(temperature=1.0, top_k=100_000),
    SamplingParams(temperature=0.8, top_p=0.9),
    SamplingParams(temperature=0.8, top_p=0.001),
    SamplingParams(temperature=1.5, top_p=0.999),
    SamplingParams(temperature=1.2, min_p=0.05),
    SamplingParams(temperature=1.2, min_p=1.0),
    SamplingParams(temperature=0.7, top_k=40, top_p=0.95, min_p=0.02, repetition_penalty=1.3),
    SamplingParams(temperature=1.7, top_k=200, top_p=0.5, repetition_penalty=0.6),
]


@pytest.mark.parametrize("params", SETTINGS, ids=str)
def test_support_and_probabilities_are_those_of_transformers(params: SamplingParams) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_BV = torch.randn(16, V, generator=generator) * 4
    prompt = torch.randint(0, V, (16, 30), generator=generator)
    seen_BV = torch.zeros(16, V, dtype=torch.bool).scatter(1, prompt, True)
    ours = probabilities(logits_BV, seen_BV, [params] * 16, SamplingPlan.of([params], V))
    expected = theirs(logits_BV, prompt, params)
    assert torch.equal(ours > 0, expected > 0)
    torch.testing.assert_close(ours, expected)


def test_plans_do_not_change_what_a_row_keeps() -> None:
    """The whole vocabulary ranked, or only the candidates: the same rows come out, also where logits are equal."""
    logits_BV = (torch.randn(32, V, generator=torch.Generator().manual_seed(3)) * 2).round()
    params = [SamplingParams(temperature=0.9, top_k=64, top_p=0.97, seed=i) for i in range(32)]
    positions_B = torch.arange(32)
    alone = sample(logits_BV, positions_B, rows(*params), SamplingPlan(False, 64, False))
    mixed = sample(logits_BV, positions_B, rows(*params), SamplingPlan(False, V, False))
    assert torch.equal(alone, mixed)


def test_a_row_in_a_mixed_batch_is_what_it_is_alone() -> None:
    params = [*SETTINGS, SamplingParams(temperature=0), SamplingParams(temperature=0, top_p=0.5)]
    logits_BV = torch.randn(len(params), V, generator=torch.Generator().manual_seed(5)) * 3
    positions_B = torch.arange(len(params)) + 7
    batch = sample(logits_BV, positions_B, rows(*params), SamplingPlan.of(params, V))
    for i, p in enumerate(params):
        alone = sample(logits_BV[i : i + 1], positions_B[i : i + 1], rows(p), SamplingPlan.of([p], V))
        assert alone.item() == batch[i].item(), p


def test_the_plan_is_the_least_that_serves_all_rows() -> None:
    def plan(*params: SamplingParams) -> SamplingPlan:
        return SamplingPlan.of(params, 50_000)

    assert plan(SamplingParams(temperature=0, top_p=0.5)) == SamplingPlan(True, 0, False)
    assert plan(SamplingParams(min_p=0.1), SamplingParams(temperature=0)) == SamplingPlan(False, 0, False)
    assert plan(SamplingParams(top_k=50), SamplingParams()) == SamplingPlan(False, CANDIDATES[0], False)
    assert plan(SamplingParams(top_k=50), SamplingParams(top_k=65)) == SamplingPlan(False, CANDIDATES[1], False)
    assert plan(SamplingParams(top_k=50), SamplingParams(top_p=0.9)) == SamplingPlan(False, 50_000, False)
    assert plan(SamplingParams(top_k=5000)) == SamplingPlan(False, 50_000, False)
    assert plan(SamplingParams(temperature=0, repetition_penalty=1.1)) == SamplingPlan(True, 0, True)


def test_no_temperature_overflows() -> None:
    logits_BV = torch.tensor([[50.0, 49.0, -50.0]])
    cold = [SamplingParams(temperature=1e-30, seed=s) for s in range(20)]
    assert sample(logits_BV.expand(20, 3), torch.arange(20), rows(*cold), SamplingPlan(False)).tolist() == [0] * 20


def chi_square_limit(degrees: int) -> float:
    """About six standard deviations over the mean of chi-square."""
    return degrees + 6 * math.sqrt(2 * degrees)


def test_samples_follow_the_distribution() -> None:
    n = 40_000
    logits_V = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0, 1.5, 0.2])
    params = rows(*[SamplingParams(temperature=0.8, seed=7)]).at(torch.zeros(n, dtype=torch.int64))
    tokens = sample(logits_V.expand(n, -1), torch.arange(n), params, SamplingPlan(False))
    expected = (logits_V / 0.8).softmax(-1) * n
    observed = torch.bincount(tokens, minlength=8)
    assert float(((observed - expected) ** 2 / expected).sum()) < chi_square_limit(7)


@pytest.mark.parametrize(
    ("seeds", "positions", "vocab"),
    [
        (torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 200_000),
        (torch.full((2000,), 3), torch.arange(2000), 100),
        (torch.arange(2000), torch.full((2000,), 5), 100),
        (torch.arange(2000) << 32, torch.zeros(2000, dtype=torch.int64), 100),
    ],
    ids=["tokens", "positions", "seeds", "high seeds"],
)
def test_noise_is_exponential_along_every_axis(seeds: Tensor, positions: Tensor, vocab: int) -> None:
    uniform = torch.exp(-exponential_noise(seeds, positions, vocab).double()).flatten()
    n, bins = len(uniform), 100
    counts = torch.histc(uniform, bins, 0, 1)
    assert float(((counts - n / bins) ** 2 / (n / bins)).sum()) < chi_square_limit(bins - 1)


def test_noise_of_neighbours_is_independent() -> None:
    """Seeds, positions and tokens one apart, and the transposed pairs (seed, position), are uncorrelated."""
    n, vocab = 300, 300
    base = torch.arange(n)

    def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
        return torch.exp(-exponential_noise(seeds, positions, vocab).double()) - 0.5

    here = uniform(base, base * 2)
    others = {
        "next seed": uniform(base + 1, base * 2),
        "next position": uniform(base, base * 2 + 1),
        "swapped": uniform(base * 2, base),
        "next token": here.roll(1, 1),
        "next row": here.roll(1, 0),
    }
    bound = 5 / math.sqrt(n * vocab)  # of the correlation's standard deviation, 1 / sqrt(samples)
    for name, there in others.items():
        keep = slice(1, None)
        correlation = float((here[keep] * there[keep]).mean() * 12)
        assert abs(correlation) < bound, name


def test_distinct_keys_give_distinct_noise() -> None:
    pairs = torch.cartesian_prod(torch.tensor([0, 1, 2**31, 2**32, 2**63 - 1]), torch.arange(200))
    first = exponential_noise(pairs[:, 0], pairs[:, 1], 4)
    assert len({tuple(row) for row in first.tolist()}) == len(pairs)


def test_the_hash_is_a_bijection_that_avalanches() -> None:
    x = torch.arange(2**16) * 65_521 + 12_345
    assert len(torch.unique(hash32(x))) == len(x)
    assert int(hash32(x).max()) < 2**32
    assert int(hash32(x).min()) >= 0
    for bit in range(32):
        changed = hash32(x) ^ hash32(x ^ (1 << bit))
        flips = sum(int((changed >> i & 1).sum()) for i in range(32)) / (32 * len(x))
        assert abs(flips - 0.5) < 0.01, bit


def test_noise_is_finite_and_positive_whatever_the_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    for bits in (0, 2**32 - 1):
        monkeypatch.setattr("generate.sampling.hash32", lambda x, bits=bits: torch.full_like(x, bits))
        noise = exponential_noise(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 4)
        assert bool(((noise > 0) & noise.isfinite()).all())
