"""`--explain`: what would be built, found out without loading any weights. Gathers the facts, settings and layers, as
small frozen dataclasses; `cli.explain_report` shows them.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from cli.builder import Prepared, meta_model, plan_of
from cli.console import cache_dir_or_say, human_bytes, warn
from cli.needs import Needs, needs_of
from config.settings import shorten
from model import layers
from model.device import known_bandwidth
from model.moe_experts import ExpertLinear
from quant import experts, ops
from quant.plan import Assignment
from quant.receipt import Receipt
from quant.recipe import READY_MADE, Entry, read_recipe

READY_FOR = {"cpu": ("cpu", "cpu-small"), "cuda": ("cuda", "cuda-fast"), "mps": ("mps",)}
"""The recipes to propose where a model does not fit, the gentlest first."""
LOOKED_UP = "PyTorch (lookup)"
assert {name for names in READY_FOR.values() for name in names} <= set(READY_MADE)


@dataclass(frozen=True)
class Resolved:
    """A setting: what it comes to, for a person and for a script, why, and who set it."""

    name: str
    text: str
    value: Any
    why: str
    source: str


@dataclass(frozen=True)
class Layer:
    """A weight. `nbytes` is 0 where another's copy serves."""

    name: str
    shape: tuple[int, ...]
    scheme: str
    """The key of its scheme; the dtype of a weight that is not quantized."""
    arguments: tuple[tuple[str, Any], ...]
    computed_by: str
    nbytes: int
    note: str


@dataclass(frozen=True)
class Group:
    """Layers alike in all but their names."""

    pattern: str
    names: tuple[str, ...]
    layer: Layer
    """The first of them."""

    @property
    def nbytes(self) -> int:
        return self.layer.nbytes * len(self.names)


@dataclass(frozen=True)
class NotQuantized:
    """Weights that a recipe leaves as they are, for one reason."""

    reason: str
    names: tuple[str, ...]
    patterns: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True)
class WouldFit:
    """A change of the flags, and the memory that is needed with it."""

    flags: str
    more: int


@dataclass(frozen=True)
class Explanation:
    """All that is known of a model before its weights are read."""

    settings: tuple[Resolved, ...]
    groups: tuple[Group, ...]
    others: tuple[Group, ...]
    """Norms and biases."""
    not_quantized: tuple[NotQuantized, ...]
    needs: Needs
    would_fit: tuple[WouldFit, ...]
    read_bytes_s: float | None
    """The machine's read bandwidth; None if it could not be measured, or nothing is to run."""
    device: str
    receipt: Receipt | None

    def most_tok_s(self, cache_bytes: int) -> float | None:
        """Tokens a second of one sequence, if nothing took time but reading the weights and so much of the cache."""
        if self.read_bytes_s is None:
            return None
        return self.read_bytes_s / (self.needs.weights_per_token + cache_bytes)


def explain(prepared: Prepared, max_seq_len: int, num_seqs: int = 1, *, compares: bool = False) -> Explanation:
    """What building it would give, for `num_seqs` sequences of `max_seq_len` positions; with 0 positions, what writing
    it to a file would, with a receipt if it `compares`. Raises UserError as building it would, as far as files' headers
    tell.
    """
    needs = needs_of(prepared, max_seq_len, num_seqs, compares=compares)  # first: measuring the bandwidth takes memory
    weights = list(_layers(prepared))
    order = [name for name, _ in meta_model(prepared.config).named_modules()]
    device = prepared.device.device
    return Explanation(
        settings=tuple(_settings(prepared, max_seq_len)),
        groups=tuple(_grouped([layer for layer in weights if len(layer.shape) > 1], order)),
        others=tuple(_grouped([layer for layer in weights if len(layer.shape) == 1], order)),
        not_quantized=tuple(_not_quantized(prepared, order)),
        needs=needs,
        would_fit=() if needs.fits else tuple(_would_fit(prepared, needs, num_seqs)),
        read_bytes_s=_read_bytes_s(device) if max_seq_len else None,
        device=device.type,
        receipt=prepared.stored.receipt if prepared.stored is not None else None,
    )


def _read_bytes_s(device: torch.device) -> float | None:
    try:
        return known_bandwidth(device, cache_dir_or_say(), warn).read_gb_s * 1e9
    except torch.OutOfMemoryError:
        return None


# ---- Settings ----


def _settings(prepared: Prepared, length: int) -> list[Resolved]:
    settings, plan = prepared.settings, prepared.plan
    recipe = None if settings.quantize is None else json.loads(settings.quantize)
    name = f"{prepared.name}, random weights" if settings.random_weights else prepared.name
    limit = f"the model was made for {prepared.config.max_position_embeddings:,}"
    quantize_source = settings.source("quantize")
    if prepared.stored is not None:
        quantize_source = "stored with the weights"
    elif settings.quantize_source is not None:
        quantize_source = shorten(settings.quantize_source, 40)

    def switch(key: str, on: bool) -> Resolved:
        return Resolved(key, "yes" if on else "no", on, "", settings.source(key))

    def chosen(key: str, value: str, why: str) -> Resolved:
        source = settings.source(key)
        return Resolved(key, value, value, "" if why == source else why, source)

    building = [
        Resolved("model", name, prepared.name, "", settings.source("model")),
        chosen("device", prepared.device.device.type, prepared.device.why),
        chosen("dtype", prepared.dtype.name, prepared.dtype.why),
        Resolved("quantize", "no" if plan is None else plan.describe(), recipe, "", quantize_source),
    ]
    running = [
        switch("compile", settings.compile),
        switch("compile_prefill", settings.compile_prefill),
        Resolved("max_seq_len", f"{length:,}", length, limit, settings.source("max_seq_len")),
    ]
    return building + running if length else building


