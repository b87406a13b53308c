"""A prepared model -> a directory that loads as the customized model, whole or not at all. Each weight is written when
it is quantized, or read, so that no more than one of them is in memory. Knows all parts, and no flags.
"""

import json
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from cli.builder import Prepared, fill, meta_model, stored_model
from cli.console import Progress, human_bytes
from cli.quantize import MAX_RECEIPT_TOKENS, ReceiptText
from config import __version__
from config.errors import UserError
from generate.score import Windows, compare, perplexity
from model import chat_files
from model.checkpoint import SAFETENSORS, find_checkpoint
from model.config import hf_document
from model.gguf_within import files_within
from model.loader import Source, weight_sources
from model.saved import FLOATS, Layout, TensorWriter
from model.stored_tensors import open_checkpoint
from model.streaming import Streamed
from model.tokenizer import FILES
from model.weight_names import WeightNames
from quant.apply import QuantizeOnLoad, replace_modules
from quant.directory import FILE, Stored, layers_only
from quant.receipt import Receipt, finite
from quant.recipe import read_recipe

COPIED = (
    *FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", *chat_files.FILES,
    "generation_config.json",
)  # fmt: skip
TERMS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
"""What a model is passed on under goes with it."""
ROOM = 16 << 20
"""Of the disk, beside all that is known to be written."""
WINDOW = 512
"""Tokens that a receipt's text is read in."""
BLOCK_NUMBERS = 2**22
"""Of a weight that is not quantized, so many numbers are in memory at a time."""


@dataclass(frozen=True)
class Sizes:
    """What came of it."""

    file_bytes: int
    """Of the file with the weights."""
    quantize_s: float
    receipt_s: float


@dataclass(frozen=True)
class Job:
    """What will be written where, and read for the receipt: all that can be wrong with it is known."""

    prepared: Prepared
    """With what the directory will say."""
    output: Path
    layout: Layout
    files: Mapping[str, bytes]
    """What is written beside the weights, by name."""
    text: ReceiptText | None
    windows: Windows | None


def job_of(prepared: Prepared, output: Path, text: ReceiptText | None) -> Job:
    """To write `prepared` to `output`, new or empty, and measure what that cost on `text`. Raises UserError."""
    assert prepared.settings.quantize is not None
    windows = None if text is None else _windows(prepared, text)
    stored = stored_of(prepared)
    layout = _layout(prepared, stored)
    files = model_files(prepared)
    check_disk(output.parent, layout.nbytes + sum(map(len, files.values())))
    return Job(replace(prepared, stored=stored), output, layout, files, text, windows)


def stored_of(prepared: Prepared) -> Stored:
    """What torchchat.json says of a model with a recipe."""
    assert prepared.settings.quantize is not None
    recipe = layers_only(read_recipe(prepared.settings.quantize, "--quantize"))
    return Stored(recipe, prepared.dtype.name, prepared.settings.model, versions(), None)


def model_files(prepared: Prepared) -> dict[str, bytes]:
    """All small files that a directory needs to load as this model, by name: configuration, tokenizer, templates, and
    the model's terms.
    """
    written = {} if prepared.path is None else files_within(prepared.path)
    copied = [file for file in _files_to_copy(prepared) if not (written and _of_model(file))]
    config = json.dumps(_config_document(prepared), indent=2) + "\n"
    return {_name(file): file.read_bytes() for file in copied} | written | {"config.json": config.encode()}


def _name(file: Path) -> str:
    return f"{chat_files.FOLDER}/{file.name}" if file.parent.name == chat_files.FOLDER else file.name


def save(job: Job) -> tuple[Sizes, Receipt | None]:
    """Do it. Raises UserError, and OSError where the disk does; then there is no directory."""
    stored = job.prepared.stored
    assert stored is not None
    with _whole(job.output) as directory:
        began = time.perf_counter()
        _write_weights(job.prepared, directory / SAFETENSORS, job.layout)
        _write_files(directory, job.files)
        measured = time.perf_counter()
        receipt = None
        if job.text is not None and job.windows is not None:
            receipt = _measure(job.prepared, directory, job.text, job.windows)
        # Last, for without it nothing here is a model.
        _write_json(directory / FILE, replace(stored, receipt=receipt).document())
        ended = time.perf_counter()
    return Sizes(job.layout.nbytes, measured - began, ended - measured), receipt


