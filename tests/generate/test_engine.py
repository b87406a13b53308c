"""Laws of the engine, on models small enough to reason about: what a request gets depends on that request alone."""

import pytest
import torch

from config.errors import UserError
from config.settings import MAX_SEED, SamplingParams
from generate.sequence import RequestOutput
from tests.generate.scripted import VOCAB, RecallModel, ScriptedModel, make_engine, run

GREEDY = SamplingParams(temperature=0, max_new_tokens=20)
SAMPLED = SamplingParams(temperature=1.0, max_new_tokens=20, seed=5)
PENALIZED = SamplingParams(temperature=0.9, max_new_tokens=20, repetition_penalty=1.5, top_k=20, top_p=0.9, seed=1)
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def alone(prompt: list[int], params: SamplingParams, **options) -> tuple[list[int], str, str | None]:
    return run(make_engine(**options), (prompt, params))[0]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, PENALIZED], ids=["greedy", "sampled", "penalized"])
def test_the_same_request_gives_the_same_text(params: SamplingParams) -> None:
    engine = make_engine()
    first = run(engine, (PROMPT, params))
    torch.manual_seed(99)  # the device's own random numbers have no part in it
    run(engine, ([7] * 30, SAMPLED))  # nor has what ran in the slot before
    assert run(engine, (PROMPT, params)) == first == [alone(PROMPT, params)]
    assert len(first[0][0]) == 20


def test_another_seed_gives_another_text() -> None:
    texts = {tuple(alone(PROMPT, SamplingParams(max_new_tokens=20, seed=s))[0]) for s in (0, 1, 2, MAX_SEED)}
    assert len(texts) == 4


def test_greedy_takes_the_likeliest_token_of_the_whole_sequence() -> None:
    tokens = alone(PROMPT, GREEDY)[0]
    model, cache = RecallModel(), make_engine().cache
    whole = [*PROMPT, *tokens]
    for i, token in enumerate(tokens):
        at = torch.tensor([len(PROMPT) + i - 1])
        logits = model(torch.tensor([whole]), torch.tensor([0]), cache, torch.tensor([0]), len(whole), at)
        assert int(logits.argmax()) == token


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 5, 8])
def test_a_batch_gives_what_each_gives_alone(max_num_seqs: int) -> None:
    """With fewer slots than requests too, so that slots are used again while others run, and padding runs beside
    them.
    """
    requests = [
        (
            [i + 1] * (1 + 5 * i % 23),
            SamplingParams(temperature=t, top_k=k, repetition_penalty=r, max_new_tokens=n, seed=i),
        )
        for i, (t, k, r, n) in enumerate(
            [
                (0, 0, 1, 9),
                (1, 0, 1, 20),
                (0.7, 5, 1, 3),
                (1, 0, 1.4, 17),
                (0, 0, 1.4, 1),
                (2, 90, 1, 30),
                (1, 0, 1, 12),
            ]
        )
    ]
    engine = make_engine(max_num_seqs=max_num_seqs, prefill_chunk=6)
    assert run(engine, *requests) == [alone(*request) for request in requests]
    assert {rows for rows, width in engine.model.calls if width == 1} <= {1, 2, 4, 8}
    if engine.cache.num_slots > max_num_seqs:  # padding rows never left the first place of their slot
        assert not engine.cache.keys[0][max_num_seqs, :, 1:].any()


def test_requests_may_come_while_others_run() -> None:
    engine = make_engine(max_num_seqs=3)
    sequences = []
    for i in range(6):
        sequences.append(engine.add([i + 1] * (i + 2), SamplingParams(seed=i, max_new_tokens=10)))
        engine.step()
        engine.step()
    while engine.has_unfinished:
        engine.step()
    for i, sequence in enumerate(sequences):
        assert sequence.token_ids == alone([i + 1] * (i + 2), SamplingParams(seed=i, max_new_tokens=10))[0]


