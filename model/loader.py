"""Weights of every format into a Transformer on the meta device, tensor by tensor. Knows both sides' names and shapes.

Everything is checked before the first byte is allocated. Then peak memory is the model plus one tensor: each tensor is
mapped, converted into its place on the device, and let go. What is loaded is always a copy: a file that somebody
changes while the model runs changes nothing.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from config.errors import UserError
from model.checkpoint import find_checkpoint
from model.stored_tensors import StoredTensor, StoredTensors, open_checkpoint
from model.transformer import Transformer
from model.weight_names import Part, WeightNames, quantized_by

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
DECODED_AT_ONCE = {"cpu": 2**20, "cuda": 2**25, "mps": 2**22}
"""Numbers of a tensor that are decoded together. On a CPU few, which stay in its cache: three times as fast as more."""


@dataclass(frozen=True)
class _Piece:
    """A stored tensor and its place: `rows` of our parameter from `start`, or there the `columns` that it holds."""

    stored: StoredTensor
    rows: slice
    columns: slice
    interleaved_heads: int


@dataclass(frozen=True)
class Mapped:
    """Bytes of files that reading a parameter maps: the system counts them as the process's memory, and takes them back
    when it needs them.
    """

    at_once: int = 0
    stays: bool = False
    """Until all is loaded."""


NOT_MAPPED = Mapped()


class Source(Protocol):
    """Where a parameter comes from: whole, or a part of its rows after the other, on the device and in the dtype that
    it is for.
    """

    @property
    def mapped(self) -> "Mapped": ...

    def whole(self) -> Tensor: ...

    def blocks(self, rows: int) -> Iterator[Tensor]: ...


SourceOf = Callable[[str, nn.Parameter], Source]
"""(name of a parameter, the parameter on the meta device) -> where its values come from."""
TakeWeight = Callable[[str, nn.Module, Source], bool]
"""(name of a module, the module, its weight): True if the weight is taken care of and is not to be loaded."""


@dataclass(frozen=True)
class _Stored:
    """A parameter in a checkpoint."""

    shape: torch.Size
    pieces: tuple[_Piece, ...]
    device: torch.device
    dtype: torch.dtype

    @property
    def mapped(self) -> Mapped:
        sizes = [piece.stored.nbytes for piece in self.pieces]
        stays = any(piece.stored.stays for piece in self.pieces)
        return Mapped(sum(sizes) if stays else max(sizes), stays)

    def whole(self) -> Tensor:
        return next(self.blocks(self.shape[0]))

    def blocks(self, rows: int) -> Iterator[Tensor]:
        # One piece at a time is open, for as many blocks as are of it.
        opened: tuple[_Piece, Tensor] | None = None
        for start in range(0, self.shape[0], rows):
            stop = min(self.shape[0], start + rows)
            block = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype, device=self.device)
            for piece in self.pieces:
                low, high = max(start, piece.rows.start), min(stop, piece.rows.stop)
                if low >= high:
                    continue
                if opened is None or opened[0] is not piece:
                    opened = None
                    opened = (piece, piece.stored.read())
                target = block[low - start : high - start]
                if target.dim() > 1:
                    target = target[:, piece.columns]
                self._fill(target, piece, opened[1], low - piece.rows.start)
                if high == piece.rows.stop:
                    opened = None
            yield block

    def _fill(self, target: Tensor, piece: _Piece, stored: Tensor, start: int) -> None:
        """The rows of a piece from `start` on, as many as `target` has."""
        decode = piece.stored.decode
        if decode is None:
            target.copy_(_rows(piece, stored, start, start + len(target)))
            return
        step = max(1, DECODED_AT_ONCE[self.device.type] // target[0].numel())
        for at in range(0, len(target), step):
            part = target[at : at + step]
            rows = _rows(piece, stored, start + at, start + at + len(part))
            # Stored they are smaller: they go to the device as they are.
            part.copy_(decode(rows.to(self.device)))


def _rows(piece: _Piece, stored: Tensor, start: int, stop: int) -> Tensor:
    """Rows of a piece, in our order."""
    if not piece.interleaved_heads:
        return stored[start:stop]
    # Meta rotates neighbouring rows of a head, (0, 1), (2, 3), …; we its halves, (0, d/2), (1, d/2 + 1), ….
    size = (piece.rows.stop - piece.rows.start) // piece.interleaved_heads
    row = torch.arange(start, stop)
    head, within = row // size, row % size
    return stored[head * size + within % (size // 2) * 2 + within // (size // 2)]


def load_weights(
    model: Transformer,
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    on_tensor: Callable[[str], None] | None = None,
    take: TakeWeight | None = None,
) -> None:
    """Fills `model`, which is on the meta device, from the checkpoint at `path`, a directory or a file.

    Parameters become `dtype` on `device`, without gradients, in the order of `model.named_modules()`. `on_tensor` hears
    the name of each as it is there; `take` is offered each module's weight before it is loaded. Raises UserError,
    naming file and tensor, when anything is missing, cut short, of another shape, or left over.
    """
    fill_parameters(model, weight_sources(model, path, device, dtype), on_tensor=on_tensor, take=take)


def weight_sources(
    model: Transformer, path: Path, device: torch.device, dtype: torch.dtype
) -> SourceOf:
    """Where each parameter of `model` comes from, by its name, in the checkpoint at `path`. Everything is checked, and
    nothing is read yet. Raises UserError as `load_weights` does.
    """
    plan = _plan(model, path, open_checkpoint(find_checkpoint(path)))
    return lambda name, meta: _Stored(meta.shape, plan[name], device, dtype)


def fill_parameters(
    model: nn.Module,
    source_of: SourceOf,
    on_tensor: Callable[[str], None] | None = None,
    take: TakeWeight | None = None,
) -> None:
    """Gives every parameter of a model on the meta device its values, one after the other; `load_weights` without a
    checkpoint. A weight that several modules share is loaded once, and is the same for those that do not `take` it.
    """
    names = {id(parameter): name for name, parameter in reversed(list(model.named_parameters(remove_duplicate=False)))}
    loaded: dict[int, nn.Parameter] = {}
    shared = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for module_name, module in list(model.named_modules()):
        # The weight last: whoever takes it may need the bias.
        for name, meta in sorted(module.named_parameters(recurse=False), key=lambda item: item[0] == "weight"):
            full_name = names[id(meta)]
            source = source_of(full_name, meta)
            if name == "weight" and take is not None and take(module_name, module, source):
                continue
            if (parameter := loaded.get(id(meta))) is None:
                parameter = nn.Parameter(source.whole(), requires_grad=False)
                if shared[id(meta)] > 1:
                    loaded[id(meta)] = parameter
                if on_tensor is not None:
                    on_tensor(full_name)
            setattr(module, name, parameter)


def _plan(model: Transformer, path: Path, tensors: StoredTensors) -> dict[str, tuple[_Piece, ...]]:
    """For each parameter of ours the pieces that it is made of; every name, shape and type is checked here."""
    if (found := quantized_by(tensors)) is not None:
        file = tensors[found[0]][0].file
        raise UserError(
            f"{file}: is quantized already ({found[1]}: tensor {found[0]!r}); "
            "get the original weights, and quantize them with --quantize"
        )
    names = WeightNames(tensors, model.config)
    used: set[str] = set()
    plan: dict[str, tuple[_Piece, ...]] = {}
    for parameter_name, parameter in model.named_parameters():
        plan[parameter_name] = tuple(_pieces(parameter_name, parameter, names, tensors, path))
        used.update(part.name for part in names.parts(parameter_name, parameter.shape[0]))
    for name, pieces in tensors.items():
        if name not in used and not names.may_be_unused(name):
            raise UserError(
                f"{pieces[0].file}: tensor {name!r} is no part of the model that the configuration describes"
            )
    return plan


def _pieces(
    parameter_name: str, parameter: Tensor, names: WeightNames, tensors: StoredTensors, path: Path
) -> Iterator[_Piece]:
    start = 0
    for part in names.parts(parameter_name, parameter.shape[0]):
        if part.name not in tensors:
            raise UserError(f"{path}: tensor {part.name!r} is missing ({parameter_name} of the model)")
        expected = (part.rows, *parameter.shape[1:])
        stored = tensors[part.name]
        if part.experts and len(stored) == 1:
            stored = (_of_experts(stored[0], part),)
        for piece in _place(stored, expected, part):
            if piece.stored.dtype not in FLOATS:
                kind = str(piece.stored.dtype).removeprefix("torch.")
                raise UserError(
                    f"{piece.stored.file}: tensor {part.name!r} is of type {kind}; "
                    "weights can be float32, float16 or bfloat16"
                )
            yield replace(piece, rows=slice(piece.rows.start + start, piece.rows.stop + start))
        start += part.rows
    assert start == parameter.shape[0]


def _of_experts(stored: StoredTensor, part: Part) -> StoredTensor:
    """[experts, rows of each, columns] as the rows of one expert below those of another, or as those of one alone."""
    if len(stored.shape) != 3 or stored.shape[0] != part.experts:
        raise UserError(
            f"{stored.file}: tensor {stored.name!r} has shape {list(stored.shape)}, where the configuration asks for a "
            f"matrix for each of {part.experts} experts"
        )
    experts, number = part.experts, part.expert
    if number is not None:
        return replace(stored, shape=stored.shape[1:], read=lambda: stored.read()[number])
    return replace(
        stored, shape=(experts * stored.shape[1], stored.shape[2]), read=lambda: stored.read().flatten(0, 1)
    )


def _place(pieces: tuple[StoredTensor, ...], expected: tuple[int, ...], part: Part) -> Iterator[_Piece]:
    """Where each piece of a tensor goes.

    Meta splits a tensor over its files by rows or by columns, or repeats it whole: the shape of a piece tells which.
    """
    count, heads, shape = len(pieces), part.interleaved_heads, pieces[0].shape
    all_rows, all_columns = slice(0, expected[0]), slice(0, expected[1] if len(expected) > 1 else 1)
    if shape == (expected[0] + part.unused_rows, *expected[1:]):
        yield _Piece(pieces[0], all_rows, all_columns, heads)
    elif shape and (shape[0] * count, *shape[1:]) == expected and heads % count == 0:
        for i, piece in enumerate(pieces):
            yield _Piece(piece, slice(i * shape[0], (i + 1) * shape[0]), all_columns, heads // count)
    elif len(shape) == 2 and (shape[0], shape[1] * count) == expected:
        for i, piece in enumerate(pieces):
            yield _Piece(piece, all_rows, slice(i * shape[1], (i + 1) * shape[1]), heads)
    else:
        of = f", in {count} pieces" if count > 1 else ""
        raise UserError(
            f"{pieces[0].file}: tensor {part.name!r} has shape {list(shape)}{of}, "
            f"where the configuration asks for {list(expected)}"
        )
    for piece in pieces:
        if piece.shape != shape:
            raise UserError(
                f"{piece.file}: tensor {part.name!r} has shape {list(piece.shape)}, "
                f"where {pieces[0].file.name} has {list(shape)}"
            )