def save_snapshot(prepared: Prepared, output: Path) -> int:
    """The model as it was customized, without a receipt; bytes of the file with the weights. Quantized it is what
    `save` writes; unquantized it has the names that Transformers gives to weights, so that other programs read it too.
    Raises UserError, and OSError where the disk does; then there is no directory.
    """
    if prepared.settings.quantize is not None:
        return save(job_of(prepared, output, None))[0].file_bytes
    names = _names(prepared)
    layout, files = _plain_layout(prepared, names), model_files(prepared)
    config = json.loads(files["config.json"])
    torch_name = str(prepared.dtype.dtype).removeprefix("torch.")
    config |= {key: torch_name for key in ("torch_dtype", "dtype") if key in config} or {"torch_dtype": torch_name}
    check_disk(output.parent, layout.nbytes + sum(map(len, files.values())))
    with _whole(output) as directory:
        _write_plain(prepared, names, directory / SAFETENSORS, layout)
        _write_files(directory, files)
        _write_json(directory / "config.json", config)
    return layout.nbytes


def _names(prepared: Prepared) -> WeightNames:
    """Transformers' names, as the original has them if it has such."""
    if prepared.path is not None and not prepared.settings.random_weights:
        found = WeightNames(open_checkpoint(find_checkpoint(prepared.path)), prepared.config)
        if found.style == "hf":
            return found
    return WeightNames((), prepared.config)


def _plain_layout(prepared: Prepared, names: WeightNames) -> Layout:
    tensors = {
        part.name: (prepared.dtype.dtype, (part.rows + part.unused_rows, *parameter.shape[1:]))
        for name, parameter in meta_model(prepared.config).named_parameters()
        for part in names.parts(name, parameter.shape[0])
    }
    return Layout.of(tensors, {"format": "pt"})


def _write_plain(prepared: Prepared, names: WeightNames, file: Path, layout: Layout) -> None:
    model = meta_model(prepared.config)
    expected = {name for name, _ in model.named_parameters()}
    total = sum(parameter.numel() for parameter in model.parameters()) * prepared.dtype.dtype.itemsize
    with Progress(f"writing {prepared.name}", total, in_bytes=True) as progress, TensorWriter(file, layout) as writer:

        def write(name: str, tensor: Tensor) -> None:
            start = 0
            for part in names.parts(name, tensor.shape[0]):
                rows = tensor[start : start + part.rows]
                writer.write(part.name, [rows, rows.new_zeros(part.unused_rows, *rows.shape[1:])])
                start += part.rows
            progress.advance(tensor.nbytes)

        def take(name: str, module: nn.Module, source: Source) -> bool:
            """Writes all parameters of a module, of which the weight comes last, and keeps none."""
            for key, parameter in list(module.named_parameters(recurse=False)):
                if key != "weight":
                    write(f"{name}.{key}", parameter)
                    setattr(module, key, nn.Parameter(parameter.to("meta"), requires_grad=False))
            if f"{name}.weight" in expected:  # else it is another module's too, which has it
                write(f"{name}.weight", source.whole())
            return True

        fill(prepared, model, None, take)


def _write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(data)