@pytest.mark.parametrize("chunk", [1, 3, 8, 9, 100])
@pytest.mark.parametrize("params", [GREEDY, PENALIZED], ids=["greedy", "penalized"])
def test_a_prompt_read_in_chunks_is_the_prompt_read_whole(chunk: int, params: SamplingParams) -> None:
    engine = make_engine(prefill_chunk=chunk)
    assert run(engine, (PROMPT, params)) == [alone(PROMPT, params)]
    widths = [width for _, width in engine.model.calls]
    assert widths[: -(-len(PROMPT) // chunk)] == [len(PROMPT[i : i + chunk]) for i in range(0, len(PROMPT), chunk)]


def test_steps_issued_ahead_change_nothing() -> None:
    """As on CUDA, where a step is issued before the last one's tokens are read and an ended sequence runs one too
    many.
    """
    requests = [(PROMPT[: i + 1], SamplingParams(seed=i, max_new_tokens=40)) for i in range(5)]
    eos = frozenset({11, 12, 13})
    expected = run(make_engine(max_num_seqs=3, eos_ids=eos), *requests)
    ahead = make_engine(max_num_seqs=3, eos_ids=eos)
    ahead._lookahead = 1
    assert run(ahead, *requests) == expected
    assert {reason for _, _, reason in expected} == {"stop", "length"}
    assert ahead.ledger.decode_tokens == sum(len(tokens) - 1 for tokens, _, _ in expected)


def test_a_sequence_ends_at_its_end_token() -> None:
    script = [*b"Hi.", 300, *b" more"]
    engine = make_engine(ScriptedModel(script, 2, 301), vocab_size=301, eos_ids=frozenset({300}))
    assert run(engine, ([1, 2], GREEDY)) == [([*b"Hi.", 300], "Hi.", "stop")]
    tokens, text, reason = run(engine, ([1, 2], SamplingParams(temperature=0, max_new_tokens=6, ignore_eos=True)))[0]
    assert (tokens, text, reason) == ([*b"Hi.", 300, *b" m"], "Hi. m", "length")


@pytest.mark.parametrize(
    ("stop", "text"), [(("fox",), "The "), (("x j", "zzz"), "The fo"), (("nowhere",), "The fox jumped ov")]
)
def test_a_stop_string_ends_the_text_before_it(stop: tuple[str, ...], text: str) -> None:
    engine = make_engine(ScriptedModel(list(b"The fox jumped over"), 1, 256), vocab_size=256)
    params = SamplingParams(temperature=0, max_new_tokens=17, stop=stop)
    tokens, got, reason = run(engine, ([1], params))[0]
    assert (got, reason) == (text, "length" if stop == ("nowhere",) else "stop")
    assert bytes(tokens).decode().startswith(text)


def test_half_a_character_is_never_shown() -> None:
    engine = make_engine(ScriptedModel(list("añ🙂".encode()), 1, 256), vocab_size=256)
    engine.add([1], SamplingParams(temperature=0, max_new_tokens=6))
    texts = [output.text for _ in range(6) for output in engine.step()]
    assert texts == ["a", "", "ñ", "", "", "\ufffd"]  # the end came three bytes into the smiley


class SpacedTokenizer:
    """As SentencePiece's of Llama 2: every word has its space before it, which a text does not begin with."""

    def decode_bytes(self, ids: tuple[int, ...], *, start: bool = False) -> bytes:
        pieces = {1: b"", 2: b" ", 3: b" Hi", 4: b" you"}
        return b"".join(pieces[i] for i in ids).removeprefix(b" " if start else b"")


@pytest.mark.parametrize(
    ("script", "new_text", "text"),
    [
        ([3, 4], True, "Hi you"),
        ([1, 1, 3, 4], True, "Hi you"),  # what shows nothing is not the beginning
        ([2, 3], True, " Hi"),  # a space of the text's own stays
        ([3, 4], False, " Hi you"),
    ],
)
def test_a_new_text_begins_without_the_tokenizers_space(script: list[int], new_text: bool, text: str) -> None:
    engine = make_engine(ScriptedModel(script, 1, VOCAB))
    engine.tokenizer = SpacedTokenizer()
    params = SamplingParams(temperature=0, max_new_tokens=len(script))
    (sequence,) = engine.add_samples([1], params, 1, new_text=new_text)
    assert "".join(output.text for _ in script for output in engine.step()) == text
    assert sequence.finished


def test_the_contexts_end_is_an_end_of_length() -> None:
    engine = make_engine(max_seq_len=16)
    tokens, _, reason = run(engine, (PROMPT, SamplingParams()))[0]
    assert (len(PROMPT) + len(tokens), reason) == (16, "length")
    assert len(alone(PROMPT, SamplingParams(max_new_tokens=100), max_seq_len=16)[0]) == 8
    assert len(run(engine, ([1] * 15, SamplingParams()))[0][0]) == 1


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "no tokens"),
        ([1] * 16, "16 tokens and the context holds 16"),
        ([1, VOCAB], "tokenizer"),
        ([-1], "tokenizer"),
    ],
)
def test_a_prompt_that_cannot_run_is_refused(prompt: list[int], words: str) -> None:
    engine = make_engine(max_seq_len=16)
    with pytest.raises(UserError, match=words):
        engine.add(prompt, GREEDY)
    assert not engine.has_unfinished


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_cancel_ends_a_sequence_and_no_other(steps: int) -> None:
    engine = make_engine(max_num_seqs=2, prefill_chunk=4)
    doomed = engine.add(PROMPT, SAMPLED)
    other = engine.add(PROMPT[:3], SAMPLED)
    for _ in range(steps):
        engine.step()
    made = list(doomed.token_ids)
    output = engine.cancel(doomed)
    assert output is not None
    assert output.finish_reason == doomed.finish_reason == "abort"
    assert engine.cancel(doomed) is None
    while engine.has_unfinished:
        assert all(o.seq_id == other.seq_id for o in engine.step())
    assert doomed.token_ids == made
    assert other.token_ids == alone(PROMPT[:3], SAMPLED)[0]
    assert run(engine, (PROMPT, SAMPLED)) == [alone(PROMPT, SAMPLED)]  # its slot is clean


