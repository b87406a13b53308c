"""Muon for the matrices and AdamW for the rest, with one learning-rate schedule for both."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


def orthogonalize(updates: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices to [count, rows, columns], roughly: five Newton-Schulz steps in bfloat16.

    Coefficients from Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x: Tensor = updates.bfloat16()
    tall = updates.shape[-2] > updates.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Group(NamedTuple):
    """Matrices of one shape, updated together, and their momentum [count, rows, columns]."""

    matrices: list[Tensor]
    momentum: Tensor


class MuonAdamW:
    """Muon (momentum 0.95, Nesterov, decoupled weight decay) on blocks' matrices; AdamW on the embedding and norms."""

    MOMENTUM = 0.95

    def __init__(self, model: nn.Module, lr: float, weight_decay: float, embedding_lr: float) -> None:
        self.lr, self.weight_decay = lr, weight_decay
        by_shape: dict[tuple[int, int], list[Tensor]] = {}
        others = []
        for name, parameter in model.named_parameters():
            # Queries, keys and values (gates and ups) are separate maps that share a tensor for speed.
            parts = 3 if name.endswith("qkv_proj") else 2 if name.endswith("gate_up_proj") else 1
            if parameter.ndim == 2 and name != "embedding":
                rows, columns = parameter.shape
                by_shape.setdefault((rows // parts, columns), []).append(parameter)
            else:
                others.append(parameter)
        self.groups = []
        for (rows, columns), matrices in by_shape.items():
            count = sum(len(m) for m in matrices) // rows
            self.groups.append(Group(matrices, torch.zeros(count, rows, columns, device=matrices[0].device)))
        self.embedding_lr = embedding_lr
        fused = others[0].is_cuda
        self.adam = torch.optim.AdamW(others, lr=embedding_lr, betas=(0.9, 0.95), weight_decay=0.01, fused=fused)

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One update from the gradients, which are cleared; scale multiplies both learning rates."""
        for parameter_group in self.adam.param_groups:
            parameter_group["lr"] = self.embedding_lr * scale
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        lr = self.lr * scale
        for matrices, momentum in self.groups:
            gradient = torch.cat([m.grad for m in matrices if m.grad is not None]).view_as(momentum)
            momentum.lerp_(gradient, 1 - self.MOMENTUM)
            update = orthogonalize(gradient.lerp(momentum, self.MOMENTUM))
            rows, columns = momentum.shape[1:]
            update = update.flatten(0, 1).float() * -lr * max(1.0, rows / columns) ** 0.5
            torch._foreach_mul_(matrices, 1 - lr * self.weight_decay)
            torch._foreach_add_(matrices, list(update.split([len(m) for m in matrices])))
            for matrix in matrices:
                matrix.grad = None


def learning_rate(progress: float, warmup: float = 0.02, cooldown: float = 0.7) -> float:
    """Scale in 0..1 at a progress in 0..1: a short linear warm-up, a plateau, a linear cool-down to nothing."""
    return min(1.0, progress / warmup if warmup else 1.0, (1.0 - progress) / cooldown)
