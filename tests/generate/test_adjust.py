"""What requests ask of logits: OpenAI's formulas, each row by its own sequence alone, nothing where none asks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from config.settings import SamplingParams
from generate.adjust import Adjustments, is_adjusted, logprobs, token_logprobs
from generate.sequence import Sequence

V = 40
CPU = torch.device("cpu")


class Allows:
    """A guide that allows these tokens alone."""

    def __init__(self, *tokens):
        self.tokens = tokens

    def allowed(self):
        words = [0] * (-(-V // 32))
        for token in self.tokens:
            words[token // 32] |= 1 << (token % 32)
        return torch.tensor(words, dtype=torch.int64).to(torch.int32)

    def advance(self, token_id):
        raise AssertionError("the engine does that")


def sequence(slot, guide=None, issued=1, **params):
    return Sequence(slot, (1,), SamplingParams(**params), 100, slot=slot, num_issued=issued, guide=guide)


def adjustments(*sequences, eos=()):
    made = Adjustments(8, V, CPU, frozenset(eos))
    for one in sequences:
        made.begin(one)
    return made


def test_penalties_are_those_of_openai():
    one = sequence(3, presence_penalty=0.7, frequency_penalty=-0.3)
    ours = adjustments(one)
    logits = torch.randn(1, V)
    assert torch.equal(ours.apply(logits, [one]), logits)
    counts = torch.zeros(V)
    for token in (5, 7, 5, 5, 39):
        ours.note([one], torch.tensor([token]))
        counts[token] += 1
    expected = logits - counts * -0.3 - (counts > 0) * 0.7
    torch.testing.assert_close(ours.apply(logits, [one]), expected)
    ours.begin(one)  # the slot's next sequence has generated nothing
    assert torch.equal(ours.apply(logits, [one]), logits)


def test_biases_add_and_unknown_tokens_are_no_error():
    one = sequence(0, logit_bias=((2, 5.5), (39, -100.0), (4000, 1.0)))
    logits = torch.randn(1, V)
    expected = logits.clone()
    expected[0, 2] += 5.5
    expected[0, 39] -= 100
    assert torch.equal(adjustments(one).apply(logits, [one]), expected)


def test_the_end_cannot_come_before_the_least_length():
    one = sequence(0, min_new_tokens=2, stop_token_ids=(9,), logit_bias=((3, 100.0),))
    ours = adjustments(one, eos=(3, 39))
    logits = torch.randn(1, V)
    for issued, banned in ((1, True), (2, True), (3, False)):
        one.num_issued = issued
        adjusted = ours.apply(logits, [one])
        assert [token for token in range(V) if adjusted[0, token] == -torch.inf] == ([3, 9, 39] if banned else [])


def test_a_guide_leaves_what_it_allows_as_it_was():
    one, other = sequence(0, guide=Allows(0, 31, 32, 39)), sequence(1)
    logits = torch.randn(2, V)
    adjusted = adjustments(one, other).apply(logits, [one, other])
    assert torch.equal(adjusted[1], logits[1])
    allowed = torch.zeros(V, dtype=torch.bool)
    allowed[[0, 31, 32, 39]] = True
    assert torch.equal(adjusted[0], torch.where(allowed, logits[0], -torch.inf))


ASKS = [
    {},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.5, "logit_bias": ((1, 2.0),)},
    {"min_new_tokens": 5},
    {"guide": Allows(1, 2, 3)},
]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from(range(len(ASKS))), min_size=1, max_size=6), st.integers(0, 2**31))
def test_a_row_does_not_depend_on_its_neighbours(asks, seed):
    random = torch.Generator().manual_seed(seed)
    rows = [sequence(slot, **ASKS[ask]) for slot, ask in enumerate(asks)]
    together = adjustments(*rows, eos=(0,))
    alone = [adjustments(row, eos=(0,)) for row in rows]
    for step in range(3):
        for row in rows:
            row.num_issued = step + 1
        logits = torch.randn(len(rows), V, generator=random)
        adjusted = together.apply(logits, rows)
        for i, row in enumerate(rows):
            assert torch.equal(adjusted[i : i + 1], alone[i].apply(logits[i : i + 1], [row]))
        tokens = torch.randint(V, (len(rows),), generator=random)
        together.note(rows, tokens)
        for i, row in enumerate(rows):
            alone[i].note([row], tokens[i : i + 1])


@pytest.mark.parametrize("ask", ASKS)
def test_who_asks_for_nothing_is_not_adjusted(ask):
    one = sequence(0, **ask)
    assert is_adjusted(one.params, one.guide) == bool(ask)


def test_logprobs_are_the_models_own():
    logits = torch.randn(2, V)
    expected = logits.log_softmax(-1)
    rows = logprobs(logits, torch.tensor([4, 17]), 5).tolist()
    found = token_logprobs(rows[1], 17, 3)
    assert found.token_id == 17
    assert found.logprob == pytest.approx(expected[1, 17].item())
    values, ids = expected[1].topk(3)
    assert [token for token, _ in found.top] == ids.tolist()
    assert [value for _, value in found.top] == pytest.approx(values.tolist())
    assert token_logprobs(rows[0], 4, 0).top == ()
