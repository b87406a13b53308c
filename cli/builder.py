"""Settings -> Engine, in named steps. `prepare` does what needs no weights, so that bad input is refused before they
are read; `build` does the rest. Knows every part and decides nothing that a setting decides.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cli import exported, pte
from cli.console import Progress, cache_dir_or_say, status, warn
from cli.hub import locate
from cli.pte import Pte
from cli.random_weights import fill_random
from config.errors import UserError
from config.settings import BuildSettings, SamplingParams
from generate.artifacts import check_can_compile
from generate.compilation import CompiledSteps
from generate.engine import Engine
from generate.executorch import Program
from generate.scheduler import slots_needed
from generate.stats import Ledger, weight_bytes_per_token
from model.chat_template import ChatTemplate, load_chat_template
from model.config import ModelConfig, from_hf, load_config
from model.device import (
    TORCH_DTYPES,
    DeviceChoice,
    DtypeChoice,
    give_back_freed_memory,
    resolve_device,
    resolve_dtype,
)
from model.export import Package
from model.gguf_within import sampling_within, types_within
from model.kv_cache import KVCache
from model.loader import Source, SourceOf, TakeWeight, fill_parameters, load_weights
from model.saved import saved_sources
from model.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from model.transformer import Transformer
from quant import native
from quant.apply import QuantizeOnLoad, replace_modules
from quant.directory import Stored, read_stored
from quant.plan import Plan, make_plan
from quant.recipe import read_recipe

DEFAULT_CONTEXT = 4096
"""Positions of the cache when nobody says how many: enough for most, and no surprise in memory."""
PREFILL_CHUNK = {"cpu": 512, "mps": 512, "cuda": 2048}
GIVE_BACK_EVERY = 2**26
"""So many weights are quantized before what that left of the memory in pieces is given back."""


@dataclass(frozen=True)
class Prepared:
    """What is known of a model before its weights are read. No tokenizer for random weights: nothing they say is
    text.
    """

    settings: BuildSettings
    name: str
    path: Path | None
    config: ModelConfig
    device: DeviceChoice
    dtype: DtypeChoice
    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    sampling: SamplingParams
    """What the model's generation_config.json recommends, over our defaults."""
    ledger: Ledger
    plan: Plan | None = None
    """What is quantized how; None: nothing is."""
    stored: Stored | None = None
    """What the directory says, where the weights are quantized already; `settings` then have its recipe."""
    package: Package | None = None
    """Where the model is exported: its weights and compiled steps; `settings` then say what it was exported with."""
    pte: Pte | None = None
    """Where it is exported for ExecuTorch."""

    def remarks(self) -> list[str]:
        """What a person may not expect of how it is quantized now, or of a package."""
        if self.package is not None:
            return exported.remarks(self.package)
        if self.pte is not None:
            return pte.remarks(self.pte)
        if self.stored is not None:
            return []
        path = None if self.settings.random_weights else self.path
        types = [] if path is None else types_within(path)
        undone = [f"its {' and '.join(types)} weights are decoded to {self.dtype.name}"] if types else []
        if undone and self.plan is None:
            undone[0] += "; --quantize keeps them small (see docs/quantization.md)"
        return [*undone, *(self.plan.remarks() if self.plan is not None else ())]


@dataclass(frozen=True)
class Built:
    """An engine that is ready to run, and what it was built from."""

    engine: Engine
    model: Transformer | Program
    prepared: Prepared

    @property
    def ledger(self) -> Ledger:
        return self.prepared.ledger


def prepare(settings: BuildSettings, *, needs_tokenizer: bool = True) -> Prepared:
    """Everything but the weights: model, device, dtype, tokenizer, template. Raises UserError, also for a model without
    a tokenizer unless it needs none.
    """
    ledger = Ledger()
    model = locate(settings.model, random_weights=settings.random_weights)
    with (
        ledger.phase("load"),
        exported.contents(settings, model.path) as (settings, path, package),
        pte.contents(settings, path) as (settings, path, program),
    ):
        if path is not None:
            config = load_config(path)
        else:
            assert model.entry is not None
            config = from_hf(model.entry.config, f"the registry's {model.name}")
        if settings.max_seq_len is not None and settings.max_seq_len > config.max_position_embeddings:
            raise UserError(
                f"--max-seq-len {settings.max_seq_len} is more than the {config.max_position_embeddings} positions "
                f"that {model.name} was made for"
            )
        stored = None
        if path is not None and not settings.random_weights:
            stored = read_stored(path)
        if stored is not None:
            settings = _as_stored(settings, stored)
        device = resolve_device(settings.device)
        dtype = resolve_dtype(settings.dtype, device.device, stored.dtype if stored is not None else None)
        if (settings.compile or settings.compile_prefill) and package is None:
            check_can_compile(cache_dir_or_say())
        tokenizer = template = None
        sampling = SamplingParams()
        if path is not None and not settings.random_weights:
            if needs_tokenizer or has_tokenizer(path):
                tokenizer = load_tokenizer(path, config)
                template = load_chat_template(path, tokenizer, config, model.name)
            sampling = _recommended_sampling(path)
            give_back_freed_memory()  # a vocabulary takes ten times more while it is read
        plan = plan_of(settings, config, device, dtype)
    return Prepared(
        settings, model.name, model.path, config, device, dtype, tokenizer, template, sampling, ledger, plan, stored,
        package, program,
    )  # fmt: skip


