"""Our CUDA kernels for quantized weights: how they are launched. Knows tensors; `quant.ops` says when to take them."""

import functools
from typing import Any

import torch
from torch import Tensor

from model.kernels import GATES, HAS_TRITON, next_power_of_2, overlaps
from quant import packed

if HAS_TRITON:
    from quant import triton_experts, triton_kernels

DEQUANTIZE_BLOCK = 1024


def usable(x: Tensor, kind: str) -> bool:
    """Whether the kernels take numbers of this kind on x's device."""
    if not HAS_TRITON or not x.is_cuda or torch.version.hip is not None:  # NVIDIA's own instructions are in them
        return False
    return kind == "int" or _has_float8(x.device.index or 0)


@functools.cache
def _has_float8(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 9)


def gemv_config(N: int, K: int, bits: int, gated: bool) -> dict[str, int]:
    """Block sizes and warps for a weight of N outputs (twice as many rows with a gate), the best of those tried on an
    H200 with the shapes of Llama 1B and 8B (docs/benchmarks.md).
    """
    if bits == 8:
        if gated:
            rows, columns, warps = (4, 4096, 4) if K >= 4096 else (4, 1024, 2)
        elif N > 4096:
            rows, columns, warps = 8, 1024, 2
        else:
            rows, columns, warps = (4, 2048, 4) if K > N else (4, 1024, 2)
        return {"BLOCK_N": rows, "BLOCK_K": min(columns, max(16, next_power_of_2(K))), "num_warps": warps}
    words = next_power_of_2(-(-K // 32) * 4)
    words = words if words <= 1024 else 512
    return {"BLOCK_N": 16 if N >= 65536 else 8, "BLOCK_W": words, "num_warps": max(1, words // 128)}


def gemv(
    x: Tensor, values: Tensor, scale: Tensor, zero: Tensor | None, norm: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, gate: str | None, eps: float, plus_one: bool, multiplier: float, bits: int,
    group_size: int,
) -> Tensor:  # fmt: skip
    """`model.kernels.gemv` with a weight of 8 or 4 bits a number."""
    rows, K = values.shape[0], x.numel()
    N = rows if gate is None else rows // 2
    out = torch.empty(N, dtype=x.dtype, device=x.device)
    config = gemv_config(N, K, bits, gate is not None)
    overlap = overlaps(x)
    extra: dict[str, Any] = {"launch_pdl": True} if overlap else {}
    grid = (-(-N // config["BLOCK_N"]),)
    same: dict[str, Any] = {
        "GROUP": group_size if scale.shape[1] > 1 or zero is not None else 0,
        "ZERO": zero is not None, "NORM": norm is not None, "PLUS_ONE": plus_one, "BIAS": bias is not None,
        "RESIDUAL": residual is not None, "GATE": GATES[gate], "OVERLAP": overlap,
    }  # fmt: skip
    if zero is not None and not group_size:
        same["GROUP"] = max(32, next_power_of_2(K))
    groups = scale.shape[1]
    if bits == 8:
        triton_kernels.gemv_8bit_kernel[grid](
            x, values, scale, zero, norm, bias, residual, out, N, K, groups, eps, multiplier,
            STEPS=-(-K // config["BLOCK_K"]), **same, **config, **extra,
        )  # fmt: skip
    else:
        words = values.view(torch.int32)
        triton_kernels.gemv_4bit_kernel[grid](
            x, words, scale, zero, norm, bias, residual, out, N, K, words.shape[1], groups, eps, multiplier,
            STEPS=-(-words.shape[1] // config["BLOCK_W"]), HALVES=x.dtype.itemsize == 2, **same, **config, **extra,
        )  # fmt: skip
    return out


def expert_gemv_config(words: int, bits: int) -> dict[str, int]:
    """Block sizes and warps for rows of so many words: numbers of 8 bits, or 32 bits of smaller ones."""
    rows, most = (4, 1024) if bits == 8 else (8, 256)
    return {"BLOCK_N": rows, "BLOCK_W": min(most, max(16, next_power_of_2(words))), "num_warps": 4}


def expert_gemv(
    x_MJK: Tensor, scale_MJ1: Tensor | None, values: Tensor, scale: Tensor, zero: Tensor | None, experts_MC: Tensor,
    num_experts: int, gate: str | None, bits: int, group_size: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Each token times the matrices of its experts, `quant.experts` says how; [M, C, N] in `dtype`, or half of them
    with a gate. `scale_MJ1`, float32: of the rows of x. Which experts are read is known on the device alone.
    """
    x, experts = x_MJK.contiguous(), experts_MC.contiguous()
    (M, J, K), C, rows = x.shape, experts.shape[1], values.shape[0] // num_experts
    N = rows if gate is None else rows // 2
    words = values if bits == 8 else values.view(torch.int32)
    config = expert_gemv_config(words.shape[1], bits)
    overlap = overlaps(x)
    extra: dict[str, Any] = {"launch_pdl": True} if overlap else {}
    out = torch.empty(M, C, N, dtype=dtype, device=x.device)
    triton_experts.expert_gemv_kernel[(-(-N // config["BLOCK_N"]), M * C)](
        x, None if scale_MJ1 is None else scale_MJ1.contiguous(), words, scale, zero, experts, out, N, K, rows,
        words.shape[1], scale.shape[1], group_size or max(32, next_power_of_2(K)), SHARE=C if J == 1 else 1, BITS=bits,
        ZERO=zero is not None, SCALED=scale_MJ1 is not None, GATE=GATES[gate],
        STEPS=-(-words.shape[1] // config["BLOCK_W"]), OVERLAP=overlap, **config, **extra,
    )  # fmt: skip
    return out


def dequantize(
    values: Tensor, scale: Tensor, zero: Tensor | None, K: int, bits: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    """`quant.packed.dequantize` of a weight [N, K] on a GPU, in one pass."""
    if not usable(values, "fp8" if values.is_floating_point() else "int"):
        return packed.dequantize(values, scale, zero, K, bits, group_size, dtype)
    out = torch.empty(values.shape[0], K, dtype=dtype, device=values.device)
    triton_kernels.dequantize_kernel[(values.shape[0], -(-K // DEQUANTIZE_BLOCK))](
        values, scale, zero, out, K, values.shape[1], scale.shape[1], group_size or K,
        BITS=bits, ZERO=zero is not None, BLOCK_K=DEQUANTIZE_BLOCK, num_warps=4,
    )  # fmt: skip
    return out
