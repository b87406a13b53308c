"""Laws of scoring: each continuation gets what the model alone gives it, however many are read together; what several
begin with is read once."""

import random

import pytest
import torch
from torch import Tensor

from config.errors import UserError
from generate import compilation
from generate.backends import ARTIFACT
from generate.engine import Engine
from generate.likelihood import Continuation, Read, batches, clusters, families_of
from generate.scheduler import slots_needed
from generate.step import read
from model.kv_cache import KVCache
from model.transformer import Transformer
from tests.generate.test_compilation import make_engine, make_model, model_config

MAX_SEQ_LEN, VOCAB = 64, 97


def engine_of(model: Transformer, num_seqs: int, chunk: int = 512, read_fn: Read = read) -> Engine:
    cache = KVCache.create(model.config, slots_needed(num_seqs), MAX_SEQ_LEN, "cpu", torch.float32)
    return Engine(model, cache, None, vocab_size=VOCAB, max_num_seqs=num_seqs, prefill_chunk=chunk, read_fn=read_fn)


def log_probabilities(model: Transformer, ids: tuple[int, ...]) -> Tensor:
    cache = KVCache.create(model.config, 1, MAX_SEQ_LEN, "cpu", torch.float32)
    zero = torch.zeros(1, dtype=torch.int64)
    with torch.inference_mode():
        return model(torch.tensor([ids]), zero, cache, zero, len(ids))[0].log_softmax(-1)


def alone(model: Transformer, request: Continuation) -> tuple[float, bool]:
    """A request read whole, by itself, its last MAX_SEQ_LEN + 1 tokens."""
    ids = (request.context + request.continuation)[-MAX_SEQ_LEN - 1 :]
    wanted = torch.tensor(request.continuation)
    found = log_probabilities(model, ids[:-1])[-len(wanted) :]
    return found.gather(1, wanted[:, None]).sum().item(), bool((found.argmax(-1) == wanted).all())


def questions(rng: random.Random) -> list[Continuation]:
    """Four continuations a question: long and short, of one token, too long for the context; examples before some."""

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randrange(VOCAB) for _ in range(rng.randint(low, high)))

    examples, requests = tokens(36, 36), []
    for number in range(9):
        context = examples + tokens(3, 12) if number in (4, 5, 6) else tokens(1, 40)
        length = 1 if number in (2, 5) else 70 if number == 8 else 20
        requests += [Continuation(context, tokens(1, min(length, MAX_SEQ_LEN))) for _ in range(4)]
    requests += [Continuation(tokens(100, 100), tokens(9, 9)), Continuation((1,), tokens(MAX_SEQ_LEN, MAX_SEQ_LEN))]
    rng.shuffle(requests[:16])
    return requests


@pytest.fixture(scope="module")
def model() -> Transformer:
    return make_model()


@pytest.fixture(scope="module")
def requests(model) -> list[Continuation]:
    asked = questions(random.Random(0))
    likeliest = tuple(log_probabilities(model, asked[0].context).argmax(-1)[-1:].tolist())
    other_end = (*asked[0].context[:-1], (asked[0].context[-1] + 1) % VOCAB)
    return [*asked, Continuation(other_end, asked[1].continuation), Continuation(asked[0].context, likeliest)]


@pytest.mark.parametrize(("num_seqs", "chunk"), [(1, 512), (2, 7), (4, 64), (8, 512), (32, 512)])
def test_each_continuation_gets_what_it_gets_alone(model, requests, num_seqs, chunk):
    found = engine_of(model, num_seqs, chunk).score(requests)
    for request, one in zip(requests, found, strict=True):
        logprob, is_greedy = alone(model, request)
        assert one.logprob == pytest.approx(logprob, abs=1e-4)
        assert one.is_greedy == is_greedy
    assert found[-1].is_greedy
    assert not all(one.is_greedy for one in found)


def test_scoring_with_a_sliding_window_and_softcaps():
    options = {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "sliding_window": 6, "head_dim": 8}
    model, asked = make_model(**options), questions(random.Random(1))
    assert model_config(**options).sliding_window == 6
    for request, one in zip(asked, engine_of(model, 4).score(asked), strict=True):
        assert one.logprob == pytest.approx(alone(model, request)[0], abs=1e-4)


