"""How well a model predicts texts, and how far another strays from it. Tokens and logits in, figures out; knows neither
tokenizers nor where the models come from.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from model.kv_cache import KVCache
from model.transformer import Transformer

CHUNK_NUMBERS = 2**25
"""So many logits of a model are in memory at a time: 128 MB in float32. Each time the output layer is read anew."""
PART_NUMBERS = 2**20
"""So many of them are compared at a time: what that makes on its way stays in a CPU's cache."""
IGNORED = -1


class Weights(Protocol):
    """Lets a model be called whose weights are elsewhere."""

    def running(self) -> AbstractContextManager[None]: ...

    def held(self, module: torch.nn.Module) -> AbstractContextManager[None]: ...


class Resident:
    """Weights of a model that is in memory, whole."""

    def running(self) -> AbstractContextManager[None]:
        return nullcontext()

    def held(self, module: torch.nn.Module) -> AbstractContextManager[None]:
        return nullcontext()


@dataclass(frozen=True)
class Windows:
    """Texts cut to what a model reads at once. tokens_BT: int64, padded on the right. targets_BT: the token that
    follows each, IGNORED where none is predicted.
    """

    tokens_BT: Tensor
    targets_BT: Tensor

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]], length: int, bos: int | None, most: int) -> "Windows":
        """Windows of at most `length` tokens over token ids without BOS, until `most` tokens are predicted.

        Each begins with BOS, or where there is none with a token that the one before has predicted last (its first
        predicts and is not predicted).
        """
        rows: list[list[int]] = []
        left = most
        for ids in texts:
            begin = [bos] if bos is not None else []
            step = length - 1
            for start in range(0, len(ids), step):
                row = [*begin, *ids[start : start + length - len(begin)]][: left + 1]
                if len(row) > 1:
                    rows.append(row)
                    left -= len(row) - 1
        longest = max((len(row) for row in rows), default=0)
        tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
        targets = torch.full_like(tokens, IGNORED)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
            targets[i, : len(row) - 1] = torch.tensor(row[1:])
        return cls(tokens, targets)

    @property
    def count(self) -> int:
        """How many tokens are predicted."""
        return int((self.targets_BT != IGNORED).sum())


@dataclass(frozen=True)
class Comparison:
    """Two models on the same texts, in means over the predicted tokens; in nats."""

    tokens: int
    loss: float
    """The cross-entropy of the model; exp(loss) is its perplexity."""
    reference_loss: float
    divergence: float
    """KL(reference || model)."""
    agreement: float
    """The share of tokens where both find the same one likeliest."""


@torch.inference_mode()
def compare(
    model: Transformer, weights: Weights, reference: Transformer, reference_weights: Weights, windows: Windows,
    device: torch.device, dtype: torch.dtype,
) -> Comparison:  # fmt: skip
    """Read the windows with both models, one after the other; all the texts go through each layer together."""
    x_ND = _predicting(model, weights, windows, device, dtype)
    reference_ND = _predicting(reference, reference_weights, windows, device, dtype)
    targets_N = windows.targets_BT[windows.targets_BT != IGNORED].to(device)
    sums = torch.zeros(4, dtype=torch.float64)
    with weights.held(model.lm_head), reference_weights.held(reference.lm_head):
        for start, stop in _chunks(len(targets_N), model.config.vocab_size):
            sums += divergences(
                model.logits(x_ND[start:stop]), reference.logits(reference_ND[start:stop]), targets_N[start:stop]
            )
    return Comparison(len(targets_N), *(sums / len(targets_N)).tolist())


def divergences(logits_NV: Tensor, reference_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Sums over N tokens, float64 [4]: the cross-entropies of model and reference, KL(reference || model), and how
    often both find the same token likeliest. Of float32 logits.
    """
    step = max(1, PART_NUMBERS // logits_NV.shape[1])
    parts = zip(*(torch.split(part, step) for part in (logits_NV, reference_NV, targets_N)), strict=True)
    return torch.stack([_divergences(*part) for part in parts]).cpu().double().sum(0)


def _divergences(logits_NV: Tensor, reference_NV: Tensor, targets_N: Tensor) -> Tensor:
    log_p_NV, reference_log_p_NV = logits_NV.log_softmax(-1), reference_NV.log_softmax(-1)
    at_N1 = targets_N[:, None]
    parts = (
        -log_p_NV.gather(1, at_N1),
        -reference_log_p_NV.gather(1, at_N1),
        (reference_log_p_NV.exp() * (reference_log_p_NV - log_p_NV)).sum(-1),
        log_p_NV.argmax(-1) == reference_log_p_NV.argmax(-1),
    )
    return torch.stack([part.float().sum() for part in parts])


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that is too large a number."""
    return math.exp(loss) if loss < 700 else math.inf if loss > 0 else math.nan


def _predicting(
    model: Transformer, weights: Weights, windows: Windows, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The hidden states [N, D] from which tokens are predicted, in the order of the windows."""
    B, T = windows.tokens_BT.shape
    empty = KVCache.create(model.config, 0, T, device, dtype)
    # Each layer writes all it reads: one cache serves one after the other.
    one = KVCache.create(replace(model.config, layers=model.config.layers[:1]), B, T, device, dtype)
    layers = len(model.config.layers)
    cache = replace(empty, keys=one.keys * layers, values=one.values * layers)
    start_B, slots_B = torch.zeros(B, dtype=torch.int64, device=device), torch.arange(B, device=device)
    with weights.running():
        x_BTD = model.hidden(windows.tokens_BT.to(device), start_B, cache, slots_B, T)
    return x_BTD[(windows.targets_BT != IGNORED).to(device)]


def _chunks(count: int, vocab_size: int) -> Iterator[tuple[int, int]]:
    step = max(2, CHUNK_NUMBERS // vocab_size)
    return ((start, min(count, start + step)) for start in range(0, count, step))
