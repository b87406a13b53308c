"""Products of a few rows with quantized weights on CUDA: between the one row of `quant.kernels.gemv` and the many for
which a weight is worth making. Knows tensors; `quant.packed` says what they hold.
"""

from typing import Any

import torch
from torch import Tensor

from model.kernels import HAS_TRITON, next_power_of_2
from quant import kernels

if HAS_TRITON:
    from quant import triton_matmul

MAX_ROWS = 64
"""Up to so many rows this is faster than making a weight of 16 bits, writing it and reading it again."""


def usable(x: Tensor, kind: str, bits: int) -> bool:
    """Whether `matmul` takes these rows x [M, K], and such numbers, and is worth it."""
    return x.dtype.itemsize == 2 and bits in (8, 4) and 1 < x.shape[0] <= MAX_ROWS and kernels.usable(x, kind)


def matmul_config(M: int, N: int, bits: int) -> dict[str, int]:
    """Block sizes and warps, from measurements on an H200 (docs/benchmarks.md)."""
    rows = max(16, next_power_of_2(M))
    if bits == 8:
        wide = N >= 16384 and rows > 16
        block = (64, 128) if wide else (32, 256) if N > 2048 else (16, 256)
        stages = 5 if rows <= 32 else 3
    else:
        block = (64, 128) if N >= 16384 else (16, 128) if N >= 6144 else (32, 256) if N > 2048 else (16, 256)
        stages = 3
    return {"BLOCK_M": rows, "BLOCK_N": block[0], "BLOCK_K": block[1], "num_warps": 4, "num_stages": stages}


def matmul(
    x: Tensor, values: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, K: int, bits: int,
    group_size: int,
) -> Tensor:  # fmt: skip
    """x [M, K] @ weight.T + bias, [M, N] in x's dtype: the sums of `F.linear` with `quant.packed.dequantize`'s weight,
    where a row of it has but one scale with that outside of the sum.
    """
    x = x.contiguous()
    M, N, groups = x.shape[0], values.shape[0], scale.shape[1]
    out = torch.empty(M, N, dtype=x.dtype, device=x.device)
    config = matmul_config(M, N, bits)
    grid = (-(-N // config["BLOCK_N"]), -(-M // config["BLOCK_M"]))
    group = group_size if groups > 1 or zero is not None else 0
    if zero is not None and not group_size:
        group = max(32, next_power_of_2(K))
    same: dict[str, Any] = {"GROUP": group, "ZERO": zero is not None, "BIAS": bias is not None}
    block = config["BLOCK_K"]
    if bits == 8:
        triton_matmul.matmul_8bit_kernel[grid](
            x, values, scale, zero, bias, out, M, N, K, groups, -(-K // block), EVEN_K=K % block == 0, **same, **config
        )
    else:
        words = values.view(torch.int32)
        triton_matmul.matmul_4bit_kernel[grid](
            x, words, scale, zero, bias, out, M, N, K, words.shape[1], groups, -(-K // block),
            EVEN_K=K % block == 0, **same, **config,
        )  # fmt: skip
    return out
