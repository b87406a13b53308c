"""The tensors of a checkpoint, each read by itself from its mapped file. Knows formats; not what a tensor is for."""

import json
import math
import os
import pickle
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from config.errors import UserError
from model.checkpoint import CheckpointFiles, llama2c_layout

# Safetensors' names of the types that weights may have here.
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# And of those that quantized numbers have.
NUMBER_DTYPES = {"I8": torch.int8, "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn}

ONE_IN_NORMS = ("gemma", "gemma2", "gemma3")
"""GGUF's architectures in whose norms is the one that Gemma adds to them."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. `dtype` is as the file spells it where that is no type of ours (`FLOAT_TYPES`)."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str
    read: Callable[[], Tensor]
    """Maps the tensor, on the CPU: its pages are read when it is used and are not this process's own memory."""
    stays: bool = False
    """Whether pages that were read stay mapped until the whole checkpoint is let go."""
    decode: Callable[[Tensor], Tensor] | None = None
    """Where a row is stored as something else than its numbers: some rows as `read` gives them -> their numbers, on the
    same device.
    """
    row_bytes: int = 0
    """Of such a row, in the file."""

    @property
    def nbytes(self) -> int:
        """In the file, of a tensor of one of torch's types."""
        if self.row_bytes:
            return math.prod(self.shape[:-1]) * self.row_bytes
        assert isinstance(self.dtype, torch.dtype), self.dtype
        return math.prod(self.shape) * self.dtype.itemsize


# A tensor of Meta's checkpoints may be in several files, a piece in each.
StoredTensors = Mapping[str, tuple[StoredTensor, ...]]


def open_checkpoint(checkpoint: CheckpointFiles) -> StoredTensors:
    """Every tensor of a checkpoint by its own name; the headers are read and checked, the tensors are not read.

    Raises UserError for a file that is damaged, cut short or holds something else than tensors.
    """
    read = _READERS[checkpoint.format]
    tensors: dict[str, tuple[StoredTensor, ...]] = {}
    for file in checkpoint.files:
        for name, tensor in read(file).items():
            if checkpoint.format == "meta":
                tensors[name] = (*tensors.get(name, ()), tensor)
            elif name in tensors:
                raise UserError(f"{file}: holds tensor {name!r}, which {tensors[name][0].file.name} holds too")
            else:
                tensors[name] = (tensor,)
    for name, file in (checkpoint.weight_map or {}).items():
        if name not in tensors or tensors[name][0].file != file:
            raise UserError(f"{file}: does not hold tensor {name!r}, which the index says is there")
    return tensors


def _open_safetensors(file: Path) -> dict[str, StoredTensor]:
    def reader(dtype: torch.dtype, shape: Sequence[int], begin: int, end: int) -> Callable[[], Tensor]:
        def read() -> Tensor:
            # Mapped anew for each tensor, so that the mapping and its pages go when the tensor does; and not by
            # `safe_open`, which reads the whole header each time: ten milliseconds where experts are thousands.
            # A part of the storage, not of a tensor: old files do not begin their data where a number may.
            part = torch.UntypedStorage.from_file(str(file), False, end)[begin:end]
            return torch.asarray(part, dtype=torch.uint8).view(dtype).view(torch.Size(shape))

        return read

    try:
        with safe_open(file, framework="pt") as opened:  # checks the header, whose offsets it does not tell
            names = list(opened.keys())
        start, header = _safetensors_header(file)
        tensors = {}
        for name in names:
            spelled, shape, (begin, end) = (header[name][key] for key in ("dtype", "shape", "data_offsets"))
            dtype = SAFETENSORS_DTYPES.get(spelled) or NUMBER_DTYPES.get(spelled)
            read = _unreadable if dtype is None else reader(dtype, shape, start + begin, start + end)
            tensors[name] = StoredTensor(file, name, tuple(shape), SAFETENSORS_DTYPES.get(spelled, spelled), read)
        return tensors
    except SafetensorError as error:
        raise UserError(f"{file}: {_what_is_cut(file) or f'is damaged: {error}'}; get it again") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error}") from None


def _safetensors_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Where the data begins, and the header of a file that `safe_open` has checked."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header: dict[str, Any] = json.loads(opened.read(length))
    return 8 + length, header


def _unreadable() -> Tensor:
    raise AssertionError("refused by whoever asks for the tensor: no weight has its type")


