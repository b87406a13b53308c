"""Random weights of a model's real shapes, for measurements: quick to make, and the same each time."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from model.layers import RMSNorm
from model.loader import NOT_MAPPED, Mapped, TakeWeight, fill_parameters

RANDOM_STD = 0.02
RANDOM_PERIOD = 1_000_003  # prime: no two rows of a matrix repeat each other


@dataclass(frozen=True)
class RandomParameter:
    """A parameter of N(0, 0.02), the same each time; a norm's passes through what it is given. A short pattern is
    repeated, so that it takes no longer than writing the memory.
    """

    pattern: torch.Tensor
    shape: torch.Size
    value: float | None
    """Of all its numbers, in place of the pattern."""
    mapped: Mapped = NOT_MAPPED

    def whole(self) -> torch.Tensor:
        return next(self.blocks(self.shape[0]))

    def blocks(self, rows: int) -> Iterator[torch.Tensor]:
        row = self.shape[1:].numel()
        for start in range(0, self.shape[0], rows):
            stop = min(self.shape[0], start + rows)
            block = self.pattern.new_empty((stop - start, *self.shape[1:]))
            yield block.fill_(self.value) if self.value is not None else self._repeat(block, start * row)

    def _repeat(self, block: torch.Tensor, at: int) -> torch.Tensor:
        flat, period = block.view(-1), len(self.pattern)
        done = 0
        while done < len(flat):
            begin = (at + done) % period
            count = min(len(flat) - done, period - begin)
            flat[done : done + count] = self.pattern[begin : begin + count]
            done += count
        return block


def fill_random(model: nn.Module, device: torch.device, dtype: torch.dtype, take: TakeWeight | None = None) -> None:
    """Gives every parameter of a model on the meta device small random values, the same each time."""
    generator = torch.Generator().manual_seed(0)
    pattern = (torch.randn(RANDOM_PERIOD, generator=generator) * RANDOM_STD).to(device, dtype)
    norms = idle_norms(model)

    def source(name: str, meta: nn.Parameter) -> RandomParameter:
        return RandomParameter(pattern, meta.shape, norms.get(id(meta)))

    fill_parameters(model, source, take=take)


def idle_norms(model: nn.Module) -> dict[int, float]:
    """The ids of the norms' weights, and the value with which each multiplies by one."""
    return {
        id(parameter): 0.0 if module.plus_one else 1.0
        for module in model.modules()
        if isinstance(module, RMSNorm)
        for parameter in module.parameters(recurse=False)
    }
