"""The experts of a layer on quantized numbers: the module in the place of `model.moe_experts.ExpertLinear`, and its
product as a custom op. Each expert is a block of rows, of numbers as of scales.
"""

from typing import cast

import torch
from torch import Tensor

from model import kernels as model_kernels
from model.moe_experts import FEW, Stack, by_expert, by_pair, shape_of, takes_few
from model.ops import register_op
from model.tracing import is_tracing
from quant import activations, kernels, native, ops
from quant.formats import Activation, Format
from quant.modules import QuantizedRows


class QuantizedExpertLinear(QuantizedRows, Stack):
    """`model.moe_experts.ExpertLinear` on quantized numbers [E * N, K]; `N` of the module is all rows."""

    def __init__(
        self, num_experts: int, chosen: int, N: int, K: int, format: Format, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(N, K, format, dtype, device)
        self.num_experts, self.chosen = num_experts, chosen

    def forward(
        self, x_MJK: Tensor, experts_MC: Tensor, gate: str | None = None, weights_MC: Tensor | None = None
    ) -> Tensor:
        """As `model.moe_experts.ExpertLinear.forward` describes it."""
        form = self.format
        product = quantized_experts_op if is_tracing() else quantized_experts
        y: Tensor = product(
            x_MJK, self.values, self.scale, self.zero, experts_MC, weights_MC, self.num_experts, gate, form.bits,
            form.group_size, form.activation,
        )  # fmt: skip
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.chosen} of {self.num_experts}"


def quantized_experts(
    x_MJK: Tensor, values: Tensor, scale: Tensor, zero: Tensor | None, experts_MC: Tensor, weights_MC: Tensor | None,
    num_experts: int, gate: str | None, bits: int, group_size: int, activation: str | None,
) -> Tensor:  # fmt: skip
    """`QuantizedExpertLinear.forward`."""
    M, J, K = x_MJK.shape
    N = values.shape[0] // num_experts
    x, scale_MJ1 = x_MJK, None
    if activation is not None:
        numbers, scales = activations.quantize(x_MJK.reshape(M * J, K), cast(Activation, activation))
        x, scale_MJ1 = numbers.view(M, J, K), scales.view(M, J, 1)
    if x.is_cuda and takes_few(x):
        if fused_usable(x, "fp8" if values.is_floating_point() else "int"):
            # What is to be summed is not rounded before.
            dtype = x.dtype if weights_MC is None else torch.float32
            y_MCN = kernels.expert_gemv(
                x, scale_MJ1, values, scale, zero, experts_MC, num_experts, gate, bits, group_size, dtype
            )
            return y_MCN if weights_MC is None else (y_MCN * weights_MC.unsqueeze(-1)).sum(1).to(x.dtype)
        return _few(x, values, scale, zero, experts_MC, weights_MC, num_experts, gate, bits, group_size, scale_MJ1)

    def product(x_RK: Tensor, expert: int) -> Tensor:
        rows = slice(expert * N, (expert + 1) * N)
        its_zero = None if zero is None else zero[rows]
        return ops.quantized_linear(x_RK, values[rows], scale[rows], its_zero, None, K, bits, group_size)

    return by_expert(x, experts_MC, weights_MC, N, gate, product, scale_MJ1)


def _few(
    x_MJK: Tensor, values: Tensor, scale: Tensor, zero: Tensor | None, experts_MC: Tensor, weights_MC: Tensor | None,
    num_experts: int, gate: str | None, bits: int, group_size: int, scale_MJ1: Tensor | None,
) -> Tensor:  # fmt: skip
    """The same without our kernel: the weights of their experts alone are made. Many tokens go a few at a time, for the
    weights are there once for each pair.
    """
    M, _, K = x_MJK.shape

    def of(rows: Tensor, experts: Tensor) -> Tensor:
        return rows.view(num_experts, -1, rows.shape[1])[experts].flatten(0, 1)

    parts = []
    for start in range(0, M, FEW):
        some = slice(start, start + FEW)
        experts = experts_MC[some].flatten()
        its_zero = None if zero is None else of(zero, experts)
        weight = kernels.dequantize(
            of(values, experts), of(scale, experts), its_zero, K, bits, group_size, x_MJK.dtype
        ).view(len(experts), -1, K)
        its_scale = None if scale_MJ1 is None else scale_MJ1[some]
        its_weights = None if weights_MC is None else weights_MC[some]
        parts.append(by_pair(x_MJK[some], weight, its_weights, gate, its_scale))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def fused_usable(x: Tensor, kind: str) -> bool:
    """Whether `kernels.expert_gemv` runs on x's device, in its dtype, on such numbers."""
    return model_kernels.usable(x) and kernels.usable(x, kind)


def computed_by(form: Format, device: torch.device, dtype: torch.dtype) -> str:
    """What `quantized_experts` of one token comes down to, in words. Compiles nothing."""
    if device.type == "cpu" and (code := native.code_name()):
        return f"own kernel ({code})"
    one = torch.empty(1, dtype=dtype, device=device)
    return "own kernel (Triton)" if fused_usable(one, form.kind) else "PyTorch, the weight made anew"


def _shape(
    x_MJK: Tensor, values: Tensor, scale: Tensor, zero: Tensor | None, experts_MC: Tensor, weights_MC: Tensor | None,
    num_experts: int, gate: str | None, bits: int, group_size: int, activation: str | None,
) -> Tensor:  # fmt: skip
    return shape_of(x_MJK, values.shape[0] // num_experts, experts_MC, weights_MC, gate)


quantized_experts_op = register_op("quantized_experts", quantized_experts, _shape)
