"""Matrix products of many rows on a processor without instructions for them in 16 bits: there PyTorch multiplies number
by number, many times slower than in float32. Knows tensors alone.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops import register_op
from model.tracing import is_portable, is_tracing

WIDE_ROWS = 8
"""From so many rows on, a weight is worth being made float32 for them."""
PANEL_BYTES = 2**20
"""A panel of the weight at a time is made float32, which so never leaves the cache."""


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether PyTorch has this processor multiply matrices of `dtype` by instructions made for it."""
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    supported = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return bool(getattr(torch.ops.mkldnn, supported)())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, on any device."""
    if x.device.type != "cpu" or multiplies(x.dtype) or is_portable():
        return F.linear(x, weight, bias)
    product = _linear_by_panels_op if is_tracing() else linear_by_panels
    y: Tensor = product(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def linear_by_panels(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [M, K] @ weight.T + bias, [M, N] in x's dtype, the sums in float32."""
    (M, K), N = x.shape, weight.shape[0]
    if M < WIDE_ROWS:
        return F.linear(x, weight, bias)
    y, wide = torch.empty(M, N, dtype=x.dtype), x.float()
    step = max(32, PANEL_BYTES // (4 * K) // 32 * 32)
    for start in range(0, N, step):
        rows = slice(start, start + step)
        y[:, rows] = F.linear(wide, weight[rows].float(), None if bias is None else bias[rows].float())
    return y


def _shape(x: Tensor, weight: Tensor, bias: object) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


_linear_by_panels_op = register_op("linear_by_panels", linear_by_panels, _shape)
