"""A Plan -> a model whose layers are quantized, one after the other as their weights are read. Knows module trees and
where weights come from row by row; not which model it is, nor in which files.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from model.moe_experts import ExpertLinear
from quant.convert import Quantizer, rows_at_once
from quant.experts import QuantizedExpertLinear
from quant.modules import QuantizedEmbedding, QuantizedLinear, QuantizedRows
from quant.plan import Assignment, Plan
from quant.schemes import SCHEMES, Arguments


class Rows(Protocol):
    """A weight, some rows at a time, on the device and in the dtype of the model."""

    def blocks(self, rows: int) -> Iterator[Tensor]: ...


class QuantizeOnLoad:
    """Takes each weight that the plan names as it is about to be loaded, and puts a quantized module in the place of
    its own. More than a few rows of a weight are never there in full precision.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, device: torch.device, dtype: torch.dtype, on_numbers: Callable[[int], None]
    ) -> None:
        """on_numbers: hears how many more weights are quantized."""
        self.model, self.plan, self.device, self.dtype, self.on_numbers = model, plan, device, dtype, on_numbers
        self._quantizers: dict[tuple[str, Arguments], Quantizer] = {}

    def __call__(self, name: str, module: nn.Module, weight: Rows) -> bool:
        """True if the plan names the module, which then is another."""
        assignment = self.plan.assignment(name)
        if assignment is None:
            return False
        quantized = _replace(self.model, assignment, self.device, self.dtype)
        if assignment.shares is None:
            blocks = weight.blocks(rows_at_once(quantized.K, self.device))
            self._quantizer(assignment).fill(quantized, self._counted(blocks))
        return True

    def _quantizer(self, assignment: Assignment) -> Quantizer:
        key = (assignment.key, assignment.args)
        if key not in self._quantizers:
            self._quantizers[key] = Quantizer(SCHEMES[assignment.key], assignment.args)
        return self._quantizers[key]

    def _counted(self, blocks: Iterator[Tensor]) -> Iterator[Tensor]:
        for block in blocks:
            yield block
            self.on_numbers(block.numel())


def replace_modules(model: nn.Module, plan: Plan, dtype: torch.dtype) -> None:
    """Put quantized modules on the meta device where the plan says, for numbers that are in a file already."""
    for assignment in plan.assignments:
        _replace(model, assignment, torch.device("meta"), dtype)


def _replace(model: nn.Module, assignment: Assignment, device: torch.device, dtype: torch.dtype) -> QuantizedRows:
    old = model.get_submodule(assignment.name)
    own = device if assignment.shares is None else torch.device("meta")
    N, K = assignment.shape
    quantized: QuantizedRows
    if isinstance(old, ExpertLinear):
        quantized = QuantizedExpertLinear(old.num_experts, old.chosen, N, K, assignment.format, dtype, own)
    elif SCHEMES[assignment.key].target == "linear":
        quantized = QuantizedLinear(N, K, assignment.format, dtype, own)
        quantized.bias = dict(old.named_parameters(recurse=False)).get("bias")
    else:
        quantized = QuantizedEmbedding(N, K, assignment.format, dtype, own)
    if assignment.shares is not None:
        quantized.share(model.get_submodule(assignment.shares))
    parent, _, attribute = assignment.name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, quantized)
    return quantized
