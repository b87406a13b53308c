"""A model and a recipe -> a Plan: which layer gets which scheme, how it is stored, what stays as it is and why. Reads
shapes alone, so that a model on the meta device is enough; quantizes nothing.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from config.errors import UserError
from model.layers import Embedding, Linear, RMSNorm
from model.moe_experts import ExpertLinear, Router
from quant.formats import Format
from quant.patterns import select
from quant.recipe import Entry, QuantRecipe
from quant.schemes import Arguments, Level, check, level, place_of

KINDS: dict[str, tuple[tuple[type[nn.Module], ...], str]] = {
    "linear": ((Linear, ExpertLinear), "linear layer"),
    "embedding": ((Embedding,), "embedding"),
}
"""A scheme's target -> the modules that it is for, and what people call them."""

NEVER: dict[type[nn.Module], str] = {RMSNorm: "a norm", Router: "a router: little to gain, much to lose"}
"""Modules that no scheme is for, and why."""

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Assignment:
    """One layer that is quantized."""

    name: str
    shape: tuple[int, int]
    """[N, K]: outputs and inputs of a linear layer, entries and width of a table."""
    key: str
    args: Arguments
    format: Format
    level: Level
    """Whether a kernel of ours computes it or plain PyTorch."""
    nbytes: int
    """Of numbers, scales and zero points; 0 where another layer's copy serves."""
    note: str | None = None
    shares: str | None = None
    """The layer, assigned too, whose numbers are this one's: both were the same weight and are stored alike."""


@dataclass(frozen=True)
class Left:
    """A weight that stays in the model's dtype, and why. `name` is the module's, of a bias the parameter's."""

    name: str
    shape: tuple[int, ...]
    reason: str
    nbytes: int
    """0 for a weight that is another's."""


@dataclass(frozen=True)
class Plan:
    """What quantizing a model by a recipe will do; every weight of the model is in one of the two lists."""

    assignments: tuple[Assignment, ...]
    left: tuple[Left, ...]
    nbytes: int
    """Of all weights, as they will be."""
    original_nbytes: int
    """Of all weights in the model's dtype."""

    def assignment(self, name: str) -> Assignment | None:
        return next((assignment for assignment in self.assignments if assignment.name == name), None)

    def describe(self) -> str:
        """In a line: "linear:int8 (33 layers), embedding (1 layer)"."""
        counts = Counter(assignment.key for assignment in self.assignments)
        return ", ".join(f"{key} ({count} layer{'s' if count > 1 else ''})" for key, count in counts.items())

    def remarks(self) -> list[str]:
        """What a person may not expect, a line each: groups that do not divide a layer's width, copies that tied
        weights become.
        """
        noted: dict[str, list[str]] = {}
        for assignment in self.assignments:
            if assignment.note is not None and assignment.shares is None:
                noted.setdefault(assignment.note, []).append(assignment.name)
        return [f"{name}{f' and {len(more)} more' if more else ''}: {note}" for note, (name, *more) in noted.items()]


def make_plan(
    model: nn.Module,
    recipe: QuantRecipe,
    *,
    device_type: str,
    dtype_name: str,
    compiled: bool = False,
    compute_capability: tuple[int, int] | None = None,
) -> Plan:
    """Decide for each weight of `model`, which may be on the meta device. `compute_capability` is a GPU's, (9, 0).

    An entry with "layers" has precedence over one without. Raises UserError for two of the same rank for one layer, for
    a pattern or an entry that is for no layer, and for a scheme that the device cannot run.
    """
    place = place_of(device_type, compute_capability)
    for entry in recipe.entries:
        check(entry.key, place, compiled, recipe.name)
    itemsize = ITEMSIZE[dtype_name]
    chosen: dict[str, Entry] = {}
    reasons: dict[str, str] = {}
    for target in KINDS:
        found, why_not = _choose(model, recipe, target)
        chosen |= found
        reasons |= why_not
    assignments = _share([_assign(name, model, entry, place, itemsize) for name, entry in chosen.items()], model)
    left = _left(model, {assignment.name for assignment in assignments}, reasons, itemsize)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    assignments.sort(key=lambda assignment: order[assignment.name])
    return Plan(
        tuple(assignments),
        tuple(left),
        sum(assignment.nbytes for assignment in assignments) + sum(one.nbytes for one in left),
        sum(parameter.numel() for parameter in model.parameters()) * itemsize,
    )


def _choose(model: nn.Module, recipe: QuantRecipe, target: str) -> tuple[dict[str, Entry], dict[str, str]]:
    """Of the layers of one kind: which entry each is for, and why the others are for none."""
    kinds, what = KINDS[target]
    names = [
        name for name, module in model.named_modules() if isinstance(module, kinds) and type(module) not in NEVER
    ]
    entries = [entry for entry in recipe.entries if entry.scheme.target == target]
    claims: list[tuple[Entry, set[str]]] = []
    skipped: dict[str, str] = {}
    for entry in entries:
        where = f'{recipe.name} "{entry.key}"'
        mine = select(entry.layers, names, f'{where} "layers"', what) if entry.layers else set(names)
        skip = select(entry.skip, names, f'{where} "skip"', what) if entry.skip else set()
        skipped |= dict.fromkeys(mine & skip, f'"skip" of {entry.key}')
        claims.append((entry, mine - skip))
    winners = {name: _winner(name, claims, recipe) for name in names}
    chosen = {name: entry for name, entry in winners.items() if entry is not None}
    for entry, mine in claims:
        if not any(other is entry for other in chosen.values()):
            taken = f": all it is for have another: {_few(mine)}" if mine else ""
            raise UserError(f'{recipe.name} "{entry.key}": no {what} is left for it{taken}; leave it out')
    none = f"no scheme for {'an embedding' if target == 'embedding' else 'linear layers'}"
    return chosen, {name: skipped.get(name, none) for name in names if name not in chosen}


def _winner(name: str, claims: Sequence[tuple[Entry, set[str]]], recipe: QuantRecipe) -> Entry | None:
    """The one entry that a layer gets: those with "layers" go first."""
    mine = [entry for entry, names in claims if name in names]
    rivals = [entry for entry in mine if entry.layers] or mine
    if len(rivals) > 1:
        one, other = rivals[0], rivals[1]
        both = (
            f'"{one.key}" and "{other.key}" are' if one.key != other.key else f'"{one.key}" is there twice and both are'
        )
        hint = 'narrow the "layers" of one' if one.layers else 'give one of them "layers", which then has precedence,'
        raise UserError(f'{recipe.name}: {both} for the layer "{name}"; {hint} or name it in "skip"')
    return rivals[0] if rivals else None


def _assign(name: str, model: nn.Module, entry: Entry, place: str, itemsize: int) -> Assignment:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, nn.Parameter)
    N, K = weight.shape
    stored = entry.scheme.format(entry.args)
    note = None
    if stored.group_size and K % stored.group_size:
        last = f"{K % stored.group_size} of {stored.group_size}"
        note = f"groupsize {stored.group_size} does not divide its width {K}: the last group of a row has {last}"
    return Assignment(
        name,
        (N, K),
        entry.key,
        entry.args,
        stored,
        level(entry.key, stored, place),
        stored.nbytes(N, K, itemsize),
        note,
    )


def _share(assignments: Sequence[Assignment], model: nn.Module) -> list[Assignment]:
    """One copy for layers with one weight that are stored alike: a table of embeddings and an output layer tied to it.
    The table has the copy. A layer that is stored otherwise than its twin gets a copy of its own, and says so.
    """
    twins = _twins(model)
    done: dict[str, Assignment] = {}
    for one in sorted(assignments, key=lambda one: isinstance(model.get_submodule(one.name), Linear)):
        others = [done[name] for name in twins[one.name] if name in done]
        same = next((o for o in others if o.format.stored_like(one.format) and o.args.bits == one.args.bits), None)
        if same is not None:
            one = replace(one, shares=same.name, nbytes=0, note=f"one copy with {same.name}")
        elif twins[one.name] and (others or isinstance(model.get_submodule(one.name), Linear)):
            other = "which is stored otherwise" if others else "which stays as it is"
            note = f"tied to {twins[one.name][0]}, {other}: a copy of its own"
            one = replace(one, note=f"{one.note}; {note}" if one.note else note)
        done[one.name] = one
    return list(done.values())


def _left(model: nn.Module, assigned: set[str], reasons: dict[str, str], itemsize: int) -> list[Left]:
    """Every parameter that no assignment takes; a tied one's bytes are counted once."""
    twins = _twins(model)
    left: list[Left] = []
    seen: dict[int, str] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "weight" and module_name in assigned:
                continue
            full = f"{module_name}.{name}".removesuffix(".weight")
            other = NEVER.get(type(module), "a bias" if name == "bias" else "no layer's weight")
            reason = reasons.get(full, other)
            twin = seen.setdefault(id(parameter), full)
            if twin != full:
                reason = f"{reason}; one copy with {twin}"
            elif any(name in assigned for name in twins[module_name]):
                reason = f"{reason}; tied to {twins[module_name][0]}, whose quantized copy does not serve it"
            left.append(Left(full, tuple(parameter.shape), reason, 0 if twin != full else parameter.numel() * itemsize))
    return left


def _twins(model: nn.Module) -> dict[str, list[str]]:
    """Of each module: the others whose weight is the same parameter."""
    weights: dict[str, int] = {}
    for name, module in model.named_modules():
        weights[name] = next((id(p) for inner, p in module.named_parameters(recurse=False) if inner == "weight"), 0)
    return {
        name: [other for other, its in weights.items() if its == weight and weight and other != name]
        for name, weight in weights.items()
    }


def _few(names: set[str]) -> str:
    some = sorted(names)[:2]
    return ", ".join(some) + (", …" if len(names) > len(some) else "")
