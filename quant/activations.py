"""Dynamic quantization of a linear layer's inputs: each token gets a scale of its own. Knows tensors only."""

import torch
from torch import Tensor

from quant.formats import Activation

FP8_MAX = 448.0
"""The largest float8_e4m3fn."""


def quantize(x_MK: Tensor, kind: Activation) -> tuple[Tensor, Tensor]:
    """Numbers [M, K] in x's dtype, which holds each of them exactly, and their scales, float32 [M, 1]; x is about
    numbers * scale. The choices are torchao's (`choose_qparams_affine`, `_choose_scale_float8`).
    """
    x = x_MK.float()
    eps = torch.finfo(torch.float32).eps
    if kind == "fp8":
        scale = (x.abs().amax(-1, keepdim=True) / FP8_MAX).clamp_min(eps)
        numbers = (x / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(x_MK.dtype)
    elif kind == "int8-symmetric":
        scale = (x.abs().amax(-1, keepdim=True) / 127.5).clamp_min(eps)
        numbers = (x / scale).round().clamp(-128, 127).to(x_MK.dtype)
    else:
        low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
        scale = ((high - low) / 255).clamp_min(eps)
        zero = (-128 - (low / scale).round()).clamp(-128, 127)
        # At most 255 in size, which bfloat16 still holds.
        numbers = ((x / scale).round() + zero).clamp(-128, 127).sub(zero).to(x_MK.dtype)
    if x_MK.dtype == torch.float16:
        # As exact, and sums of products stay in float16's reach, which those of numbers up to 448 may leave.
        return numbers / 256, scale * 256
    return numbers, scale
