"""Numbers of GGUF's quantized types -> float32, as they stand in the file: blocks of bytes with their own scales. Knows
tensors of bytes; not files.

The layouts are ggml's (ggml-quants.h). Each function takes blocks [n, bytes], on any device, gives [n, numbers], and
rounds as the `gguf` package does, which decodes the types that are not written here.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize as dequantize_by_package
from torch import Tensor

Kind = GGMLQuantizationType
PLAIN = {Kind.F64: torch.float64, Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
"""Types that are torch's own."""
BY_PACKAGE = frozenset(
    {
        *(Kind.IQ1_S, Kind.IQ1_M, Kind.IQ2_XXS, Kind.IQ2_XS, Kind.IQ2_S, Kind.IQ3_XXS, Kind.IQ3_S, Kind.IQ4_NL),
        *(Kind.IQ4_XS, Kind.TQ1_0, Kind.TQ2_0, Kind.MXFP4),
    }
)
"""Types that the package decodes, slower."""


def dequantize(rows: Tensor, kind: GGMLQuantizationType) -> Tensor:
    """Rows as stored, bytes [n, …] -> the numbers, float32 [n, …]."""
    if kind in BY_PACKAGE:
        with np.errstate(invalid="ignore", over="ignore"):  # of scales that are no numbers come none, and no warning
            return torch.from_numpy(dequantize_by_package(rows.cpu().numpy(), kind)).to(rows.device)
    blocks = rows.reshape(-1, GGML_QUANT_SIZES[kind][1])
    return DECODERS[kind](blocks).view(len(rows), -1)


def decoder(kind: GGMLQuantizationType) -> Callable[[Tensor], Tensor] | None:
    """`dequantize` of that type; None where nobody can."""
    return partial(dequantize, kind=kind) if kind in DECODERS or kind in BY_PACKAGE else None


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 that begins at byte `at` of each block: float32 [n, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _fields(data: Tensor, run: int, bits: int) -> Tensor:
    """Numbers of a few bits: of `run` bytes the lowest bits first, then those above. [n, m] -> [n, m * 8 / bits]."""
    runs = data.reshape(len(data), -1, run)
    mask = (1 << bits) - 1
    fields = [runs >> shift & mask for shift in range(0, 8 - bits, bits)] + [runs >> (8 - bits)]
    return torch.stack(fields, dim=2).flatten(1)


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_fields(blocks[:, 2:], 16, 4).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _fields(blocks[:, 4:], 16, 4).float() + _half(blocks, 2)


def _fifth_bits(data: Tensor) -> Tensor:
    """Four bytes as 32 bits, in the place of the fifth bit of a number."""
    places = torch.arange(8, dtype=torch.uint8, device=data.device)
    return ((data.unsqueeze(2) >> places) & 1).flatten(1) << 4


def _q5_0(blocks: Tensor) -> Tensor:
    numbers = _fields(blocks[:, 6:], 16, 4) | _fifth_bits(blocks[:, 2:6])
    return _half(blocks, 0) * (numbers.float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    numbers = _fields(blocks[:, 8:], 16, 4) | _fifth_bits(blocks[:, 4:8])
    return _half(blocks, 0) * numbers.float() + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float() * _half(blocks, 0)


def _scaled(numbers: Tensor, scales: Tensor, minima: Tensor | None = None) -> Tensor:
    """Numbers [n, 256] in as many groups as there are scales [n, g], each times its own and less its minimum."""
    grouped = numbers.view(*scales.shape, -1).float() * scales.unsqueeze(2)
    return (grouped if minima is None else grouped.sub_(minima.unsqueeze(2))).flatten(1)


def _q2_k(blocks: Tensor) -> Tensor:
    scales, d, dmin = blocks[:, :16], _half(blocks, 80), _half(blocks, 82)
    return _scaled(_fields(blocks[:, 16:80], 32, 2), d * (scales & 15).float(), dmin * (scales >> 4).float())


def _q3_k(blocks: Tensor) -> Tensor:
    # Six bits of each of 16 scales: four in eight bytes, then two in four.
    scales = _fields(blocks[:, 96:104], 8, 4) | _fields(blocks[:, 104:108], 4, 2) << 4
    numbers = _fields(blocks[:, 32:96], 32, 2).to(torch.int8)
    # Where the bit of the mask is not set, four less.
    numbers -= (_fields(blocks[:, :32], 32, 1) ^ 1).to(torch.int8) << 2
    return _scaled(numbers, _half(blocks, 108) * (scales.float() - 32))


def _scales_and_minima(data: Tensor) -> tuple[Tensor, Tensor]:
    """Eight of each, of six bits, in twelve bytes."""
    low, high, rest = data[:, :4], data[:, 4:8], data[:, 8:]
    scales = torch.cat((low & 63, (rest & 15) | (low >> 6 << 4)), dim=1)
    minima = torch.cat((high & 63, (rest >> 4) | (high >> 6 << 4)), dim=1)
    return scales.float(), minima.float()


def _q4_k(blocks: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    return _scaled(_fields(blocks[:, 16:], 32, 4), _half(blocks, 0) * scales, _half(blocks, 2) * minima)


def _q5_k(blocks: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    numbers = _fields(blocks[:, 48:], 32, 4) | _fields(blocks[:, 16:48], 32, 1) << 4
    return _scaled(numbers, _half(blocks, 0) * scales, _half(blocks, 2) * minima)


def _q6_k(blocks: Tensor) -> Tensor:
    numbers = _fields(blocks[:, :128], 64, 4) | _fields(blocks[:, 128:192], 32, 2) << 4
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    return _scaled(numbers.to(torch.int8) - 32, _half(blocks, 208) * scales)


DECODERS: dict[GGMLQuantizationType, Callable[[Tensor], Tensor]] = {
    Kind.Q4_0: _q4_0,
    Kind.Q4_1: _q4_1,
    Kind.Q5_0: _q5_0,
    Kind.Q5_1: _q5_1,
    Kind.Q8_0: _q8_0,
    Kind.Q2_K: _q2_k,
    Kind.Q3_K: _q3_k,
    Kind.Q4_K: _q4_k,
    Kind.Q5_K: _q5_k,
    Kind.Q6_K: _q6_k,
}
