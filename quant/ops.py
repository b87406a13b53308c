"""The product with a quantized weight as custom ops, and which way of computing it is the fastest here. Each has plain
PyTorch to fall back on. Knows tensors; `quant.packed` says what they hold.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model import kernels as model_kernels
from model.ops import register_op
from model.products import multiplies
from quant import kernels, matmul, native
from quant.formats import Format
from quant.packed import dequantize

NATIVE_ROWS = 16
"""Up to so many rows the CPU kernel, which reads the numbers as they are, is faster than making a weight of them."""
PANEL_BYTES = 2**20
"""The CPU multiplies many rows with a panel of the weight at a time, which so never leaves the cache."""


def quantized_linear(
    x: Tensor, values: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, K: int, bits: int,
    group_size: int,
) -> Tensor:  # fmt: skip
    """x [M, K] @ weight.T + bias, [M, N] in x's dtype."""
    if x.is_cuda:
        if x.shape[0] == 1 and fused_usable(x, "fp8" if values.is_floating_point() else "int", bits):
            return kernels.gemv(
                x.reshape(-1), values, scale, zero, None, bias, None, None, 0.0, False, 1.0, bits, group_size
            ).unsqueeze(0)
        if matmul.usable(x, "fp8" if values.is_floating_point() else "int", bits):
            return matmul.matmul(x, values, scale, zero, bias, K, bits, group_size)
        weight = kernels.dequantize(values, scale, zero, K, bits, group_size, x.dtype)
        return F.linear(x, weight, bias)
    if x.device.type != "cpu":
        return F.linear(x, dequantize(values, scale, zero, K, bits, group_size, x.dtype), bias)
    x = x.contiguous()
    if x.shape[0] <= NATIVE_ROWS and native.available():
        return native.linear(x, values, scale, zero, bias, K, bits, group_size)
    return _by_panels(x, values, scale, zero, bias, K, bits, group_size)


def computed_by(form: Format, device: torch.device, dtype: torch.dtype) -> str:
    """What `quantized_linear` of one row comes down to, in words. Compiles nothing."""
    one = torch.empty(1, dtype=dtype, device=device)
    if device.type == "cpu" and (code := native.code_name()):
        return f"own kernel ({code})"
    return "own kernel (Triton)" if fused_usable(one, form.kind, form.bits) else "PyTorch, the weight made anew"


def _by_panels(
    x: Tensor, values: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, K: int, bits: int,
    group_size: int,
) -> Tensor:  # fmt: skip
    N = values.shape[0]
    y = torch.empty(x.shape[0], N, dtype=x.dtype)
    x = x if multiplies(x.dtype) else x.float()
    step = max(64, PANEL_BYTES // (K * x.dtype.itemsize) // 32 * 32)
    for start in range(0, N, step):
        stop = min(N, start + step)
        if native.available():
            panel = native.dequantize(values, scale, zero, K, bits, group_size, x.dtype, start, stop)
        else:
            its_zero = None if zero is None else zero[start:stop]
            panel = dequantize(values[start:stop], scale[start:stop], its_zero, K, bits, group_size, x.dtype)
        y[:, start:stop] = F.linear(x, panel, None if bias is None else bias[start:stop].to(x.dtype))
    return y


def fused_usable(x: Tensor, kind: str, bits: int) -> bool:
    """Whether `kernels.gemv` runs on x's device, in its dtype, on such numbers."""
    return bits in (8, 4) and model_kernels.usable(x) and kernels.usable(x, kind)


def _linear_shape(x: Tensor, values: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], values.shape[0])


def _gemv_shape(
    x: Tensor, values: Tensor, scale: object, zero: object, norm: object, bias: object, residual: object,
    gate: str | None, *_: object,
) -> Tensor:  # fmt: skip
    return x.new_empty(values.shape[0] if gate is None else values.shape[0] // 2)


quantized_linear_op = register_op("quantized_linear", quantized_linear, _linear_shape)
fused_gemv_op = register_op("quantized_gemv", kernels.gemv, _gemv_shape, "CUDA")
