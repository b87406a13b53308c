"""Quantized numbers in memory: packing several into a byte, and what weight they stand for. Plain PyTorch, on every
device; the fast kernels read the same layout. Knows tensors; not which scheme chose the numbers.

A weight [N, K] is `values`, `scale` [N, G] and perhaps `zero` [N, G], one of each for the `group_size` numbers of a row
that share them (0: all of a row): weight = (number - zero) * scale. Numbers of 8 bits are int8, or float8_e4m3fn, [N,
K]. Smaller ones are codes, number + 2**(bits - 1). 32 neighbours take `bits` little-endian words of 32 bits: number k
of them is in word k % bits, at its bits k // bits * bits. So words, shifted by the same, give numbers that lie side by
side, and all that a thread of a GPU reads at once has one scale. The last 32 of a row are filled up with the code of 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.formats import RUN


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Signed numbers, int8 [N, K], as codes of `bits` (4, 2 or 1): uint8 [N, runs * 4 * bits]."""
    N, K = numbers.shape
    codes = (numbers + (1 << (bits - 1))).to(torch.uint8)
    codes = F.pad(codes, (0, -K % RUN), value=1 << (bits - 1))
    codes = codes.view(N, -1, 4, 8 // bits, bits)  # [.., byte of the word, code of the byte, word]
    packed = codes[:, :, :, 0]
    for j in range(1, 8 // bits):
        packed = packed | codes[:, :, :, j] << (bits * j)
    return packed.transpose(2, 3).reshape(N, -1)


def unpack(values: Tensor, K: int, bits: int) -> Tensor:
    """The inverse of `pack`, of rows of any shape: uint8 [..., runs * 4 * bits] -> int8 [..., K]."""
    packed = values.view(*values.shape[:-1], -1, bits, 4).transpose(-1, -2)  # [.., run, byte of the word, word]
    mask = (1 << bits) - 1
    codes = torch.stack([packed >> (bits * j) & mask for j in range(8 // bits)], dim=-2)
    return (codes.flatten(-4)[..., :K].to(torch.int8) - (1 << (bits - 1))).contiguous()


def dequantize(
    values: Tensor, scale: Tensor, zero: Tensor | None, K: int, bits: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    """The weight that the numbers stand for, [..., K]: exact but for one rounding to `dtype`."""
    numbers = (values if bits == 8 else unpack(values, K, bits)).to(dtype)
    size = group_size or K
    if K % size:
        numbers = F.pad(numbers, (0, -K % size))
    grouped = numbers.view(*numbers.shape[:-1], -1, size)
    if zero is not None:
        grouped = grouped - zero.to(dtype).unsqueeze(-1)
    return (grouped * scale.to(dtype).unsqueeze(-1)).flatten(-2)[..., :K]