def _write_json(file: Path, document: Mapping[str, object]) -> None:
    file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Of all that decides which numbers are chosen."""
    return {"torch": torch.__version__, "torchao": version("torchao"), "torchchat": __version__}


@contextmanager
def _whole(output: Path) -> Iterator[Path]:
    """A directory beside `output` that takes its place in the end, or is removed."""
    partial = output.with_name(f".{output.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir()
    try:
        yield partial
        partial.replace(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _layout(prepared: Prepared, stored: Stored) -> Layout:
    assert prepared.plan is not None
    dtype = prepared.dtype.dtype
    model = meta_model(prepared.config)
    replace_modules(model, prepared.plan, dtype)
    tensors = {
        name: (dtype if parameter.dtype in FLOATS else parameter.dtype, tuple(parameter.shape))
        for name, parameter in model.named_parameters()
    }
    return Layout.of(tensors, stored.metadata())


def _files_to_copy(prepared: Prepared) -> tuple[Path, ...]:
    path = prepared.path
    if path is None:
        return ()
    directory = path if path.is_dir() else path.parent
    terms = [file for pattern in TERMS for file in sorted(directory.glob(pattern))]
    templates = sorted((directory / chat_files.FOLDER).glob("*.jinja"))
    return tuple(file for file in (*(directory / name for name in COPIED), *templates, *terms) if file.is_file())


def _of_model(file: Path) -> bool:
    return file.name in COPIED or file.parent.name == chat_files.FOLDER


def _config_document(prepared: Prepared) -> dict[str, object]:
    if prepared.path is not None:
        return hf_document(prepared.path)
    from config.registry import find  # random weights: the registry has the shapes

    return dict(find(prepared.name).config)


def check_disk(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed + ROOM:
        raise UserError(
            f"{directory}: {human_bytes(needed + ROOM)} are needed there and {human_bytes(free)} are free; make room, "
            "or name another --output"
        )


def _write_weights(prepared: Prepared, file: Path, layout: Layout) -> None:
    plan = prepared.plan
    assert plan is not None
    device, dtype = prepared.device.device, prepared.dtype.dtype
    model = meta_model(prepared.config)
    total = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    doing = f"quantizing {prepared.name}"
    with Progress(doing, total, in_bytes=True) as progress, TensorWriter(file, layout) as writer:

        def count(numbers: int) -> None:
            progress.advance(numbers * dtype.itemsize)

        def counted(blocks: Iterator[Tensor]) -> Iterator[Tensor]:
            for rows in blocks:
                yield rows
                count(rows.numel())

        quantize = QuantizeOnLoad(model, plan, device, dtype, count)

        def take(name: str, module: nn.Module, source: Source) -> bool:
            """Writes all parameters of a module, of which the weight comes last, and keeps none."""
            for key, parameter in module.named_parameters(recurse=False):
                if key != "weight":
                    writer.write(f"{name}.{key}", [parameter])
            if quantize(name, module, source):
                quantized = model.get_submodule(name)
                for key, parameter in list(quantized.named_parameters(recurse=False)):
                    if key != "bias" and not parameter.is_meta:
                        writer.write(f"{name}.{key}", [parameter])
                    setattr(quantized, key, nn.Parameter(parameter.to("meta"), requires_grad=False))
            elif f"{name}.weight" in layout.offsets:  # else it is another module's too, which has it
                shape = module.get_parameter("weight").shape
                writer.write(f"{name}.weight", counted(source.blocks(max(1, BLOCK_NUMBERS // shape[1:].numel()))))
            return True

        fill(prepared, model, None, take)


# ---- The receipt ----


def _windows(prepared: Prepared, text: ReceiptText) -> Windows:
    tokenizer = prepared.tokenizer
    assert tokenizer is not None
    bos = tokenizer.bos_id if tokenizer.add_bos else None
    # No more is encoded than could be read.
    texts = [tokenizer.encode(part[: 64 * MAX_RECEIPT_TOKENS], bos=False) for part in text.texts]
    length = min(WINDOW, prepared.config.max_position_embeddings)
    windows = Windows.of(texts, length, bos, MAX_RECEIPT_TOKENS)
    if windows.count == 0:
        raise UserError(f"{text.name}: has no two tokens, so that there is nothing to predict; give a longer text")
    if int(windows.tokens_BT.max()) >= prepared.config.vocab_size:
        raise UserError(f"{text.name}: has tokens that {prepared.name} does not know")
    return windows


def _measure(prepared: Prepared, directory: Path, text: ReceiptText, windows: Windows) -> Receipt:
    """Both models read the text with weights from the disk: the quantized ones those that were just written."""
    assert prepared.path is not None
    assert prepared.plan is not None
    device, dtype = prepared.device.device, prepared.dtype.dtype
    quantized, quantized_source = stored_model(prepared, directory)
    original = meta_model(prepared.config)
    original_source = weight_sources(original, prepared.path, device, dtype)
    total = prepared.plan.nbytes + prepared.plan.original_nbytes
    with Progress("comparing with the unquantized model", total, in_bytes=True) as progress:
        weights = Streamed(quantized, quantized_source, progress.advance)
        original_weights = Streamed(original, original_source, progress.advance)
        found = compare(quantized, weights, original, original_weights, windows, device, dtype)
    return Receipt(
        text.name,
        text.sha256,
        found.tokens,
        finite(perplexity(found.loss)),
        finite(perplexity(found.reference_loss)),
        finite(found.divergence),
        finite(found.agreement),
        prepared.dtype.name,
        device.type,
        versions(),
    )