def _what_is_cut(file: Path) -> str | None:
    """What is missing at the end of a safetensors file; None when that is not what is wrong with it."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        prefix = opened.read(8)
        if len(prefix) < 8:
            return f"is cut short: {size} bytes are less than a header"
        (length,) = struct.unpack("<Q", prefix)
        if length > size - 8:
            return f"is cut short: its header should be {length} bytes, and {size - 8} are there"
        try:
            header = json.loads(opened.read(length))
            ends = sorted((entry["data_offsets"][1], name) for name, entry in header.items() if name != "__metadata__")
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            return None
    for end, name in ends:
        if 8 + length + end > size:
            return f"is cut short in tensor {name!r}: {8 + length + ends[-1][0]} bytes expected, {size} are there"
    return None


def _open_torch(file: Path) -> dict[str, StoredTensor]:
    """A zip of PyTorch's: a state dict, or llama2.c's training checkpoint, which has one under "model"."""
    try:
        loaded: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"refers to {named[1]}, which is code" if named else "holds something else than tensors"
        raise UserError(f"{file}: {what}; only plain weights are read from a pickle") from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{file}: is damaged or cut short ({reason}); get it again") from None
    if isinstance(loaded, dict) and isinstance(loaded.get("model"), dict):
        loaded = loaded["model"]
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise UserError(f"{file}: is no model's state dict, but a {type(loaded).__name__}")
    tensors: dict[str, StoredTensor] = {}
    for full_name, value in loaded.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{file}: {full_name!r} is no tensor, but a {type(value).__name__}")
        # What torch.compile puts before the names of a module that it wraps.
        name = full_name.removeprefix("_orig_mod.")
        tensors[name] = StoredTensor(file, full_name, tuple(value.shape), value.dtype, _constant(value), stays=True)
    return tensors


def _constant(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


def _open_llama2c(file: Path) -> dict[str, StoredTensor]:
    layout = llama2c_layout(file)
    (expected, _), size = layout.pop(""), os.path.getsize(file)
    if size != expected:
        at = next((name for name, (start, shape) in layout.items() if start + 4 * math.prod(shape) > size), None)
        where = f" in tensor {at!r}" if at else ""
        state = f"is cut short{where}" if size < expected else "is too long"
        raise UserError(f"{file}: {state}: its header asks for {expected} bytes, and {size} are there")

    def reader(start: int, shape: tuple[int, ...]) -> Callable[[], Tensor]:
        # Headers are whole numbers of float32 long, so that all of the file can be mapped as such.
        begin, count = start // 4, math.prod(shape)
        return lambda: torch.from_file(str(file), shared=False, size=size // 4, dtype=torch.float32)[
            begin : begin + count
        ].view(shape)

    return {
        name: StoredTensor(file, name, shape, torch.float32, reader(start, shape))
        for name, (start, shape) in layout.items()
    }


def _open_gguf(file: Path) -> dict[str, StoredTensor]:
    # Their package is imported for them alone.
    from model.gguf_blocks import PLAIN, decoder
    from model.gguf_file import GgufTensor, read_gguf

    model = read_gguf(file)
    one_more = model.architecture in ONE_IN_NORMS

    def mapped(tensor: GgufTensor) -> Tensor:
        size = tensor.file.stat().st_size
        whole = torch.from_file(str(tensor.file), shared=False, size=size, dtype=torch.uint8)
        return whole[tensor.offset : tensor.offset + tensor.nbytes]

    def stored(tensor: GgufTensor) -> StoredTensor:
        name, shape = tensor.name, tensor.shape
        if (dtype := PLAIN.get(tensor.kind)) is not None:
            norm = _less_one if one_more and name.endswith("norm.weight") else None
            return StoredTensor(
                tensor.file, name, shape, dtype, lambda: mapped(tensor).view(dtype).view(shape), decode=norm
            )
        decode = decoder(tensor.kind)
        if decode is None or len(shape) == 1:  # vectors are never quantized
            return StoredTensor(tensor.file, name, shape, tensor.kind.name, lambda: mapped(tensor))
        row_bytes = tensor.nbytes // math.prod(shape[:-1])
        return StoredTensor(
            tensor.file, name, shape, torch.float32, lambda: mapped(tensor).view(*shape[:-1], row_bytes), decode=decode,
            row_bytes=row_bytes,
        )  # fmt: skip

    return {name: stored(tensor) for name, tensor in model.tensors.items()}


def _less_one(weight: Tensor) -> Tensor:
    return weight.float() - 1


_READERS: dict[str, Callable[[Path], dict[str, StoredTensor]]] = {
    "safetensors": _open_safetensors,
    "torch": _open_torch,
    "meta": _open_torch,
    "llama2c": _open_llama2c,
    "gguf": _open_gguf,
}