def _as_stored(settings: BuildSettings, stored: Stored) -> BuildSettings:
    """The settings with the recipe that the weights are quantized by."""
    if settings.quantize is not None:
        raise UserError(
            f"{settings.quantize_source}: {settings.model} is quantized already ({stored.recipe.text}); leave it out, "
            f"or quantize the original, {stored.source}"
        )
    return dataclasses.replace(settings, quantize=stored.recipe.text, quantize_source=stored.recipe.name)


def plan_of(settings: BuildSettings, config: ModelConfig, device: DeviceChoice, dtype: DtypeChoice) -> Plan | None:
    """What the recipe of the settings, if there is one, does to a model. Raises UserError."""
    if settings.quantize is None:
        return None
    recipe = read_recipe(settings.quantize, settings.quantize_source or "--quantize")
    return make_plan(
        meta_model(config),
        recipe,
        device_type=device.device.type,
        dtype_name=dtype.name,
        compiled=settings.compile or settings.compile_prefill,
        compute_capability=torch.cuda.get_device_capability(device.device) if device.device.type == "cuda" else None,
    )


def context_length(prepared: Prepared, wanted: int = 0) -> int:
    """Positions of the cache: as many as was said; else DEFAULT_CONTEXT, or `wanted` if that is more, within what the
    model was made for. It hardly depends on the prompt, so that what was compiled for one prompt serves the next.
    """
    if prepared.settings.max_seq_len is not None:
        return prepared.settings.max_seq_len
    rounded = -(-wanted // 1024) * 1024
    return min(prepared.config.max_position_embeddings, max(DEFAULT_CONTEXT, rounded))


def build(prepared: Prepared, max_seq_len: int | None = None, *, serves: bool = False) -> Built:
    """Weights, cache and engine. `max_seq_len`: positions of the cache, by default `context_length(prepared)`. serves:
    as in `make_engine`.
    """
    length = context_length(prepared) if max_seq_len is None else max_seq_len
    if prepared.pte is not None:
        return Built(pte.engine_of(prepared, prepared.pte), prepared.pte.program, prepared)
    model = load_model(prepared, length)
    return Built(make_engine(prepared, model, length, cache_dir_or_say(), serves=serves), model, prepared)


def load_model(prepared: Prepared, max_seq_len: int) -> Transformer:
    """The weights alone, for engines with a context of `max_seq_len`. Raises UserError."""
    with out_of_memory(prepared, max_seq_len), prepared.ledger.phase("load"):
        if prepared.package is not None:
            model = exported.load_model(prepared.package, _planned(prepared), prepared.device.device)
        else:
            model = _load(prepared)
            _make_products_ready(prepared)
    prepared.ledger.weight_bytes_per_token = weight_bytes_per_token(model)
    return model


def make_engine(
    prepared: Prepared, model: Transformer, max_seq_len: int, keep_in: Path | None, *, serves: bool = False
) -> Engine:
    """An engine for a model that is loaded, with a cache of its own. What it compiles is kept in `keep_in`. serves:
    how many sequences there are changes all the time, so that each batch size is worth a compiled step of its own.
    """
    if prepared.pte is not None:
        return pte.engine_of(prepared, prepared.pte)
    settings, config, ledger = prepared.settings, prepared.config, prepared.ledger
    device, dtype, package = prepared.device.device, prepared.dtype.dtype, prepared.package
    sequences = settings.max_num_seqs
    if package is not None:
        exported.sequences_of(package, sequences)
        sequences = package.metadata.max_num_seqs
    chunk = PREFILL_CHUNK[device.type] if package is None else package.metadata.prefill_chunk
    with out_of_memory(prepared, max_seq_len), ledger.phase("load"):
        cache = KVCache.create(config, slots_needed(sequences), max_seq_len, device, dtype)
        exported_steps = None if package is None else exported.steps(package, model, device)
    steps = exported_steps or CompiledSteps(
        model,
        compile_decode=settings.compile,
        compile_prefill=settings.compile_prefill,
        capture_prefill=serves,
        prefill_chunk=chunk,
        cache_dir=keep_in,
        ledger=ledger,
        report=status,
    )
    prepares = steps.captures or (package is None and (settings.compile or settings.compile_prefill))
    return Engine(
        model,
        cache,
        prepared.tokenizer,
        vocab_size=config.vocab_size,
        eos_ids=eos_ids(prepared),
        max_num_seqs=settings.max_num_seqs,
        prefill_chunk=chunk,
        prefill_fn=steps.prefill,
        decode_fn=steps.decode,
        read_fn=steps.read,
        reads_any_cache=package is not None or not (settings.compile or settings.compile_prefill),
        prepare_fn=steps.prepare if prepares else None,
        every_batch=serves or not prepares,
        ledger=ledger,
    )


def eos_ids(prepared: Prepared) -> frozenset[int]:
    """The tokens that end what the model says."""
    of_tokenizer = prepared.tokenizer.eos_ids if prepared.tokenizer is not None else frozenset()
    return of_tokenizer | frozenset(prepared.config.eos_token_ids)


def _load(prepared: Prepared) -> Transformer:
    dtype = prepared.dtype.dtype
    if prepared.stored is not None:
        return _load_stored(prepared)
    model = meta_model(prepared.config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total = sum(sizes.values()) * dtype.itemsize
    doing = "loading" if prepared.plan is None else "loading and quantizing"
    with Progress(f"{doing} {prepared.name}", total, in_bytes=True) as progress:
        take = None if prepared.plan is None else _quantizing(prepared, prepared.plan, model, progress)
        fill(prepared, model, lambda name: progress.advance(sizes[name] * dtype.itemsize), take)
    if prepared.plan is not None:
        give_back_freed_memory()
    return model


def _quantizing(prepared: Prepared, plan: Plan, model: Transformer, progress: Progress) -> TakeWeight:
    """Quantizes what the plan names, with progress, on the ledger's own account."""
    dtype = prepared.dtype.dtype
    freed = 0

    def count(numbers: int) -> None:
        nonlocal freed
        progress.advance(numbers * dtype.itemsize)
        freed += numbers
        if freed >= GIVE_BACK_EVERY:
            give_back_freed_memory()
            freed = 0

    quantize = QuantizeOnLoad(model, plan, prepared.device.device, dtype, count)

    def take(name: str, module: nn.Module, source: Source) -> bool:
        with prepared.ledger.phase("quantize"):
            return quantize(name, module, source)

    return take


def fill(
    prepared: Prepared, model: Transformer, on_tensor: Callable[[str], None] | None, take: TakeWeight | None
) -> None:
    """The model's own weights, or random ones if those were asked for, into a model on the meta device."""
    device, dtype = prepared.device.device, prepared.dtype.dtype
    if prepared.settings.random_weights:
        fill_random(model, device, dtype, take)
    else:
        assert prepared.path is not None
        load_weights(model, prepared.path, device, dtype, on_tensor, take)


def _make_products_ready(prepared: Prepared) -> None:
    """Compile, or load, the CPU's own code for quantized weights before anybody waits for a first token."""
    quantized = prepared.plan is not None and prepared.plan.assignments
    if quantized and prepared.device.device.type == "cpu":
        with prepared.ledger.phase("compile"):
            if not native.available(say=status):
                why = f"{native.why_not()}; a C++ compiler would help"
                warn(f"quantized weights are multiplied by plain PyTorch, which is slow: {why}")


def _load_stored(prepared: Prepared) -> Transformer:
    """Weights that are quantized already: no torchao, nothing to choose."""
    assert prepared.path is not None
    model, source_of = stored_model(prepared, prepared.path)
    sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    with Progress(f"loading {prepared.name}", sum(sizes.values()), in_bytes=True) as progress:
        fill_parameters(model, source_of, lambda name: progress.advance(sizes[name]))
    return model


def stored_model(prepared: Prepared, path: Path) -> tuple[Transformer, SourceOf]:
    """The quantized model on the meta device, and where in the directory `path` its parameters are; all is checked."""
    assert prepared.stored is not None
    assert prepared.plan is not None
    model = _planned(prepared)
    source_of = saved_sources(
        model,
        path,
        prepared.device.device,
        prepared.dtype.dtype,
        TORCH_DTYPES[prepared.stored.dtype],
        prepared.stored.metadata(),
    )
    return model, source_of


def _planned(prepared: Prepared) -> Transformer:
    """The model as it will be, without its weights."""
    model = meta_model(prepared.config)
    if prepared.plan is not None:
        replace_modules(model, prepared.plan, prepared.dtype.dtype)
    return model


def meta_model(config: ModelConfig) -> Transformer:
    """The model without its weights."""
    with torch.device("meta"):
        return Transformer(config).eval()


@contextmanager
def out_of_memory(prepared: Prepared, length: int) -> Iterator[None]:
    """Says what did not fit, in place of the allocator's own words. `length`: the context's, 0 where there is none."""
    try:
        yield
    except RuntimeError as error:
        # OutOfMemoryError is a GPU's; the allocator of the CPU raises its parent.
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        context, shorter = (f" with a context of {length}", "a smaller --max-seq-len, ") if length else ("", "")
        raise UserError(
            f"{prepared.name} in {prepared.dtype.name}{context} does not fit in the memory of the "
            f"{prepared.device.device.type} device: try {shorter}a 16-bit --dtype, or another --device"
        ) from error


def _recommended_sampling(path: Path) -> SamplingParams:
    """generation_config.json beside the weights, if it is there; for a GGUF file what it says."""
    if (within := sampling_within(path)) is not None:
        return SamplingParams.from_generation_config(within, str(path))
    file = (path if path.is_dir() else path.parent) / "generation_config.json"
    if not file.is_file():
        return SamplingParams()
    try:
        entries: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error
    if not isinstance(entries, Mapping):
        raise UserError(f"{file}: is not a JSON object")
    return SamplingParams.from_generation_config(entries, str(file))
