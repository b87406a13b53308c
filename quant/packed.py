"""Quantized numbers in memory: packing several into a byte, and what weight they stand for. Plain PyTorch, on every
device; the fast kernels read the same layout. Knows tensors; not which scheme chose the numbers.

A weight [N, K] is `values`, `scale` [N, G] and perhaps `zero` [N, G], one of each for the `group_size` numbers of a row
that share them (0: all of a row): weight = (number - zero) * scale. Numbers of 8 bits are int8, or float8_e4m3fn, [N,
K]. Smaller ones are codes, number + 2**(bits - 1), in blocks of 64 bytes, which hold 512 / bits of them: 32 little-
endian 16-bit words, of which word i has the numbers 32 * j + i of the block at its bits `bits * j`. So a vector of
words, shifted, gives numbers that lie side by side. The last block of a row is filled up with the code of 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

WORDS = 32
"""16-bit words in a block."""


def block_numbers(bits: int) -> int:
    """How many numbers a block holds."""
    return WORDS * 16 // bits


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Signed numbers, int8 [N, K], as codes of `bits` (4, 2 or 1): uint8 [N, blocks * 64]."""
    N, K = numbers.shape
    codes = (numbers + (1 << (bits - 1))).to(torch.uint8)
    codes = F.pad(codes, (0, -K % block_numbers(bits)), value=1 << (bits - 1))
    codes = codes.view(N, -1, 2, 8 // bits, WORDS)  # [.., byte of the word, number of the byte, word]
    packed = codes[:, :, :, 0]
    for j in range(1, 8 // bits):
        packed = packed | codes[:, :, :, j] << (bits * j)
    return packed.transpose(2, 3).reshape(N, -1)


def unpack(values: Tensor, K: int, bits: int) -> Tensor:
    """The inverse of `pack`, of rows of any shape: uint8 [..., blocks * 64] -> int8 [..., K]."""
    packed = values.view(*values.shape[:-1], -1, WORDS, 2).transpose(-1, -2)  # [.., block, byte of the word, word]
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
