"""Quantized layers for ExecuTorch: the same numbers, in the patterns of operators that XNNPACK knows as its own
kernels. Written down once, when a model is exported; knows layers, not how a model is exported.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.formats import Format
from quant.modules import QuantizedEmbedding, QuantizedLinear
from quant.packed import unpack

LINEAR, EMBEDDING = "linear:a8w4dq", "embedding"
SCHEMES = (LINEAR, EMBEDDING)
"""What of a recipe has kernels there."""

Q8 = (torch.int8, -128, 127)
Q4 = (torch.int8, -8, 7)


class PortableLinear(QuantizedLinear):
    """A layer of `linear:a8w4dq`."""

    numbers: Tensor
    zeros: Tensor

    def __init__(self, layer: QuantizedLinear) -> None:
        nn.Module.__init__(self)
        self.N, self.K, self.format = layer.N, layer.K, layer.format
        self.register_parameter("bias", layer.bias)
        self.register_buffer("numbers", unpack(layer.values, layer.K, 4))
        self.register_buffer("scales", layer.scale.detach())
        self.register_buffer("zeros", torch.zeros_like(layer.scale, dtype=torch.int8))

    def _product(self, x_MK: Tensor) -> Tensor:
        ao: Any = torch.ops.torchao
        token, group = (1, self.K), (1, self.format.group_size)
        scale, zero = ao.choose_qparams_affine(x_MK, "ASYMMETRIC", token, *Q8, None, None, torch.int8)
        numbers = ao.quantize_affine(x_MK, token, scale, zero, *Q8)
        x_MK = ao.dequantize_affine(numbers, token, scale, zero, *Q8, output_dtype=x_MK.dtype)
        weight = ao.dequantize_affine(self.numbers, group, self.scales, self.zeros, *Q4, output_dtype=x_MK.dtype)
        return F.linear(x_MK, weight, self.bias)


class PortableEmbedding(nn.Module):
    """A table of `embedding`, of 8 bits or of 4."""

    numbers: Tensor
    scales: Tensor

    def __init__(self, table: QuantizedEmbedding) -> None:
        super().__init__()
        self.bits = table.format.bits
        self.register_buffer("numbers", table.values.detach() if self.bits == 8 else _nibbles(table))
        # Some of its kernels take a vector where a row has one scale.
        self.register_buffer("scales", table.scale.detach().squeeze(1))

    def forward(self, ids: Tensor) -> Tensor:
        """As `QuantizedEmbedding.forward`."""
        quantized: Any = torch.ops.quantized_decomposed
        if self.bits == 8:
            rows: Tensor = quantized.embedding_byte(self.numbers, self.scales, None, -128, 127, ids)
        else:
            rows = quantized.embedding_4bit(self.numbers, self.scales, None, -8, 7, ids)
        return rows


def _nibbles(table: QuantizedEmbedding) -> Tensor:
    """Codes of 4 bits as that operator reads them: the first of two neighbours is the high one."""
    codes = (unpack(table.values, table.K, 4) + 8).to(torch.uint8)
    return codes[:, 0::2] << 4 | codes[:, 1::2]


def why_not(key: str, format: Format, K: int) -> str | None:
    """Why a layer of K inputs, quantized by a scheme of this name, cannot be exported; None where it can."""
    if key not in SCHEMES:
        return f"XNNPACK has no kernel for {key}; it has for {' and '.join(SCHEMES)}"
    if format.group_size and K % format.group_size:
        return f"XNNPACK needs groups that divide a row, and {format.group_size} does not divide {K}"
    return None


def make_portable(model: nn.Module) -> None:
    """Puts layers that can be exported in the place of all quantized ones."""
    for name, module in list(model.named_modules()):
        portable: nn.Module
        if isinstance(module, QuantizedLinear):
            portable = PortableLinear(module)
        elif isinstance(module, QuantizedEmbedding):
            portable = PortableEmbedding(module)
        else:
            continue
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, portable)
