"""A linear layer and a table of embeddings whose weights are quantized numbers. They stand where `model.layers.Linear`
and `Embedding` stood and are called as those are; how the numbers were chosen they do not know.
"""

import torch
from torch import Tensor, nn

from model.layers import RMSNorm, Table, finish
from model.tracing import is_tracing
from quant import activations, kernels, ops
from quant.formats import Format
from quant.packed import dequantize


class QuantizedRows(nn.Module):
    """`values`, `scale` and perhaps `zero` of a weight [N, K], as `quant.packed` describes them."""

    values: nn.Parameter
    scale: nn.Parameter
    zero: nn.Parameter | None

    def __init__(self, N: int, K: int, format: Format, dtype: torch.dtype, device: torch.device) -> None:
        """dtype: of the scales. What is in the memory is for whoever makes this to say; on the meta device is none."""
        super().__init__()
        self.N, self.K, self.format = N, K, format
        container = torch.uint8 if format.bits < 8 else torch.float8_e4m3fn if format.kind == "fp8" else torch.int8

        def parameter(width: int, dtype: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(N, width, dtype=dtype, device=device), requires_grad=False)

        self.values = parameter(format.padded_width(K) * format.bits // 8, container)
        self.scale = parameter(format.groups(K), dtype)
        self.register_parameter("zero", parameter(format.groups(K), torch.int8) if format.has_zero else None)

    def share(self, other: nn.Module) -> None:
        """Use the numbers of another module as one's own, as tied weights are used."""
        assert isinstance(other, QuantizedRows)
        assert (other.N, other.K) == (self.N, self.K)
        assert self.format.stored_like(other.format)
        self.values, self.scale, self.zero = other.values, other.scale, other.zero

    def extra_repr(self) -> str:
        return f"{self.N}, {self.K}, {self.format}"


class QuantizedLinear(QuantizedRows):
    """`model.layers.Linear` on quantized numbers [out_features, in_features], its bias as it was."""

    bias: nn.Parameter | None

    def __init__(self, N: int, K: int, format: Format, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(N, K, format, dtype, device)
        self.register_parameter("bias", None)

    def forward(
        self,
        x: Tensor,
        norm: RMSNorm | None = None,
        gate: str | None = None,
        residual: Tensor | None = None,
        multiplier: float = 1.0,
    ) -> Tensor:
        """residual + multiplier * gated(norm(x) @ weight.T + bias), as `model.layers.Linear.forward` describes it."""
        form = self.format
        if x.numel() == self.K and form.activation is None and ops.fused_usable(x, form.kind, form.bits):
            fused = ops.fused_gemv_op if is_tracing() else kernels.gemv
            y: Tensor = fused(
                x.reshape(-1), self.values, self.scale, self.zero, None if norm is None else norm.weight, self.bias,
                None if residual is None else residual.reshape(-1), gate,
                0.0 if norm is None else norm.eps, norm is not None and norm.plus_one, multiplier,
                form.bits, form.group_size,
            )  # fmt: skip
            return y.view(*x.shape[:-1], -1)
        if norm is not None:
            x = norm(x)
        y = self._product(x.reshape(-1, self.K)).view(*x.shape[:-1], self.N)
        return finish(y, gate, residual, multiplier)

    def _product(self, x_MK: Tensor) -> Tensor:
        """x @ weight.T + bias, [M, N]."""
        form = self.format
        product = ops.quantized_linear_op if is_tracing() else ops.quantized_linear
        if form.activation is None:
            y: Tensor = product(
                x_MK, self.values, self.scale, self.zero, self.bias, self.K, form.bits, form.group_size
            )
            return y
        # Quantized inputs are few enough numbers for x's dtype to hold exactly: any product of ours takes them.
        numbers, scale_M1 = activations.quantize(x_MK, form.activation)
        y = product(numbers, self.values, self.scale, self.zero, None, self.K, form.bits, form.group_size)
        y = (y.float() * scale_M1).to(x_MK.dtype)
        return y if self.bias is None else y + self.bias


class QuantizedEmbedding(QuantizedRows, Table):
    """`model.layers.Embedding` on quantized numbers [num_embeddings, embedding_dim]: only rows asked for are read."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids: int64 of any shape. Returns [..., K] in the dtype of the scales."""
        zero = None if self.zero is None else self.zero[ids]
        form = self.format
        return dequantize(
            self.values[ids], self.scale[ids], zero, self.K, form.bits, form.group_size, self.scale.dtype
        )
