"""Our own CUDA kernels as custom ops: what decoding spends its time in. Knows tensors, no models.

They are written in Triton. Each has a plain PyTorch equal in `model.layers` or `model.attention`, which runs wherever
`usable` says no.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from model.ops import register_op

try:
    from model import triton_kernels
except ImportError:  # CPU and MPS builds of torch come without Triton
    HAS_TRITON = False
else:
    HAS_TRITON = True

CAPABILITIES = {torch.bfloat16: (8, 0), torch.float16: (7, 0), torch.float32: (7, 0)}
"""The dtypes that the kernels take, and the first compute capability that has them."""


def usable(x: Tensor) -> bool:
    """Whether the kernels run on x's device and dtype."""
    needed = CAPABILITIES.get(x.dtype)
    return HAS_TRITON and x.is_cuda and needed is not None and _capability(x.device.index or 0) >= needed


@functools.cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def overlaps(x: Tensor) -> bool:
    """Programmatic dependent launch: a kernel starts, and reads its weights, while the one before it still ends."""
    return _capability(x.device.index or 0) >= (9, 0) and torch.version.hip is None


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


GATES = {None: 0, "silu": 1, "gelu_tanh": 2, "gelu": 3}


def gemv_config(K: int) -> dict[str, int]:
    """Block sizes and warps of the matrix-vector kernel, from measurements on an H200 (docs/benchmarks.md)."""
    return {"BLOCK_N": 4, "BLOCK_K": min(512, next_power_of_2(K)), "num_warps": 4}


def gemv(
    x: Tensor,
    weight: Tensor,
    norm: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: str | None,
    eps: float,
    plus_one: bool,
    multiplier: float,
) -> Tensor:
    """weight [N, K] times one row x [K], with what stands around it: RMSNorm of x (its weight `norm`, `eps`,
    `plus_one`), `bias`, the gated activation `gate` (weight is then [2N, K]: gate rows, then up rows), and `residual` +
    `multiplier` * y.
    """
    rows, K = weight.shape
    N = rows if gate is None else rows // 2
    out = torch.empty(N, dtype=x.dtype, device=x.device)
    config = gemv_config(K)
    overlap = overlaps(x)
    extra: dict[str, Any] = {"launch_pdl": True} if overlap else {}
    triton_kernels.gemv_kernel[(-(-N // config["BLOCK_N"]),)](
        x, weight, norm, bias, residual, out, N, K, eps, multiplier,
        NORM=norm is not None, PLUS_ONE=plus_one, BIAS=bias is not None, RESIDUAL=residual is not None,
        GATE=GATES[gate], EVEN_K=K % config["BLOCK_K"] == 0, OVERLAP=overlap, **config, **extra,
    )  # fmt: skip
    return out


def flash_decode(
    q_B1NH: Tensor,
    k_B1KH: Tensor,
    v_B1KH: Tensor,
    keys: Tensor,
    values: Tensor,
    start_B: Tensor,
    slots_B: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """`model.attention.attend` of one new token a row; [B, 1, N, H]. Rotates queries and keys, writes keys and values
    into the cache and attends to what is filled of it (Flash-Decoding: the context is split among the multiprocessors,
    and the parts are joined by their softmax statistics).

    Three launches. In one, where the last program to end joins the parts, most contexts took longer on an H200: an
    atomic counter and what it orders cost more than the end of a kernel whose successor was launched already.
    """
    q_B1NH, k_B1KH, v_B1KH = (_heads_side_by_side(x) for x in (q_B1NH, k_B1KH, v_B1KH))
    B, _, N, H = q_B1NH.shape
    _, K, S, _ = keys.shape
    splits = decode_splits(q_B1NH.device.index or 0, B * K)
    block_h = max(16, next_power_of_2(H))
    q_BNH = torch.empty(B, N, H, dtype=q_B1NH.dtype, device=q_B1NH.device)
    parts = torch.empty(B * N, splits, H, dtype=torch.float32, device=q_B1NH.device)
    stats = torch.empty(B * N, splits, 2, dtype=torch.float32, device=q_B1NH.device)
    out = torch.empty(B, 1, N, H, dtype=q_B1NH.dtype, device=q_B1NH.device)
    overlap = overlaps(q_B1NH)
    extra: dict[str, Any] = {"launch_pdl": True} if overlap else {}
    triton_kernels.rotate_and_store_kernel[(B, N + 2 * K)](
        q_B1NH, k_B1KH, v_B1KH, cos, sin, q_BNH, keys, values, start_B, slots_B, q_B1NH.stride(0), k_B1KH.stride(0),
        v_B1KH.stride(0), S, N=N, K=K, H=H, HALF=0 if cos is None else cos.shape[-1],
        BLOCK_H=next_power_of_2(H), OVERLAP=overlap, num_warps=1, **extra,
    )  # fmt: skip
    triton_kernels.attend_part_kernel[(B, K, splits)](
        q_BNH, keys, values, start_B, slots_B, parts, stats, scale, window or 0, softcap or 0.0, S,
        K_HEADS=K, G=N // K, H=H, BLOCK_G=max(16, next_power_of_2(N // K)), BLOCK_H=block_h, BLOCK_S=32,
        SPLITS=splits, WINDOW=window is not None, SOFTCAP=softcap is not None, OVERLAP=overlap, num_warps=4, **extra,
    )  # fmt: skip
    triton_kernels.attend_join_kernel[(B * N,)](
        parts, stats, out, H=H, BLOCK_H=block_h, SPLITS=splits, OVERLAP=overlap, num_warps=4, **extra
    )
    return out


def decode_splits(device: int, programs: int) -> int:
    """Into how many parts the context is split, for each of `programs` pairs of a row and a head of keys."""
    # One program a multiprocessor: more parts would cost more to join than they win.
    share = max(1, _multiprocessors(device) // programs)
    return min(64, 1 << (share.bit_length() - 1))


def _heads_side_by_side(x_B1NH: Tensor) -> Tensor:
    """The same, its rows apart by any stride but each of them one piece."""
    one_piece = x_B1NH.stride(3) == 1 and (x_B1NH.shape[2] == 1 or x_B1NH.stride(2) == x_B1NH.shape[3])
    return x_B1NH if one_piece else x_B1NH.contiguous()


def _gemv_shape(
    x: Tensor, weight: Tensor, norm: object, bias: object, residual: object, gate: str | None, *_: object
) -> Tensor:
    return x.new_empty(weight.shape[0] if gate is None else weight.shape[0] // 2)


def _flash_decode_shape(q_B1NH: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q_B1NH, memory_format=torch.contiguous_format)


gemv_op = register_op("gemv", gemv, _gemv_shape, "CUDA")
flash_decode_op = register_op("flash_decode", flash_decode, _flash_decode_shape, "CUDA", mutates=("keys", "values"))
