"""How the numbers of a quantized weight are stored, and how many bytes that takes. Knows no tensors and no torch.

A weight is [N, K]: N rows (outputs of a linear layer, entries of a table), K numbers each.
"""

from dataclasses import dataclass
from typing import Literal

Activation = Literal["int8", "int8-symmetric", "fp8"]
"""How the inputs are quantized, a scale for each token: to 8-bit integers with a zero point ("int8") or without
("int8-symmetric"), or to float8 ("fp8")."""

RUN = 32
"""Numbers of fewer than 8 bits are stored so many together; a row takes whole runs of them."""


@dataclass(frozen=True)
class Format:
    """How one weight is stored and used: weight[n, k] = (values[n, k] - zero[n, g]) * scale[n, g], g = k // group_size.

    Two weights whose formats differ in `activation` alone are stored alike.
    """

    kind: Literal["int", "fp8"]
    bits: int
    """Bits that a number takes in memory: 8, 4, 2 or 1."""
    group_size: int
    """Neighbours in a row that share a scale, a multiple of 32; 0: the whole row does."""
    has_zero: bool
    """Whether each group has a zero point, an int8."""
    activation: Activation | None = None

    def __post_init__(self) -> None:
        assert self.bits in ((8,) if self.kind == "fp8" else (8, 4, 2, 1)), self
        assert self.group_size >= 0, self
        assert self.group_size % 32 == 0, self

    def stored_like(self, other: "Format") -> bool:
        """Whether one copy of the numbers could serve both."""
        return self.storage == other.storage

    @property
    def storage(self) -> tuple[str, int, int, bool]:
        return (self.kind, self.bits, self.group_size, self.has_zero)

    def padded_width(self, K: int) -> int:
        """The length of a row of K numbers as stored."""
        return K if self.bits == 8 else -(-K // RUN) * RUN

    def values_bytes(self, N: int, K: int) -> int:
        """Bytes of the numbers alone."""
        return N * self.padded_width(K) * self.bits // 8

    def groups(self, K: int) -> int:
        """Scales of a row of K numbers; the last group may be shorter than the others."""
        return -(-K // self.group_size) if self.group_size else 1

    def nbytes(self, N: int, K: int, scale_itemsize: int) -> int:
        """Bytes of numbers, scales (of `scale_itemsize` bytes each) and zero points."""
        return self.values_bytes(N, K) + N * self.groups(K) * (scale_itemsize + self.has_zero)


def container_bits(bits: int) -> int:
    """The bits that a number of `bits` bits (1 to 8) takes in memory: the next of 1, 2, 4, 8."""
    return next(size for size in (1, 2, 4, 8) if size >= bits)
