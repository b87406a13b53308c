"""Weights of every format into a Transformer on the meta device, tensor by tensor. Knows both sides' names and shapes.

Everything is checked before the first byte is allocated. Then peak memory is the model plus one tensor: each tensor is
mapped, converted into its place on the device, and let go. What is loaded is always a copy: a file that somebody
changes while the model runs changes nothing.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from config.errors import UserError
from model.checkpoint import find_checkpoint
from model.stored_tensors import StoredTensor, StoredTensors, open_checkpoint
from model.transformer import Transformer
from model.weight_names import Part, WeightNames, quantized_by

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class _Piece:
    """A stored tensor and its place: `rows` of our parameter from `start`, or there the `columns` that it holds."""

    stored: StoredTensor
    rows: slice
    columns: slice
    interleaved_heads: int


def load_weights(
    model: Transformer,
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    on_tensor: Callable[[str], None] | None = None,
    on_module: Callable[[str, nn.Module], None] | None = None,
) -> None:
    """Fills `model`, which is on the meta device, from the checkpoint at `path`, a directory or a file.

    Parameters become `dtype` on `device`, without gradients, in the order of `model.named_modules()`. `on_tensor` hears
    the name of each as it is there; `on_module` hears of each module as its own parameters are, and may change them.
    Raises UserError, naming file and tensor, when anything is missing, cut short, of another shape, or left over.
    """
    tensors = open_checkpoint(find_checkpoint(path))
    plan = _plan(model, path, tensors)
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    tied: dict[int, nn.Parameter] = {}

    def load(module: nn.Module, name: str, full_name: str, meta: nn.Parameter) -> None:
        if (parameter := tied.get(id(meta))) is None:
            filled = _fill(meta.shape, plan[full_name], device, dtype)
            parameter = nn.Parameter(filled, requires_grad=False)
            # Only the module holds what is not tied: `on_module` may put something smaller in its place.
            if owners[id(meta)] > 1:
                tied[id(meta)] = parameter
            if on_tensor is not None:
                on_tensor(full_name)
        setattr(module, name, parameter)

    for module_name, module in list(model.named_modules()):
        own = list(module.named_parameters(recurse=False))
        for name, meta in own:
            load(module, name, f"{module_name}.{name}", meta)
        if own and on_module is not None:
            on_module(module_name, module)


def _fill(shape: torch.Size, pieces: tuple[_Piece, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """A parameter on the device, from its pieces; each is converted as it is copied and let go."""
    parameter = torch.empty(shape, dtype=dtype, device=device)
    for piece in pieces:
        target, source = parameter[piece.rows], piece.stored.read()
        if target.dim() > 1:
            target = target[:, piece.columns]
        if piece.interleaved_heads:
            # Meta rotates neighbouring rows of a head, (0, 1), (2, 3), …; we its halves, (0, d/2), (1, d/2 + 1), ….
            half = target.shape[0] // piece.interleaved_heads // 2
            target = target.view(piece.interleaved_heads, 2, half, *target.shape[1:])
            source = source.reshape(piece.interleaved_heads, half, 2, *source.shape[1:]).transpose(1, 2)
        target.copy_(source)
        del source
    return parameter


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
        for piece in _place(tensors[part.name], expected, part):
            if piece.stored.dtype not in FLOATS:
                kind = str(piece.stored.dtype).removeprefix("torch.")
                raise UserError(
                    f"{piece.stored.file}: tensor {part.name!r} is of type {kind}; "
                    "weights can be float32, float16 or bfloat16"
                )
            yield replace(piece, rows=slice(piece.rows.start + start, piece.rows.stop + start))
        start += part.rows
    assert start == parameter.shape[0]


def _place(pieces: tuple[StoredTensor, ...], expected: tuple[int, ...], part: Part) -> Iterator[_Piece]:
    """Where each piece of a tensor goes.

    Meta splits a tensor over its files by rows or by columns, or repeats it whole: the shape of a piece tells which.
    """
    count, heads, shape = len(pieces), part.interleaved_heads, pieces[0].shape
    all_rows, all_columns = slice(0, expected[0]), slice(0, expected[1] if len(expected) > 1 else 1)
    if shape == expected:
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
