"""The linear layer, and the fastest way that this machine multiplies one by one row. Knows weights, not what they are for."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """`nn.Linear` whose products with a single row are read at the speed of memory once compiled."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] -> [..., out_features]."""
        weight = self.weight
        if torch.compiler.is_compiling() and x.numel() == x.shape[-1] and x.device.type == "cpu":
            # One row: Inductor turns this sum into one streaming loop over the weight, in float32, at about twice the speed
            # of the library's matrix product, which is built for many rows.
            out = (weight.float() * x.reshape(1, -1).float()).sum(-1).to(x.dtype)
            return (out if self.bias is None else out + self.bias).view(*x.shape[:-1], -1)
        return F.linear(x, weight, self.bias)
