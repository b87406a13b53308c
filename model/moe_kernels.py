"""Our own CUDA kernels for the experts of a layer: how they are launched. Knows tensors; `model.moe_experts` says when
to take them. Which experts a token needs is read on the device, so that a step can be one CUDA graph.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from model.kernels import GATES, HAS_TRITON, next_power_of_2, overlaps

if HAS_TRITON:
    from model import moe_triton


def has_grouped_product(x: Tensor) -> bool:
    """Whether the library multiplies groups of rows with a matrix each on x's device, without waiting for the host."""
    return x.is_cuda and torch.version.hip is None and _capability(x.device.index or 0) >= (9, 0)


@functools.cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def gemv_config(K: int) -> dict[str, int]:
    """Block sizes and warps, those of `model.kernels.gemv_config`."""
    return {"BLOCK_N": 4, "BLOCK_K": min(512, next_power_of_2(K)), "num_warps": 4}


def gemv(
    x_MJK: Tensor, weight_ENK: Tensor, experts_MC: Tensor, weights_MC: Tensor | None, gate: str | None
) -> Tensor:
    """`model.moe_experts.ExpertLinear.forward`: of each pair the rows of its expert, read where they are."""
    x, experts = x_MJK.contiguous(), experts_MC.contiguous()
    (M, J, K), C, rows = x.shape, experts.shape[1], weight_ENK.shape[1]
    N = rows if gate is None else rows // 2
    config = gemv_config(K)
    overlap = overlaps(x)
    extra: dict[str, Any] = {"launch_pdl": True} if overlap else {}
    blocks = -(-N // config["BLOCK_N"])
    even = K % config["BLOCK_K"] == 0
    if weights_MC is None:
        out = torch.empty(M, C, N, dtype=x.dtype, device=x.device)
        moe_triton.expert_gemv_kernel[(blocks, M * C)](
            x, weight_ENK, experts, out, N, K, rows, SHARE=C if J == 1 else 1, GATE=GATES[gate], EVEN_K=even,
            OVERLAP=overlap, **config, **extra,
        )  # fmt: skip
        return out
    assert gate is None
    assert J == C
    out = torch.empty(M, N, dtype=x.dtype, device=x.device)
    moe_triton.expert_sum_kernel[(blocks, M)](
        x, weight_ENK, experts, weights_MC.contiguous(), out, N, K, C=C, STEPS=-(-K // config["BLOCK_K"]), EVEN_K=even,
        OVERLAP=overlap, **config, **extra,
    )  # fmt: skip
    return out
