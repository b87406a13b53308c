"""`--quantize FILE|JSON` -> a checked JSON object and what it says about precision and executor. Quantizes nothing."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from config.errors import UserError
from config.settings import DEVICES, DTYPES, Setting, one_of, shorten

MAX_BYTES = 2**20


@dataclass(frozen=True)
class Recipe:
    """What the JSON sets beside quantization: each a setting with its source, or None."""

    dtype: Setting | None
    device: Setting | None


def read_recipe(text: str, source: str) -> Recipe:
    """Read a recipe; `source` is who gave it ("--quantize", "TORCHCHAT_QUANTIZE"). Raises UserError with one line.

    Text that begins with "{" is JSON and anything else a path: nothing is found out by trying, so that long JSON is
    never taken for a file name.
    """
    if text.lstrip().startswith("{"):
        where, data = source, text.encode(errors="surrogateescape")
    else:
        where, data = f"{source} {shorten(text)}", _read_file(text, source)
    if len(data) > MAX_BYTES:
        raise UserError(f"{where}: over {MAX_BYTES >> 20} MB; a recipe is a small JSON object")
    entries = _parse(data, where)
    dtype = _entry(entries, "precision", "dtype", DTYPES, where)
    device = _entry(entries, "executor", "accelerator", DEVICES, where)
    if entries:
        names = ", ".join(shorten(json.dumps(name)) for name in list(entries)[:3])
        raise UserError(
            f"{where}: quantization is not built in this version, so {names} cannot be done; "
            'only "precision" and "executor" are understood'
        )
    return Recipe(dtype=dtype, device=device)


def _read_file(text: str, source: str) -> bytes:
    try:
        with Path(text).open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(
            f"{source} {shorten(text)}: {error.strerror}; give a JSON file, or the JSON itself beginning with {{"
        ) from error


def _parse(data: bytes, where: str) -> dict[str, Any]:
    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{where}: the key {shorten(json.dumps(twice))} is there twice")
        return entries

    def refuse_constant(name: str) -> NoReturn:
        raise UserError(f"{where}: {name} is not JSON")

    try:
        entries = json.loads(
            data.decode("utf-8-sig"), object_pairs_hook=without_duplicates, parse_constant=refuse_constant
        )
    except UserError:
        raise
    except RecursionError as error:
        raise UserError(f"{where}: nested too deeply") from error
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, a number of thousands of digits
        raise UserError(f"{where}: not JSON: {shorten(str(error))}") from error
    if not isinstance(entries, dict):
        raise UserError(f"{where}: a recipe is a JSON object, not {shorten(json.dumps(entries))}")
    return entries


def _entry(entries: dict[str, Any], key: str, inner: str, allowed: tuple[str, ...], where: str) -> Setting | None:
    """Take `key` out of `entries`: its value is {inner: VALUE}, or VALUE alone."""
    if key not in entries:
        return None
    value = entries.pop(key)
    if isinstance(value, dict) and list(value) == [inner]:
        value = value[inner]
    name = f'{where} "{key}"'
    if not isinstance(value, str):
        raise UserError(f'{name} must be {{"{inner}": one of {", ".join(allowed)}}}, not {shorten(json.dumps(value))}')
    one_of(name, value, allowed)
    return Setting(value, f'quantize "{key}"')
