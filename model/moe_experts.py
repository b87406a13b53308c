"""The experts of a layer as one matrix, the rows of one below those of another: each token is multiplied with the rows
of the experts that it was sent to. Knows tensors and which way of computing is the fastest here; not who sends.

Shapes in names: M tokens, C experts that each token is sent to, J rows of x that a token has (1 for all of its experts,
or C), K inputs, N outputs of an expert, E experts, P = M * C pairs of a token and an expert, R some of those pairs.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import kernels, moe_kernels
from model.layers import Linear, finish
from model.ops import register_op
from model.products import linear
from model.tracing import is_tracing

FEW = 16
"""Up to so many tokens on a GPU, each takes the rows that it needs by itself, and nothing waits for the host."""

Product = Callable[[Tensor, int], Tensor]
"""(x [R, K], the number of an expert) -> [R, N]."""
Index = Tensor | slice


class Router(Linear):
    """Scores of the experts for each token: small, and nothing mends what it decides."""


class Stack(nn.Module):
    """Parameters of `num_experts` experts, one below the other, of which a token needs those of `chosen`."""

    num_experts: int
    chosen: int


class ExpertLinear(Stack):
    """Linear layers without biases, one for each expert: weight [E * N, K]."""

    def __init__(self, num_experts: int, chosen: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.num_experts, self.chosen = num_experts, chosen
        self.weight = nn.Parameter(torch.empty(num_experts * out_features, in_features))

    def forward(
        self, x_MJK: Tensor, experts_MC: Tensor, gate: str | None = None, weights_MC: Tensor | None = None
    ) -> Tensor:
        """Each token times the matrices of its experts (int64). `gate` names the activation of a gated product, as in
        `model.layers.Linear`. Returns [M, C, N], or half of them with a gate; with `weights_MC` (float32) the sum over
        a token's experts, each by its weight, [M, N].
        """
        product = expert_linear_op if is_tracing() else expert_linear
        y: Tensor = product(x_MJK, self.weight, experts_MC, weights_MC, self.num_experts, gate)
        return y

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, {self.chosen} of {self.num_experts}"


def expert_linear(
    x_MJK: Tensor, weight: Tensor, experts_MC: Tensor, weights_MC: Tensor | None, num_experts: int, gate: str | None
) -> Tensor:
    """`ExpertLinear.forward`."""
    weight_ENK = weight.view(num_experts, -1, weight.shape[1])
    if x_MJK.is_cuda:
        if takes_few(x_MJK):
            if kernels.usable(x_MJK):
                return moe_kernels.gemv(x_MJK, weight_ENK, experts_MC, weights_MC, gate)
            return by_pair(x_MJK, weight_ENK[experts_MC.flatten()], weights_MC, gate)
        if groups_usable(x_MJK, weight_ENK):
            return by_group(x_MJK, weight_ENK, experts_MC, weights_MC, gate)

    def product(x_RK: Tensor, expert: int) -> Tensor:
        if len(x_RK) == 1 and x_RK.dtype == torch.bfloat16 and not x_RK.is_cuda:
            return torch.mv(weight_ENK[expert], x_RK.view(-1)).unsqueeze(0)  # as `Linear` does, and why
        return linear(x_RK, weight_ENK[expert])

    return by_expert(x_MJK, experts_MC, weights_MC, weight_ENK.shape[1], gate, product)


def takes_few(x_MJK: Tensor) -> bool:
    """Whether the tokens are few, or must not wait for the host: they are written into a CUDA graph."""
    return len(x_MJK) <= FEW or torch.cuda.is_current_stream_capturing()


def by_expert(
    x_MJK: Tensor,
    experts_MC: Tensor,
    weights_MC: Tensor | None,
    N: int,
    gate: str | None,
    product: Product,
    scale_MJ1: Tensor | None = None,
) -> Tensor:
    """One product for each expert that is needed, with all tokens that were sent to it. `scale_MJ1`: of the rows of x,
    for what comes out. Waits for the device.
    """
    M, J, K = x_MJK.shape
    C = experts_MC.shape[1]
    x, scale = x_MJK.reshape(M * J, K), None if scale_MJ1 is None else scale_MJ1.reshape(M * J, 1)
    weights = None if weights_MC is None else weights_MC.reshape(M * C, 1)
    if weights is None:
        out = x.new_empty(M * C, N if gate is None else N // 2)
    else:
        out = torch.zeros(M, N, dtype=torch.float32, device=x.device)
    for expert, pairs, rows, tokens in _sent(experts_MC, J):
        y = product(x[rows], expert)
        if scale is not None:
            y = (y.float() * scale[rows]).to(x.dtype)
        y = finish(y, gate, None, 1.0)
        if weights is None:
            out[pairs] = y
        else:
            out[tokens] += y * weights[pairs]  # a token is sent to an expert once: no row comes twice
    return out.view(M, C, -1) if weights is None else out.to(x.dtype)


def _sent(experts_MC: Tensor, J: int) -> Iterator[tuple[int, Index, Index, Index]]:
    """Of each expert that is needed: its number, its pairs, their rows of x, their tokens."""
    M, C = experts_MC.shape
    if M == 1:
        for i, expert in enumerate(experts_MC[0].tolist()):
            one = slice(i, i + 1)
            yield expert, one, one if J > 1 else slice(0, 1), slice(0, 1)
        return
    flat = experts_MC.flatten()
    order = flat.argsort(stable=True)
    needed, counts = torch.unique_consecutive(flat[order], return_counts=True)
    for expert, pairs in zip(needed.tolist(), torch.split(order, counts.tolist()), strict=True):
        tokens = pairs // C
        yield expert, pairs, pairs if J > 1 else tokens, tokens


def by_pair(
    x_MJK: Tensor,
    weight_PNK: Tensor,
    weights_MC: Tensor | None,
    gate: str | None,
    scale_MJ1: Tensor | None = None,
) -> Tensor:
    """The products with a matrix for each pair, which somebody gathered: all on the device. `scale_MJ1` as in
    `by_expert`.
    """
    M, C = len(x_MJK), len(weight_PNK) // len(x_MJK)
    x_PK1 = x_MJK.expand(M, C, -1).reshape(M * C, -1, 1)
    y_MCN = torch.bmm(weight_PNK, x_PK1).view(M, C, -1)
    if scale_MJ1 is not None:
        y_MCN = (y_MCN.float() * scale_MJ1).to(y_MCN.dtype)
    return _joined(y_MCN, weights_MC, gate)


def groups_usable(x: Tensor, weight_ENK: Tensor) -> bool:
    """Whether `by_group` runs on x's device, in its dtype, with such matrices."""
    aligned = all(size % 8 == 0 for size in weight_ENK.shape[1:])
    return x.dtype == torch.bfloat16 and aligned and moe_kernels.has_grouped_product(x)


