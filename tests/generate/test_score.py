"""A comparison has the figures of its formulas; a streamed model gives what the whole one gives, and holds less."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generate import score
from generate.score import IGNORED, Windows, compare, divergences, perplexity
from model.config import LayerConfig, ModelConfig, RopeConfig
from model.kv_cache import KVCache
from model.streaming import Streamed
from model.transformer import Transformer

CONFIG = ModelConfig(
    family="llama",
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=64,
    layers=(
        LayerConfig("full", RopeConfig()),
        LayerConfig("sliding", RopeConfig(theta=100.0)),
        LayerConfig("full", None),
    ),
    sliding_window=3,
    qkv_bias=True,
    logits_softcap=30.0,
)
CPU, FP32 = torch.device("cpu"), torch.float32
WINDOWS = Windows.of([list(range(2, 30)), [7], [40, 41, 3]], 12, 1, 1000)


@dataclass
class InMemory:
    tensor: Tensor

    def whole(self) -> Tensor:
        return self.tensor.clone()


def streamed(model: Transformer) -> tuple[Transformer, Streamed, list[int]]:
    """The model on the meta device, its weights read from `model`; and the bytes of each that was read."""
    with torch.device("meta"):
        empty = Transformer(model.config)
    parameters, read = dict(model.named_parameters()), list[int]()
    return empty, Streamed(empty, lambda name, meta: InMemory(parameters[name].data), read.append), read  # type: ignore[arg-type,return-value]


def random_model(seed: int, tied: bool = False) -> Transformer:
    model = Transformer(replace(CONFIG, tie_word_embeddings=tied)).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def logits_of(model: Transformer, ids: list[int]) -> Tensor:
    cache = KVCache.create(model.config, 1, len(ids), CPU, FP32)
    zero = torch.zeros(1, dtype=torch.int64)
    return model(torch.tensor([ids]), zero, cache, zero, len(ids))[0]


def test_windows_begin_with_bos_and_predict_each_token_once():
    rows = [[t for t in row if t] for row in WINDOWS.tokens_BT.tolist()]
    assert rows == [[1, *range(2, 13)], [1, *range(13, 24)], [1, *range(24, 30)], [1, 7], [1, 40, 41, 3]]
    assert WINDOWS.targets_BT[WINDOWS.targets_BT != IGNORED].tolist() == [*range(2, 30), 7, 40, 41, 3]
    assert WINDOWS.count == 32


def test_windows_without_bos_begin_with_what_was_predicted_last():
    windows = Windows.of([list(range(1, 12)), [5]], 4, None, 1000)
    assert [[t for t in row if t] for row in windows.tokens_BT.tolist()] == [
        [1, 2, 3, 4],
        [4, 5, 6, 7],
        [7, 8, 9, 10],
        [10, 11],
    ]
    assert windows.targets_BT[windows.targets_BT != IGNORED].tolist() == list(range(2, 12))


@pytest.mark.parametrize(("bos", "most"), [(1, 5), (1, 11), (1, 12), (None, 5), (None, 3)])
def test_no_more_tokens_are_predicted_than_wanted(bos, most):
    assert Windows.of([list(range(2, 30)), [1, 2, 3]], 12, bos, most).count == most
    assert Windows.of([], 12, bos, most).count == Windows.of([[]], 12, bos, most).count == 0


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk", [100, 2**25])
def test_a_comparison_is_what_its_formulas_say(monkeypatch, chunk, tied):
    """Against each window read alone by whole models, all its logits at once."""
    monkeypatch.setattr(score, "CHUNK_NUMBERS", chunk)
    monkeypatch.setattr(score, "PART_NUMBERS", chunk // 2)
    model, reference = random_model(1, tied), random_model(2, tied)
    empty, weights, _ = streamed(model)
    other, other_weights, _ = streamed(reference)
    found = compare(empty, weights, other, other_weights, WINDOWS, CPU, FP32)
    ours, theirs, targets = [], [], []
    for tokens, target in zip(WINDOWS.tokens_BT.tolist(), WINDOWS.targets_BT.tolist(), strict=True):
        count = sum(t != IGNORED for t in target)
        ours.append(logits_of(model, tokens[: count + 1])[:count])
        theirs.append(logits_of(reference, tokens[: count + 1])[:count])
        targets += target[:count]
    p, q, t = torch.cat(ours).double(), torch.cat(theirs).double(), torch.tensor(targets)
    assert found.tokens == len(t) == 32
    assert found.loss == pytest.approx(F.cross_entropy(p, t).item(), rel=1e-5)
    assert found.reference_loss == pytest.approx(F.cross_entropy(q, t).item(), rel=1e-5)
    divergence = F.kl_div(p.log_softmax(-1), q.log_softmax(-1), log_target=True, reduction="batchmean").item()
    assert found.divergence == pytest.approx(divergence, rel=1e-5)
    assert found.agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert found.divergence > 0.1
    assert perplexity(found.loss) == pytest.approx(math.exp(found.loss))


def test_a_model_does_not_stray_from_itself():
    model = random_model(3)
    found = compare(*streamed(model)[:2], *streamed(model)[:2], WINDOWS, CPU, FP32)
    assert (found.divergence, found.agreement, found.loss) == (0.0, 1.0, found.reference_loss)


def test_what_is_no_number_is_told_as_none():
    broken = torch.full((3, 5), math.nan)
    sums = divergences(broken, torch.zeros(3, 5), torch.tensor([0, 1, 2]))
    assert sums[0].isnan()
    assert sums[2].isnan()
    assert sums[1] == pytest.approx(3 * math.log(5))
    assert math.isnan(perplexity(math.nan))
    assert perplexity(1e4) == math.inf


def test_a_streamed_model_holds_one_matrix_at_a_time_and_none_in_the_end():
    model, weights, read = streamed(random_model(4))
    matrices = {module for module in model.modules() if isinstance(module, nn.Linear | nn.Embedding)}

    def loaded() -> set[nn.Module]:
        return {module for module in matrices if not module.get_parameter("weight").is_meta}

    most = 0

    def watch(module: nn.Module, inputs: object) -> None:
        nonlocal most
        most = max(most, len(loaded()))

    assert not loaded()
    assert not model.norm.weight.is_meta  # modules take norms from one another
    with weights.running():
        for module in matrices:
            module.register_forward_pre_hook(watch)
        logits_of(model, [1, 2, 3])
        assert not loaded()
    assert most == 1
    with weights.held(model.lm_head):
        assert loaded() == {model.lm_head}
    assert not loaded()
    assert sum(read) >= sum(parameter.nbytes for parameter in model.parameters())
    with pytest.raises(IndexError), weights.running():
        logits_of(model, [1, 99])
    assert not loaded()
