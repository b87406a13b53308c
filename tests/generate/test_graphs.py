"""Laws of captured prompts: tokens read as rows of one step leave what they leave when they are read as one row."""

import pytest
import torch

from generate import graphs
from generate.graphs import LENGTHS, MOST_PAIRS, ShortPrefill
from generate.step import prefill, prefill_rows
from model.kv_cache import KVCache
from tests.generate.scripted import run
from tests.generate.test_compilation import FILTERED, GREEDY, VOCAB, make_engine, make_model, requests

GEMMA2 = {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "sliding_window": 6, "head_dim": 8}


def numbers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize("options", [{}, GEMMA2], ids=["full attention", "sliding window and softcaps"])
@pytest.mark.parametrize(("length", "padding"), [(1, 0), (1, 5), (7, 1), (16, 0)])
def test_rows_of_a_prompt_are_the_prompt(options: dict[str, object], length: int, padding: int) -> None:
    model, start, slot = make_model(**options), 9, 1
    tokens = torch.randint(VOCAB, (1, start + length), generator=torch.Generator().manual_seed(3))
    first, chunk = tokens[:, :start], tokens[:, start:]
    caches = [KVCache.create(model.config, 3, 32, "cpu", torch.float32) for _ in range(2)]
    with torch.inference_mode():
        for cache in caches:
            prefill(model, cache, first, numbers(0), numbers(slot), numbers(start - 1), start)
        at = (numbers(start), numbers(slot), numbers(length - 1))
        whole = prefill(model, caches[0], chunk, *at, start + length)
        padded = torch.cat((chunk, torch.full((1, padding), 5)), dim=1)
        rows = prefill_rows(model, caches[1], padded, *at)
    torch.testing.assert_close(rows, whole, atol=2e-5, rtol=1e-4)
    for one, other in zip((*caches[0].keys, *caches[0].values), (*caches[1].keys, *caches[1].values), strict=True):
        torch.testing.assert_close(other, one, atol=2e-5, rtol=1e-4)


def test_long_chunks_and_far_ones_are_left_to_other_ways() -> None:
    assert ShortPrefill.takes(1, 1)
    assert ShortPrefill.takes(LENGTHS[-1], MOST_PAIRS // LENGTHS[-1])
    assert not ShortPrefill.takes(LENGTHS[-1] + 1, LENGTHS[-1] + 1)
    assert not ShortPrefill.takes(16, MOST_PAIRS // 16 + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("params", [GREEDY, FILTERED], ids=["greedy", "filtered"])
def test_captured_prompts_give_the_same_tokens(params, monkeypatch) -> None:
    model = make_model(hidden_size=64, num_attention_heads=4).cuda()
    replayed: list[int] = []
    call = ShortPrefill.__call__
    monkeypatch.setattr(
        graphs.ShortPrefill, "__call__", lambda self, *args: (replayed.append(args[0].shape[1]), call(self, *args))[1]
    )
    expected = run(make_engine(model, compiled=False), *requests(params))
    assert not replayed
    engine = make_engine(model, compiled=False, capture_prefill=True)
    engine.prepare(params)
    assert run(engine, *requests(params)) == expected
    assert max(replayed) == 8
    assert min(replayed) == 1
    assert run(engine, *requests(params)) == expected  # now from what the cache holds