# ---- Layers ----


def _layers(prepared: Prepared) -> Iterable[Layer]:
    """Every weight, in the order of the modules."""
    device, dtype, plan = prepared.device.device, prepared.dtype, prepared.plan
    plain = layers.computed_by(device, dtype.dtype)
    first: dict[int, str] = {}
    for name, module in meta_model(prepared.config).named_modules():
        assignment = None if plan is None else plan.assignment(name)
        if assignment is not None:
            yield _quantized(assignment, module, prepared)
        for key, parameter in module.named_parameters(recurse=False):
            if assignment is not None and key == "weight":
                continue
            full = f"{name}.{key}".removesuffix(".weight")
            twin = first.setdefault(id(parameter), full)
            by = LOOKED_UP if isinstance(module, layers.Table) else "PyTorch"
            if isinstance(module, (nn.Linear, ExpertLinear)) and key == "weight":
                by = plain
            nbytes = parameter.numel() * dtype.dtype.itemsize if twin == full else 0
            note = "" if twin == full else f"one copy with {twin}"
            yield Layer(full, tuple(parameter.shape), dtype.name, (), by, nbytes, note)


def _quantized(assignment: Assignment, module: nn.Module, prepared: Prepared) -> Layer:
    arguments = Entry(assignment.key, assignment.args).spelled()
    device, dtype = prepared.device.device, prepared.dtype.dtype
    if isinstance(module, layers.Table):
        by = LOOKED_UP
    elif isinstance(module, ExpertLinear):
        by = experts.computed_by(assignment.format, device, dtype)
    else:
        by = ops.computed_by(assignment.format, device, dtype)
    note, nbytes = assignment.note or "", assignment.nbytes
    return Layer(assignment.name, assignment.shape, assignment.key, tuple(arguments.items()), by, nbytes, note)


def _grouped(weights: list[Layer], order: list[str]) -> list[Group]:
    """Layers of several blocks that are alike as one group each."""
    groups: dict[tuple[str, Layer], list[Layer]] = {}
    for layer in weights:
        alike = replace(layer, name="", note=re.sub(r"\blayers\.\d+\.", "layers.*.", layer.note))
        groups.setdefault((_in_block(layer.name), alike), []).append(layer)
    found = []
    for members in groups.values():
        names = tuple(layer.name for layer in members)
        (pattern,) = patterns(names, order)
        found.append(Group(pattern, names, members[0]))
    return found


def _not_quantized(prepared: Prepared, order: list[str]) -> list[NotQuantized]:
    found: dict[str, list[tuple[str, int]]] = {}
    for left in prepared.plan.left if prepared.plan is not None else ():
        found.setdefault(left.reason, []).append((left.name, left.nbytes))
    return [
        NotQuantized(
            reason,
            tuple(name for name, _ in members),
            tuple(patterns([name for name, _ in members], order)),
            sum(nbytes for _, nbytes in members),
        )
        for reason, members in found.items()
    ]


def patterns(names: Iterable[str], order: Iterable[str]) -> list[str]:
    """Names with those of several blocks as one: "layers.*.ffn_norm", "layers.0,2-15.ffn_norm". order: of all
    modules, which tells how many blocks there are.
    """
    blocks = {int(found[1]) for name in order if (found := re.match(r"layers\.(\d+)\.", name))}
    numbers: dict[str, list[int]] = {}
    for name in names:
        found = re.match(r"layers\.(\d+)\.", name)
        numbers.setdefault(_in_block(name), []).extend([int(found[1])] if found else [])
    result = []
    for inner, some in numbers.items():
        which = "*" if set(some) == blocks and len(blocks) > 1 else shorten(_ranges(some), 24)
        result.append(inner.replace("layers.*.", f"layers.{which}.", 1))
    return result


def _in_block(name: str) -> str:
    return re.sub(r"^layers\.\d+\.", "layers.*.", name)


def _ranges(numbers: list[int]) -> str:
    """ "0,2-15" of whole numbers in order."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


# ---- What would fit ----


def _would_fit(prepared: Prepared, needs: Needs, num_seqs: int) -> Iterable[WouldFit]:
    """Recipes that make it fit, and the longest context, in whole thousands, that does."""
    if prepared.stored is None:
        for name in READY_FOR[prepared.device.device.type]:
            recipe = read_recipe(name, "--quantize")
            if recipe.text == prepared.settings.quantize:
                continue
            settings = replace(prepared.settings, quantize=recipe.text, quantize_source=recipe.name)
            plan = plan_of(settings, prepared.config, prepared.device, prepared.dtype)
            other = replace(prepared, settings=settings, plan=plan)
            found = needs_of(other, needs.max_seq_len, num_seqs)
            if found.fits:
                yield WouldFit(f"--quantize {name}", found.more)
    shorter = int(needs.max_seq_len * max(0.0, 1 - (needs.more - needs.free) / max(needs.cache, 1))) // 1024 * 1024
    if shorter and (found := needs_of(prepared, shorter, num_seqs)).fits:
        yield WouldFit(f"--max-seq-len {shorter}", found.more)


def not_fitting(needs: Needs, would_fit: Iterable[WouldFit], device: str) -> str:
    """The line that says so."""
    text = f"{human_bytes(needs.more)} are needed, and the {device} device has {human_bytes(needs.free)} free: "
    fitting = [f"{one.flags} would need {human_bytes(one.more)}" for one in would_fit]
    return text + (", ".join(fitting) or "it takes a smaller model, or another --device")
