"""Draws token ids from a model, many rows at once: what teachers write for the student, and the README's samples."""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.default.llama import Llama
from model.default.vocabulary import BOS, PAD, UNK


@dataclass(frozen=True)
class SampleSettings:
    """length: of a row, the prompt included; min_p: tokens less likely than this share of the likeliest are out."""

    length: int
    temperature: float = 1.0
    min_p: float = 0.0
    banned: tuple[int, ...] = ()


@torch.no_grad()
def sample(
    model: Llama,
    prompts: list[list[int]],
    settings: SampleSettings,
    end: int,
    generator: torch.Generator,
    after_end: int | None = None,
) -> list[list[int]]:
    """Continue prompts of equal length, each up to its end token (included) or settings.length.

    With after_end, an end token is followed by that one instead, so that a dialogue goes on.
    """
    device = model.embedding.device
    prompt = torch.tensor(prompts, device=device)
    rows, given = prompt.shape
    length = min(settings.length, model.shape.context)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens = torch.full((rows, length), PAD, device=device)
    tokens[:, :given] = prompt
    done = torch.zeros(rows, dtype=torch.bool, device=device)
    banned = torch.tensor([UNK, BOS, PAD, *settings.banned], device=device)
    cache = model.new_cache(rows, length, dtype)
    model.eval()
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        for position in range(length - 1):
            logits = model.decode(tokens[:, position], position, cache)
            if position + 1 < given:
                continue
            last = tokens[:, position]
            drawn = _draw(logits.float(), banned, settings, generator)
            if after_end is None:
                done |= last.eq(end) & (position >= given)
                drawn = torch.where(done, PAD, drawn)
            else:
                drawn = torch.where(last.eq(end), after_end, drawn)
            tokens[:, position + 1] = drawn
            if position % 16 == 0 and bool(done.all()):
                break
    model.train()
    return [[t for t in row if t != PAD] for row in tokens.tolist()]


def _draw(logits: Tensor, banned: Tensor, settings: SampleSettings, generator: torch.Generator) -> Tensor:
    """One token a row [R]; dividing by exponential noise and taking the largest samples without a host round trip."""
    logits[:, banned] = -torch.inf
    probs = torch.softmax(logits / settings.temperature, dim=-1)
    probs[probs < settings.min_p * probs.amax(-1, keepdim=True)] = 0
    noise = torch.empty_like(probs).exponential_(generator=generator)
    return (probs / noise).argmax(-1)
