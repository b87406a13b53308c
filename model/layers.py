"""RMSNorm and the linear layer with what stands around it: one place that picks the fastest way this machine has.

Knows weights and rows, not what they are for. One row is the whole work of decoding a single sequence, and its cost is
reading the weights: there the library's matrix products, built for many rows, are replaced.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import kernels
from model.products import linear
from model.tracing import is_tracing

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def finish(y: Tensor, gate: str | None, residual: Tensor | None, multiplier: float) -> Tensor:
    """What comes after a product, each part only where it is given: residual + multiplier * gated(y)."""
    if gate is not None:
        activated, up = y.chunk(2, dim=-1)
        y = ACTIVATIONS[gate](activated) * up
    if multiplier != 1.0:
        y = y * multiplier
    return y if residual is None else residual + y


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32 inside (Zhang, Sennrich, arXiv:1910.07467); Gemma's multiplies by 1 + weight."""

    def __init__(self, dim: int, eps: float, plus_one: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps
        self.plus_one = plus_one

    def forward(self, x: Tensor) -> Tensor:
        if self.plus_one:
            return F.rms_norm(x.float(), self.weight.shape, self.weight.float() + 1, self.eps).to(x.dtype)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def computed_by(device: torch.device, dtype: torch.dtype) -> str:
    """What `Linear` of one row comes down to while decoding, in words."""
    if kernels.usable(torch.empty(1, dtype=dtype, device=device)):
        return "own kernel (Triton)"
    return "PyTorch (mv)" if device.type == "cpu" and dtype == torch.bfloat16 else "PyTorch (linear)"


class Table(nn.Module):
    """Parameters of which a step reads the rows that it needs, one a token, and not all."""


class Embedding(nn.Embedding, Table):
    """`nn.Embedding` that is filled from a file."""

    def reset_parameters(self) -> None:
        """Nothing, as in `Linear`."""


class Linear(nn.Linear):
    """`nn.Linear` that takes along the norm before it and the activation or the residual after it."""

    def reset_parameters(self) -> None:
        """Nothing: the weights come from a file, and to draw them on the meta device imports the whole compiler."""

    def forward(
        self,
        x: Tensor,
        norm: RMSNorm | None = None,
        gate: str | None = None,
        residual: Tensor | None = None,
        multiplier: float = 1.0,
    ) -> Tensor:
        """residual + multiplier * gated(norm(x) @ weight.T + bias), each part only where it is given.

        x: [..., in_features]. `gate` names the activation of a gated product: the output's first half, activated, times
        its second half. Returns [..., out_features], or half of them with a gate.
        """
        one_row = x.numel() == self.in_features
        if one_row and is_tracing() and kernels.usable(x):
            y: Tensor = kernels.gemv_op(
                x.reshape(-1), self.weight, None if norm is None else norm.weight, self.bias,
                None if residual is None else residual.reshape(-1), gate,
                0.0 if norm is None else norm.eps, norm is not None and norm.plus_one, multiplier,
            )  # fmt: skip
            return y.view(*x.shape[:-1], -1)
        if norm is not None:
            x = norm(x)
        if one_row and x.dtype == torch.bfloat16 and x.device.type == "cpu":
            # 30 GB/s of weights where `F.linear` reads 16 to 24 (2 cores with AVX-512, torch 2.13).
            y = torch.mv(self.weight, x.reshape(-1))
            y = (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)
        else:
            y = linear(x, self.weight, self.bias)
        return finish(y, gate, residual, multiplier)
