"""What requests ask of logits, through the whole engine: what a request gets depends on that request alone, and equals
what it gets from logits that were computed anew for the whole sequence.
"""

from collections import Counter
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import pytest
import torch

from config.settings import SamplingParams
from generate.engine import Engine
from generate.guide import WORD_BITS
from generate.sampling import SamplingPlan
from generate.sequence import RequestOutput
from tests.generate.scripted import VOCAB, RecallModel, make_engine

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
PLAIN = SamplingParams(temperature=0, max_new_tokens=20)
SHARPNESS = 0.4  # so that what is likely varies from token to token


def fresh(**options) -> Engine:
    return make_engine(RecallModel(sharpness=SHARPNESS), **options)


class Alternates:
    """A guide: even and odd tokens in turn, each less likely than what came before it would be by itself."""

    def __init__(self) -> None:
        self.came: list[int] = []

    def allowed(self) -> torch.Tensor:
        words = [0] * (-(-VOCAB // WORD_BITS))
        for token in range(len(self.came) % 2, VOCAB, 2):
            words[token // WORD_BITS] |= 1 << (token % WORD_BITS)
        return torch.tensor(words, dtype=torch.int64).to(torch.int32)

    def advance(self, token_id: int) -> None:
        self.came.append(token_id)


ASKS: dict[str, tuple[SamplingParams, type[Alternates] | None]] = {
    "greedy": (PLAIN, None),
    "sampled": (SamplingParams(max_new_tokens=20, seed=4), None),
    "presence": (SamplingParams(temperature=0, max_new_tokens=20, presence_penalty=2.0), None),
    "frequency": (SamplingParams(max_new_tokens=20, frequency_penalty=-1.5, seed=8), None),
    "bias": (SamplingParams(max_new_tokens=20, logit_bias=((5, 3.5), (6, -100.0)), seed=1), None),
    "guide": (SamplingParams(max_new_tokens=20, seed=2), Alternates),
    "guide, greedy": (SamplingParams(temperature=0, max_new_tokens=20, repetition_penalty=1.3), Alternates),
    "logprobs": (SamplingParams(max_new_tokens=20, top_logprobs=3, seed=9), None),
    "all": (
        SamplingParams(
            max_new_tokens=20, top_k=30, top_p=0.9, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.3,
            logit_bias=((8, 2.0),), min_new_tokens=12, stop_token_ids=tuple(range(60, 80)), top_logprobs=1, seed=3,
        ),
        Alternates,
    ),
}  # fmt: skip


def outputs(engine: Engine, names: SequenceOf[str]) -> list[list[RequestOutput]]:
    """What each of these asks gets, all at once."""
    sequences = []
    for name in names:
        params, guide = ASKS[name]
        sequences.append(engine.add(PROMPT, params, guide=None if guide is None else guide()))
    found: dict[int, list[RequestOutput]] = {sequence.seq_id: [] for sequence in sequences}
    while engine.has_unfinished:
        for output in engine.step():
            found[output.seq_id].append(output)
    return [found[sequence.seq_id] for sequence in sequences]


def ids(got: list[RequestOutput]) -> list[int]:
    return [token for output in got for token in output.token_ids]


def logits_after(tokens: SequenceOf[int]) -> torch.Tensor:
    """Of the whole sequence, computed anew: float32 [V]."""
    model = RecallModel(sharpness=SHARPNESS)
    one = torch.tensor([0])
    return model(torch.tensor([list(tokens)]), one, fresh().cache, one, 64, torch.tensor([len(tokens) - 1]))[0]


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("slots", [1, 3, len(ASKS)])
def test_neighbours_change_nothing(slots: int, lookahead: int) -> None:
    together = fresh(max_num_seqs=slots)
    together._lookahead = lookahead
    for name, got in zip(ASKS, outputs(together, list(ASKS)), strict=True):
        alone = outputs(fresh(), [name])[0]
        assert ids(got) == ids(alone), name
        assert [output.logprobs for output in got] == [output.logprobs for output in alone], name
    assert len({tuple(ids(got)) for got in outputs(together, list(ASKS))}) == len(ASKS)


def test_penalties_are_those_of_the_generated_tokens() -> None:
    params = ASKS["presence"][0]
    made: list[int] = []
    for token in ids(outputs(fresh(), ["presence"])[0]):
        logits = logits_after([*PROMPT, *made])
        for seen in Counter(made):
            logits[seen] -= params.presence_penalty
        assert token == int(logits.argmax())
        made.append(token)
    assert made != ids(outputs(fresh(), ["greedy"])[0])


def test_a_guide_is_kept_to_and_told_every_token() -> None:
    guide = Alternates()
    engine = fresh(max_num_seqs=2)
    engine._lookahead = 1
    guided = engine.add(PROMPT, PLAIN, guide=guide)
    engine.add(PROMPT, PLAIN)
    while engine.has_unfinished:
        engine.step()
    assert guide.came == guided.token_ids
    assert [token % 2 for token in guide.came] == [0, 1] * 10
    for i, token in enumerate(guide.came):
        logits = logits_after([*PROMPT, *guide.came[:i]])
        logits[1 - i % 2 :: 2] = -torch.inf
        assert token == int(logits.argmax())


def test_logprobs_are_those_of_the_model_before_anything_was_asked() -> None:
    got = outputs(fresh(), ["all"])[0]
    made: list[int] = []
    for output in got:
        expected = logits_after([*PROMPT, *made]).log_softmax(-1)
        (found,) = output.logprobs
        made += output.token_ids
        assert found.token_id == made[-1]
        assert found.logprob == pytest.approx(expected[made[-1]].item(), abs=1e-5)
        assert [token for token, _ in found.top] == [int(expected.argmax())]
        assert found.top[0][1] == pytest.approx(expected.max().item(), abs=1e-5)
    assert all(not output.logprobs for output in outputs(fresh(), ["greedy"])[0])


def test_a_stop_token_ends_without_being_shown_but_not_too_early() -> None:
    free = ids(outputs(fresh(), ["sampled"])[0])
    stop = free[3]
    assert stop not in free[:3]
    for least in (0, 3, 8):
        engine = fresh()
        params = replace(ASKS["sampled"][0], stop_token_ids=(stop,), min_new_tokens=least)
        sequence = engine.add(PROMPT, params)
        text = ""
        while engine.has_unfinished:
            text += "".join(output.text for output in engine.step())
        assert stop not in sequence.token_ids[:-1]
        assert sequence.finish_reason == ("stop" if sequence.token_ids[-1] == stop else "length")
        assert len(sequence.token_ids) > least
        if least <= 3:
            assert sequence.token_ids == free[:4]
            assert text == bytes(free[:3]).decode(errors="replace")


def test_only_what_was_made_ready_decides_how_a_plan_is_run() -> None:
    """A plan that nobody prepared is sampled eagerly from logits, and gives the same."""
    prepared: list[SamplingPlan | None] = []
    engine = fresh(max_num_seqs=3, prepare_fn=lambda cache, state, slots_B, plan: prepared.append(plan))
    run: list[SamplingPlan | None] = []
    decode_fn = engine.decode_fn

    def spy(model, cache, state, slots_B, plan):
        run.append(plan)
        return decode_fn(model, cache, state, slots_B, plan)

    engine.decode_fn = spy
    engine.prepare(ASKS["sampled"][0], any_request=True)
    ready = set(prepared)
    sampled = SamplingPlan.of([ASKS["sampled"][0]], VOCAB)
    assert ready == {sampled, SamplingPlan(), None}
    assert len(prepared) == 3 * 3  # batches of 1, 2 and 4
    for name in ("greedy", "sampled", "frequency", "all"):
        run.clear()
        assert ids(outputs(engine, [name])[0]) == ids(outputs(fresh(), [name])[0])
        assert set(run) == {{"greedy": SamplingPlan(), "sampled": sampled}.get(name)}
    run.clear()
    mixed = outputs(engine, ["greedy", "all", "sampled"])
    assert [ids(got) for got in mixed] == [ids(outputs(fresh(), [n])[0]) for n in ("greedy", "all", "sampled")]
    assert set(run) <= ready
