"""Our own CUDA kernels, written in Triton, each with a plain fallback elsewhere. Knows tensors, nothing of models.

They are `triton_op`s: the compiler sees into them, and eager code calls them as they are.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False


def usable(x: Tensor) -> bool:
    """Whether the kernels run on x's device."""
    return HAS_TRITON and x.is_cuda


def decode_attention(q_BNH, keys, values, start_B, slots_B, scale, window, softcap):
    raise AssertionError