def by_group(
    x_MJK: Tensor, weight_ENK: Tensor, experts_MC: Tensor, weights_MC: Tensor | None, gate: str | None
) -> Tensor:
    """The tokens sorted by expert, and the library's product of groups of rows with a matrix each; on the device."""
    (M, J, K), C = x_MJK.shape, experts_MC.shape[1]
    flat, numbers = experts_MC.flatten(), torch.arange(len(weight_ENK), device=x_MJK.device)
    order = flat.argsort(stable=True)
    ends = torch.searchsorted(flat[order], numbers, right=True).to(torch.int32)
    x_PK = x_MJK.reshape(M * J, K)[order if J > 1 else order // C]
    y_PN = F.grouped_mm(x_PK, weight_ENK.transpose(1, 2), offs=ends)
    out = torch.empty_like(y_PN)
    out[order] = y_PN
    return _joined(out.view(M, C, -1), weights_MC, gate)


def _joined(y_MCN: Tensor, weights_MC: Tensor | None, gate: str | None) -> Tensor:
    """What comes after the products."""
    y = finish(y_MCN, gate, None, 1.0)
    return y if weights_MC is None else (y * weights_MC.unsqueeze(-1)).sum(1).to(y.dtype)


def shape_of(x_MJK: Tensor, N: int, experts_MC: Tensor, weights_MC: Tensor | None, gate: str | None) -> Tensor:
    """An empty tensor as the products give it."""
    M, C = experts_MC.shape
    return x_MJK.new_empty(M, N) if weights_MC is not None else x_MJK.new_empty(M, C, N if gate is None else N // 2)


def _shape(
    x_MJK: Tensor, weight: Tensor, experts_MC: Tensor, weights_MC: Tensor | None, num_experts: int, gate: str | None
) -> Tensor:
    return shape_of(x_MJK, weight.shape[0] // num_experts, experts_MC, weights_MC, gate)


expert_linear_op = register_op("expert_linear", expert_linear, _shape)
