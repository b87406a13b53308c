"""torchchat.json, the file that makes a directory a quantized model: by which recipe, in which dtype, from what, and
how good it is. Knows that file and no tensors; imports no torch.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.errors import UserError
from config.settings import shorten
from quant.receipt import Receipt, is_versions
from quant.recipe import MAX_BYTES, SETTINGS, QuantRecipe, read_recipe

FILE = "torchchat.json"
FORMAT = 1
"""To be raised when a recipe comes to mean other tensors than it did, or when the file says more than it did."""
STORED_DTYPES = ("bf16", "fp16", "fp32")
_KEYS = {"format", "recipe", "dtype", "source", "versions", "receipt"}
_AGAIN = "quantize the model again"


@dataclass(frozen=True)
class Stored:
    """What the file says."""

    recipe: QuantRecipe
    dtype: str
    """Of the scales and of all that is not quantized, as --dtype spells it."""
    source: str
    """The model that was quantized, as somebody named it."""
    versions: Mapping[str, str]
    """Of torch, torchao and torchchat, which wrote it."""
    receipt: Receipt | None

    def metadata(self) -> dict[str, str]:
        """What the file with the weights says of itself, so that another's is not taken for it."""
        return {"recipe": self.recipe.text, "dtype": self.dtype}

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "format": FORMAT,
            "recipe": json.loads(self.recipe.text),
            "dtype": self.dtype,
            "source": self.source,
            "versions": dict(self.versions),
            "receipt": self.receipt.document() if self.receipt is not None else None,
        }


def layers_only(recipe: QuantRecipe) -> QuantRecipe:
    """The recipe without the device and dtype that it sets: what a model was made on is not where it must run."""
    schemes = {key: value for key, value in json.loads(recipe.text).items() if key not in SETTINGS}
    return read_recipe(json.dumps(schemes), recipe.name)


def read_stored(path: Path) -> Stored | None:
    """What the torchchat.json of the model at `path`, a directory or a file in it, says; None where there is none.

    Raises UserError when it is damaged, or of a version of torchchat that stores otherwise.
    """
    file = (path if path.is_dir() else path.parent) / FILE
    if not file.exists():
        return None
    values = _read(file)
    if values.get("format") != FORMAT:
        made_by = values.get("versions")
        by = made_by.get("torchchat") if isinstance(made_by, dict) else None
        version = f" (torchchat {shorten(by, 20)})" if isinstance(by, str) else ""
        raise UserError(
            f'{file}: "format" is {shorten(json.dumps(values.get("format")))}{version}, and this torchchat reads '
            f"{FORMAT}: use the version that wrote it, or quantize the model again"
        )
    for key in sorted(_KEYS ^ set(values)):
        raise UserError(f'{file}: "{key}" is {"unknown" if key in values else "missing"}; {_AGAIN}')
    for key, right in (
        ("recipe", isinstance(values["recipe"], dict) and not set(SETTINGS) & set(values["recipe"])),
        ("dtype", values["dtype"] in STORED_DTYPES),
        ("source", isinstance(values["source"], str)),
        ("versions", is_versions(values["versions"])),
    ):
        if not right:
            raise UserError(f'{file}: "{key}" is not what torchchat writes there; {_AGAIN}')
    receipt = values["receipt"]
    return Stored(
        read_recipe(json.dumps(values["recipe"]), f'{file} "recipe"'),
        values["dtype"],
        values["source"],
        values["versions"],
        None if receipt is None else Receipt.read(receipt, f'{file}: "receipt"'),
    )


def read_receipt(path: Path) -> Receipt | None:
    """The quality receipt of the model at `path`; None for a model without one. Raises UserError as `read_stored`."""
    stored = read_stored(path)
    return None if stored is None else stored.receipt


def _read(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from None
    try:
        values = json.loads(data) if len(data) <= MAX_BYTES else None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{file}: is not what torchchat writes, a small JSON object; {_AGAIN}")
    return values