def test_what_several_begin_with_is_read_once(model):
    context = tuple(range(1, 31))
    engine = engine_of(model, 4)
    engine.score([Continuation(context, (7, 8, token)) for token in (1, 2, 3, 4)])
    assert engine.ledger.prefill_tokens == len(context) + 2  # they differ in what is only predicted
    engine = engine_of(model, 2)
    engine.score([Continuation(context, (token, 8, 9)) for token in (1, 2, 3, 4)])
    assert engine.ledger.prefill_tokens == len(context) + 4 * 2  # what is predicted last is not read
    engine = engine_of(model, 2)
    engine.score([Continuation(context, (1,)), Continuation(context, (2, 3))])
    assert engine.ledger.prefill_tokens == len(context) + 1
    examples = tuple(range(40, 80))
    asked = [Continuation((*examples, *range(n, n + 5)), (token, 3)) for n in range(6) for token in (1, 2)]
    engine = engine_of(model, 4)
    engine.score(asked)
    assert engine.ledger.prefill_tokens == len(examples) + 12 * 6  # 4 tokens are too few to be read apart


def test_what_the_questions_of_several_batches_begin_with_is_read_at_once(model):
    shapes: list[tuple[int, ...]] = []

    def counted(model, cache, tokens_BT, *rest):
        shapes.append(tuple(tokens_BT.shape))
        return read(model, cache, tokens_BT, *rest)

    asked = [Continuation(tuple(range(n, n + 20)), (token, token, 3)) for n in (1, 21, 41, 61) for token in (1, 2)]
    engine_of(model, 4, read_fn=counted).score(asked)
    assert shapes == [(4, 20), (4, 2), (4, 2)]
    shapes.clear()
    short = [Continuation(one.context[-11:], one.continuation) for one in asked]  # four of them have room in one slot
    engine_of(model, 2, read_fn=counted).score(short)
    assert shapes == [(4, 11), (8, 2)]


def test_what_is_generated_after_scoring_is_what_it_was_before(model, requests):
    from tests.generate.test_compilation import GREEDY

    def generated(engine: Engine) -> list[int]:
        return [token for output in engine.generate(range(1, 20), GREEDY) for token in output.token_ids]

    engine = engine_of(model, 2)
    before = generated(engine)
    engine.score(requests)
    assert generated(engine) == before


def test_progress_adds_up(model, requests):
    counts: list[int] = []
    engine_of(model, 4).score(requests, counts.append)
    assert sum(counts) == len(requests)
    assert len(counts) > 1


def test_a_continuation_longer_than_the_context_is_refused(model):
    with pytest.raises(UserError, match=r"has 65 tokens, and the context holds 64: raise --max-seq-len"):
        engine_of(model, 1).score([Continuation((1,), (2,) * 65)])


def test_families_clusters_and_batches_have_each_request_once(requests):
    families = families_of(requests, MAX_SEQ_LEN)
    grouped = list(clusters(families))
    bases = [base for base, _ in grouped]
    assert bases[-1] == 0
    assert max(bases) == 36
    for base, cluster in grouped:
        assert len({family.beginning[:base] for family in cluster}) == 1
        for batch in batches(cluster, 4):
            assert len(batch) == 1 or sum(len(family.rows) for family in batch) <= 4
    asked = [i for _, cluster in grouped for family in cluster for row in family.rows for i in row.asked]
    assert sorted(asked) == list(range(len(requests)))


# Slow: it compiles.
@pytest.mark.slow
def test_compiled_scoring_of_many_rows_is_eager_scoring(model, tmp_path, monkeypatch):
    """As a GPU's: tests of the command compile a CPU's."""
    monkeypatch.setattr(compilation, "_backend", lambda device: ARTIFACT)
    rng = random.Random(2)
    lengths = [(n, k) for n in (1, 2) for k in (1, 2)] * 3  # two rows or four at a time, of at most 3 tokens
    asked = [
        Continuation(tuple(rng.randrange(VOCAB) for _ in range(n)), tuple(rng.randrange(VOCAB) for _ in range(k)))
        for n, k in lengths
    ]
    told: list[str] = []
    expected = make_engine(model, compiled=False, max_num_seqs=4).score(asked)
    for _ in range(2):
        engine = make_engine(model, tmp_path, told.append, prefill=False, max_num_seqs=4)
        for one, other in zip(engine.score(asked), expected, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert one.is_greedy == other.is_greedy
    assert [line.partition(": ")[0] for line in told] == ["scoring, batches"] * 3
    assert "loaded" in told[-1]


@pytest.mark.gpu
def test_scoring_on_a_gpu_is_scoring_on_a_cpu(model, requests):
    expected = engine_of(model, 4).score(requests)
    cache = KVCache.create(model.config, slots_needed(4), MAX_SEQ_LEN, "cuda", torch.float32)
    engine = Engine(make_model().to("cuda"), cache, None, vocab_size=VOCAB, max_num_seqs=4)
    for one, other in zip(engine.score(requests), expected, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-2, rel=1e-3)
