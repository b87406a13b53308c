"""Parameters in a safetensors file under our own names: written one after the other as they come, and read back. Knows
names, shapes and types; not what the tensors are for, nor what else is in the directory.
"""

import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from config.errors import UserError
from model.checkpoint import find_checkpoint
from model.loader import Mapped, Source, SourceOf
from model.stored_tensors import StoredTensor, open_checkpoint

FORMAT = "torchchat"
"""What the file says of itself. It is not "pt": other programs would look for names that are not there."""
DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.uint8: "U8",
}
"""Types that parameters have -> safetensors' names."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""Those that stand for the model's dtype, and change with it."""
READ_BYTES = 32 << 20
"""So much of a file is mapped and copied at a time: what is mapped counts as this process's memory too."""


@dataclass(frozen=True)
class Layout:
    """Where everything will be in a file, known before there is anything to write."""

    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    """name -> type and shape."""
    header: bytes
    offsets: Mapping[str, int]
    nbytes: int
    """Of the whole file."""

    @classmethod
    def of(cls, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> "Layout":
        """Wide types come first, so that each tensor is where its type's size divides; most are where 64 does."""
        at = 0
        entries: dict[str, object] = {"__metadata__": {"format": FORMAT, **metadata}}
        offsets: dict[str, int] = {}
        for name in sorted(tensors, key=lambda name: -tensors[name][0].itemsize):
            dtype, shape = tensors[name]
            end = at + torch.Size(shape).numel() * dtype.itemsize
            entries[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [at, end]}
            offsets[name] = at
            at = end
        text = json.dumps(entries).encode()
        text += b" " * (-(8 + len(text)) % 64)
        header = struct.pack("<Q", len(text)) + text
        return cls(tensors, header, {name: start + len(header) for name, start in offsets.items()}, len(header) + at)


class TensorWriter:
    """Writes such a file in any order of its tensors, each from its first row to its last. Leaving the `with` block
    without an error, all of it is on the disk.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path, self.layout = path, layout
        self._missing = set(layout.offsets)

    def __enter__(self) -> "TensorWriter":
        self._file = self.path.open("xb")
        self._file.write(self.layout.header)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                assert not self._missing, self._missing
                self._file.flush()
                os.fsync(self._file.fileno())

    def write(self, name: str, blocks: Iterable[Tensor]) -> None:
        """The rows of a tensor, some at a time, from any device."""
        self._missing.remove(name)
        dtype, shape = self.layout.tensors[name]
        self._file.seek(self.layout.offsets[name])
        written = 0
        for rows in blocks:
            assert rows.dtype == dtype, name
            self._file.write(rows.detach().cpu().contiguous().view(torch.uint8).numpy().data)
            written += rows.numel()
        assert written == torch.Size(shape).numel(), name


@dataclass(frozen=True)
class _Saved:
    """A parameter in the file; what is read is a copy."""

    stored: StoredTensor
    device: torch.device
    dtype: torch.dtype

    @property
    def mapped(self) -> Mapped:
        return Mapped(min(READ_BYTES, torch.Size(self.stored.shape).numel() * self.dtype.itemsize))

    def whole(self) -> Tensor:
        return next(self.blocks(self.stored.shape[0]))

    def blocks(self, rows: int) -> Iterator[Tensor]:
        count, *row = self.stored.shape
        step = max(1, READ_BYTES // (torch.Size(row).numel() * self.dtype.itemsize))
        for start in range(0, count, rows):
            stop = min(count, start + rows)
            block = torch.empty((stop - start, *row), dtype=self.dtype, device=self.device)
            for at in range(start, stop, step):
                end = min(stop, at + step)
                block[at - start : end - start].copy_(self.stored.read()[at:end])
            yield block


def saved_sources(
    model: nn.Module,
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    stored_dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> SourceOf:
    """Where each parameter of `model`, which is on the meta device, comes from, by its name, in the directory `path`.

    stored_dtype: of the floating-point parameters in the file, which become `dtype`. metadata: what the file must say
    of itself. Everything is checked, and nothing is read yet. Raises UserError for whatever does not fit.
    """
    checkpoint = find_checkpoint(path)
    tensors = {name: stored for name, (stored, *_) in open_checkpoint(checkpoint).items()}
    for file in checkpoint.files:
        _check_metadata(file, {"format": FORMAT, **metadata})
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if name not in tensors:
            raise UserError(f"{path}: tensor {name!r} is missing; quantize the model again")
        expected = stored_dtype if parameter.dtype in FLOATS else parameter.dtype
        found = tensors[name]
        if found.shape != tuple(parameter.shape) or found.dtype not in (expected, DTYPES[expected]):
            kind = found.dtype if isinstance(found.dtype, str) else DTYPES.get(found.dtype, found.dtype)
            raise UserError(
                f"{found.file}: tensor {name!r} is {kind} {list(found.shape)}, where configuration and recipe ask for "
                f"{DTYPES[expected]} {list(parameter.shape)}"
            )
    for name, found in tensors.items():
        if name not in parameters:
            raise UserError(f"{found.file}: tensor {name!r} is no part of the model that configuration and recipe make")

    def source(name: str, meta: nn.Parameter) -> Source:
        return _Saved(tensors[name], device, dtype if meta.dtype in FLOATS else meta.dtype)

    return source


def _check_metadata(file: Path, expected: Mapping[str, str]) -> None:
    try:
        with safe_open(file, framework="pt") as opened:
            found = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    for key, value in expected.items():
        if found.get(key) != value:
            raise UserError(
                f"{file}: says of its {key} otherwise than torchchat.json beside it: they do not belong together; "
                "quantize the model again"
            )
