"""Weights -> quantized numbers, chosen by torchao some rows at a time, so that what it needs meanwhile stays small.
Knows matrices, not models.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.modules import QuantizedRows
from quant.packed import pack
from quant.schemes import Arguments, Scheme, quiet_torchao

BLOCK_NUMBERS = {"cpu": 2**18, "cuda": 2**25, "mps": 2**22}
"""Weights that go through torchao at once. On a CPU few, which stay in its cache: twice as fast as 16 times more."""


def rows_at_once(K: int, device: torch.device) -> int:
    """How many rows of K weights to quantize together. Each row's numbers depend on that row alone."""
    return max(1, BLOCK_NUMBERS[device.type] // K)


class Quantizer:
    """Fills modules by one scheme and its arguments."""

    def __init__(self, scheme: Scheme, args: Arguments) -> None:
        self.args = args
        self.config = scheme.torchao_config(args)

    def fill(self, module: QuantizedRows, blocks: Iterable[Tensor]) -> None:
        """Choose the numbers of `module` for a weight that comes as blocks of its rows in order, in the dtype of the
        model.
        """
        start = 0
        for rows in blocks:
            stop = start + rows.shape[0]
            values, scale, zero = self.numbers(rows)
            form = module.format
            module.values[start:stop] = values if form.bits == 8 else pack(values, form.bits)
            module.scale[start:stop] = scale
            if module.zero is not None:
                module.zero[start:stop] = zero
            start = stop
        assert start == module.N

    def numbers(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What torchao makes of some rows [N, K]: numbers [N, K] (int8 or float8_e4m3fn), scale and zero [N, G]."""
        N, K = rows.shape
        # torchao leaves a layer whose width its groups do not divide as it is, in silence: zeros make up for it.
        size = self.args.group_size or K
        padded = F.pad(rows, (0, -K % size)) if K % size else rows
        layer = nn.Linear(1, 1, bias=False, device="meta")
        layer.in_features, layer.out_features = padded.shape[1], N
        layer.weight = nn.Parameter(padded, requires_grad=False)
        with quiet_torchao():
            from torchao.quantization import quantize_

            quantize_(layer, self.config)
        weight = layer.weight
        assert type(weight) is not nn.Parameter, "torchao did nothing"
        names: list[str] = weight.__tensor_flatten__()[0]  # type: ignore[attr-defined]
        parts = {name: vars(weight)[name] for name in names}
        vars(layer).clear()  # torchao makes a cycle of it, which would keep its numbers until garbage is collected
        values, scale, zero = parts["qdata"][:, :K], parts["scale"].reshape(N, -1), parts.get("zero_point")
        if values.is_floating_point():  # of a row of zeros torchao makes 0 / 0
            values = torch.where(scale == 0, 0.0, values.float()).to(values.dtype)
        return values, scale, torch.zeros_like(scale) if zero is None else zero.reshape(N, -1)
