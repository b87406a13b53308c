"""Rotary position embeddings: the frequencies of every scaling rule, and the rotation itself.

Pairs are (i, i + rotary_dim / 2), Transformers' half-rotation layout. Su et al., "RoFormer", arXiv:2104.09864.
"""

import math

import torch
from torch import Tensor

from model.config import RopeConfig


def rope_frequencies(
    rope: RopeConfig, head_dim: int, max_seq_len: int, max_position_embeddings: int
) -> tuple[Tensor, float]:
    """The inverse frequencies, float32 [rotary_dim / 2], and the factor that cosine and sine are multiplied by."""
    dim = int(head_dim * rope.partial_rotary_factor)
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    plain = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        return plain / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, plain), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, plain, dim, max_position_embeddings), attention_factor(rope, max_position_embeddings)
    if rope.kind == "longrope":
        original = rope.original_max_position_embeddings or max_position_embeddings
        factors = rope.long_factor if max_seq_len > original else rope.short_factor
        scale = attention_factor(rope, max_position_embeddings)
        return 1.0 / (torch.tensor(factors, dtype=torch.float32) * rope.theta**exponents), scale
    return plain, 1.0


def attention_factor(rope: RopeConfig, max_position_embeddings: int) -> float:
    """What YaRN and LongRoPE multiply cosine and sine by; 1.0 for the others."""
    if rope.kind not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    original = rope.original_max_position_embeddings or max_position_embeddings
    if rope.kind == "longrope":
        # Ding et al., "LongRoPE", arXiv:2402.13753; as published with Phi-3.
        return 1.0 if rope.factor <= 1.0 else math.sqrt(1 + math.log(rope.factor) / math.log(original))
    if rope.mscale and rope.mscale_all_dim:
        return _yarn_mscale(rope.factor, rope.mscale) / _yarn_mscale(rope.factor, rope.mscale_all_dim)
    return _yarn_mscale(rope.factor, 1.0)


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _llama3(rope: RopeConfig, plain: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between interpolated."""
    wavelengths = 2 * math.pi / plain
    original = rope.original_max_position_embeddings
    turns = original / wavelengths
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    between = (1 - smooth) * plain / rope.factor + smooth * plain
    scaled = torch.where(turns < rope.low_freq_factor, plain / rope.factor, between)
    return torch.where(turns > rope.high_freq_factor, plain, scaled)


def _yarn(rope: RopeConfig, plain: Tensor, dim: int, max_position_embeddings: int) -> Tensor:
    """YaRN's "NTK by parts" (Peng et al., arXiv:2309.00071, section 3.2)."""
    original = rope.original_max_position_embeddings or max_position_embeddings

    def dimension_of(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # no division by zero
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return plain / rope.factor * ramp + plain * (1 - ramp)


def cos_sin(frequencies: Tensor, positions_BT: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine at each position, float32 [B, T, 1, rotary_dim / 2]: cheaper to make than to keep."""
    angles = positions_BT[:, :, None, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if scale == 1.0 else (cos * scale, sin * scale)


def rotate(x_BTNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first rotary_dim entries of each head; in float32, rounded once."""
    half = cos.shape[-1]
    x = x_BTNH.float()
    first, second, rest = x[..., :half], x[..., half : 2 * half], x_BTNH[..., 2 * half :]
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BTNH.dtype)
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated
