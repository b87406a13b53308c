"""`--quantize NAME|FILE|JSON` -> a QuantRecipe, every part of it checked. Knows what may be asked for, not which layers
there are, and imports no torch.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from config.errors import UserError
from config.settings import DEVICES, DTYPES, Setting, shorten
from quant.schemes import SCHEMES, Arguments, Scheme

MAX_BYTES = 2**20
_DIRECTORY = Path(__file__).resolve().parent.parent / "config" / "quant"
READY_MADE = {name: _DIRECTORY / f"{name}.json" for name in sorted(file.stem for file in _DIRECTORY.glob("*.json"))}
"""The recipes that come with the program: name -> file."""

SETTINGS = {"precision": ("dtype", DTYPES), "executor": ("accelerator", DEVICES)}
"""Keys that set something beside quantization: their argument, and what it may be."""
SPELLINGS = {"group_size": "groupsize", "bit_width": "bitwidth"}
"""Other spellings of arguments, torchao's among them."""
OTHER_WORDS = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32", "gpu": "cuda"}
"""What people may write for a dtype or device, where no letters lead to the right one."""

_WHAT_TO_GIVE = f"give {', '.join(READY_MADE)}, a JSON file, or the JSON itself beginning with {{"


@dataclass(frozen=True)
class Entry:
    """A scheme, its arguments, and the layers it is for."""

    key: str
    args: Arguments
    layers: tuple[str, ...] = ()
    """Patterns of module names; none: every layer of the scheme's kind that no entry with patterns takes."""
    skip: tuple[str, ...] = ()
    """Patterns of those that it leaves alone."""

    @property
    def scheme(self) -> Scheme:
        return SCHEMES[self.key]

    def spelled(self) -> dict[str, Any]:
        """Its value in a recipe, every argument written out."""
        scheme, args = self.scheme, self.args
        value: dict[str, Any] = {}
        if len(scheme.bits) > 1:
            value["bitwidth"] = args.bits
        if scheme.groups is not None:
            value["groupsize"] = args.group_size or scheme.groups.whole_row
        if scheme.has_weight_zeros is None:
            value["has_weight_zeros"] = args.has_weight_zeros
        for name, patterns in (("layers", self.layers), ("skip", self.skip)):
            if patterns:
                value[name] = list(patterns)
        return value


@dataclass(frozen=True)
class QuantRecipe:
    """What is to be quantized how, and what else the recipe sets. Two of the same meaning have the same `text`."""

    entries: tuple[Entry, ...]
    dtype: Setting | None
    device: Setting | None
    text: str
    """The recipe as JSON with every default written out; `read_recipe` reads it as the same recipe."""
    name: str
    """Where it came from, in the words of errors: "--quantize cpu", "--quantize my.json"."""


def read_recipe(text: str, source: str, say: Callable[[str], None] = lambda line: None) -> QuantRecipe:
    """Read a recipe; `source` is who gave it ("--quantize", "TORCHCHAT_QUANTIZE"). Raises UserError with one line.

    Text that begins with "{" (or "[", which is refused) is JSON, the name of a ready-made recipe is that, and anything
    else is the path of a file: nothing is found out by trying. `say` is told of a file that has the name of a
    ready-made recipe.
    """
    if not text.strip():
        raise UserError(f"{source} is empty; {_WHAT_TO_GIVE}")
    if text.lstrip().startswith(("{", "[")):
        where, data = source, text.encode(errors="surrogateescape")
    else:
        where, data = f"{source} {shorten(text)}", _read_file(text, source, say)
    if len(data) > MAX_BYTES:
        raise UserError(f"{where}: over {MAX_BYTES >> 20} MB; a recipe is a small JSON object")
    values = _parse(data, where)
    settings = {key: _setting(key, values[key], f'{where} "{key}"') for key in SETTINGS if key in values}
    entries: list[Entry] = []
    for key, value in values.items():
        if key in SCHEMES:
            entries += _entries(key, value, f'{where} "{key}"')
        elif key not in SETTINGS:
            raise UserError(f"{where}: {unknown('key', key, [*SCHEMES, *SETTINGS])}")
    entries.sort(key=lambda entry: list(SCHEMES).index(entry.key))
    _check_general(entries, where)
    spelled = json.dumps(_spelled(settings, entries))
    return QuantRecipe(tuple(entries), settings.get("precision"), settings.get("executor"), spelled, where)


def unknown(what: str, name: str, known: list[str]) -> str:
    """'unknown key "linear:in4", the nearest is "linear:int4"; there are linear:int8, …'."""
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f', the nearest is "{near[0]}"' if near else ""
    return f"unknown {what} {show(name)}{hint}; there are {', '.join(known)}"


def show(value: Any) -> str:
    """A value of JSON as a person wrote it, of any size and depth, in a few words."""
    if isinstance(value, dict):
        return "an object" if value else "an empty object"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return shorten(json.dumps(value), 60)


# ---- Text to values ----


def _read_file(text: str, source: str, say: Callable[[str], None]) -> bytes:
    ready = READY_MADE.get(text)
    if ready is not None and Path(text).is_file():
        say(f"{source} {text} is the recipe of that name that comes with torchchat, not the file ./{text}")
    try:
        with (ready or Path(text)).open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        reason = error.strerror if isinstance(error, OSError) else str(error)
        near = get_close_matches(text.removesuffix(".json"), READY_MADE, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{source} {shorten(text)}: {reason}; {_WHAT_TO_GIVE}{hint}") from error


def _parse(data: bytes, where: str) -> dict[str, Any]:
    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            hint = f": give both under one key, {show(twice)}: [{{…}}, {{…}}]" if twice in SCHEMES else ""
            raise UserError(f"{where}: the key {show(twice)} is there twice{hint}")
        return values

    def refuse_constant(name: str) -> NoReturn:
        raise UserError(f"{where}: {name} is not JSON")

    try:
        values = json.loads(
            data.decode("utf-8-sig"), object_pairs_hook=without_duplicates, parse_constant=refuse_constant
        )
    except UserError:
        raise
    except RecursionError as error:
        raise UserError(f"{where}: nested too deeply") from error
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, a number of thousands of digits
        raise UserError(f"{where}: not JSON: {shorten(str(error))}") from error
    if not isinstance(values, dict):
        raise UserError(f'{where}: a recipe is a JSON object such as {{"linear:int8": {{}}}}, not {show(values)}')
    return values


# ---- Values to entries ----


def _setting(key: str, value: Any, where: str) -> Setting:
    """The value is {argument: VALUE}, or VALUE alone."""
    argument, allowed = SETTINGS[key]
    if isinstance(value, dict) and list(value) == [argument]:
        value = value[argument]
    if not isinstance(value, str):
        raise UserError(f'{where} must be {{"{argument}": one of {", ".join(allowed)}}}, not {show(value)}')
    if value not in allowed:
        word = OTHER_WORDS.get(value.lower(), value.lower())
        near = get_close_matches(word, allowed, n=1, cutoff=0.5)
        hint = f"; the nearest is {near[0]}" if near else ""
        raise UserError(f"{where} must be one of {', '.join(allowed)}, not {show(value)}{hint}")
    return Setting(value, f'quantize "{key}"')


def _entries(key: str, value: Any, where: str) -> list[Entry]:
    """The value is an object of arguments, or a list of them for different layers."""
    values = value if isinstance(value, list) else [value]
    for arguments in values or [value]:
        if not isinstance(arguments, dict):
            example = '{"groupsize": 32}' if SCHEMES[key].groups is not None else '{"layers": "lm_head"}'
            raise UserError(
                f"{where} must be an object of arguments, such as {{}} or {example}, or a list of such objects, "
                f"not {show(value if arguments is value else arguments)}"
            )
    return [_entry(key, arguments, where) for arguments in values]


def _entry(key: str, value: dict[str, Any], where: str) -> Entry:
    scheme = SCHEMES[key]
    known = [
        *(["bitwidth"] if len(scheme.bits) > 1 else []),
        *(["groupsize"] if scheme.groups is not None else []),
        *(["has_weight_zeros"] if scheme.has_weight_zeros is None else []),
        "layers",
        "skip",
    ]
    given: dict[str, tuple[str, Any]] = {}  # argument -> where it stands, for errors; value
    for spelled, argument in value.items():
        name = SPELLINGS.get(spelled, spelled)
        if name not in known:
            raise UserError(f"{where}: {unknown('argument', spelled, known)}")
        if name in given:
            spelled = next(other for other, its_name in SPELLINGS.items() if its_name == name)
            raise UserError(f'{where}: "{name}" and "{spelled}" are the same argument; give one')
        given[name] = (f'{where} "{spelled}"', argument)
    bits = _bits(scheme, *given["bitwidth"]) if "bitwidth" in given else scheme.default_bits or scheme.bits[0]
    zeros = bits < 8 and scheme.has_weight_zeros is True
    if "has_weight_zeros" in given:
        place, zeros = given["has_weight_zeros"]
        if not isinstance(zeros, bool):
            raise UserError(f"{place} must be true or false, not {show(zeros)}")
    size = 0
    if "groupsize" in given:
        size = _group_size(scheme, *given["groupsize"])
    elif scheme.groups is not None:
        size = scheme.groups.default(bits)
    return Entry(
        key,
        Arguments(bits, size, zeros),
        _patterns(*given["layers"]) if "layers" in given else (),
        _patterns(*given["skip"]) if "skip" in given else (),
    )


def _bits(scheme: Scheme, where: str, value: Any) -> int:
    low, high = scheme.bits[0], scheme.bits[-1]
    allowed = f"a whole number from {low} to {high}" if len(scheme.bits) > 2 else f"{low} or {high}"
    number = _whole_number(where, value, allowed)
    if number not in scheme.bits:
        nearest = min(scheme.bits, key=lambda bits: (abs(bits - number), -bits))
        raise UserError(f"{where} must be {allowed}, not {show(number)}; the nearest is {nearest}")
    return number


def _group_size(scheme: Scheme, where: str, value: Any) -> int:
    """As `Arguments` has it: 0 for one scale a row, however the recipe spells that."""
    groups = scheme.groups
    assert groups is not None
    number = _whole_number(where, value, groups.describe())
    if not groups.allows(number):
        raise UserError(
            f"{where} must be {groups.describe()}, not {show(number)}; the nearest is {groups.nearest(number)}"
        )
    return 0 if number == groups.whole_row else number


def _whole_number(where: str, value: Any, allowed: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    hint = "; leave out the quotes" if isinstance(value, str) and value.strip().lstrip("-").isdecimal() else ""
    raise UserError(f"{where} must be {allowed}, not {show(value)}{hint}")


def _patterns(where: str, value: Any) -> tuple[str, ...]:
    patterns = value if isinstance(value, list) else [value]
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        wrong = next((p for p in patterns if not isinstance(p, str) or not p), value)
        raise UserError(
            f'{where} must be a pattern of module names, such as "lm_head" or "*.feed_forward.*", '
            f"or a list of patterns, not {show(wrong)}"
        )
    return tuple(patterns)


def _check_general(entries: list[Entry], where: str) -> None:
    """Refuse two entries that both are for all layers of a kind: known without a model."""
    for target in ("linear", "embedding"):
        general = [entry.key for entry in entries if entry.scheme.target == target and not entry.layers + entry.skip]
        if len(general) > 1:
            what = "linear layer" if target == "linear" else "embedding"
            both = (
                f'"{general[0]}" and "{general[1]}" are both'
                if general[0] != general[1]
                else f'"{general[0]}" is twice'
            )
            raise UserError(f'{where}: {both} for every {what}; give one of them "layers", which then has precedence')


def _spelled(settings: dict[str, Setting], entries: list[Entry]) -> dict[str, Any]:
    values: dict[str, Any] = {key: {SETTINGS[key][0]: setting.value} for key, setting in settings.items()}
    for key in SCHEMES:
        same = [entry.spelled() for entry in entries if entry.key == key]
        if same:
            values[key] = same[0] if len(same) == 1 else same
    return values