def test_cancel_gives_the_text_that_was_held_back() -> None:
    engine = make_engine(ScriptedModel(list(b"ab#"), 1, 256), vocab_size=256)
    sequence = engine.add([1], SamplingParams(temperature=0, stop=("##",)))
    assert "".join(o.text for _ in range(3) for o in engine.step()) == "ab"
    assert engine.cancel(sequence) == RequestOutput(sequence.seq_id, "#", (), "abort")


def test_samples_are_the_seeds_after_the_first() -> None:
    engine = make_engine(max_num_seqs=4)
    outputs = list(engine.generate(PROMPT, SAMPLED, num_samples=6))
    for i in range(6):
        tokens = [t for output in outputs if output.seq_id == i for t in output.token_ids]
        assert tokens == alone(PROMPT, SamplingParams(temperature=1.0, max_new_tokens=20, seed=5 + i))[0]
    assert sum(output.finish_reason is not None for output in outputs) == 6
    list(engine.generate(PROMPT, SamplingParams(seed=MAX_SEED, max_new_tokens=1), num_samples=2))  # wraps to seed 0


def test_an_abandoned_generate_leaves_the_engine_free() -> None:
    engine = make_engine()
    stream = engine.generate(PROMPT, SAMPLED)
    next(stream)
    stream.close()
    assert not engine.has_unfinished
    assert [t for o in engine.generate(PROMPT, SAMPLED) for t in o.token_ids] == alone(PROMPT, SAMPLED)[0]


def test_without_a_tokenizer_there_are_tokens_only() -> None:
    engine = make_engine()
    engine.tokenizer = None
    assert run(engine, (PROMPT, GREEDY)) == [(alone(PROMPT, GREEDY)[0], "", "length")]


def test_the_ledger_counts_real_tokens_only() -> None:
    engine = make_engine(max_num_seqs=3, prefill_chunk=5)
    prompts = [[i, *PROMPT] for i in range(3)]  # none begins as another
    lengths = [SamplingParams(temperature=0, max_new_tokens=n) for n in (2, 6, 6)]
    run(engine, *zip(prompts, lengths, strict=True))
    ledger = engine.ledger
    assert ledger.prefill_tokens == 3 * len(prompts[0])
    assert ledger.decode_tokens == 1 + 5 + 5  # the first token of each is the prompt's
    assert 5 <= ledger.decode_steps <= 5 + 2 * -(-len(prompts[0]) // 5)  # some while the others' prompts are read
    assert ledger.ttft_s is not None
    assert 0 < ledger.ttft_s <= ledger.prefill_s + ledger.decode_s + 30
