"""The command `list`: which models are on this machine and which are known. Reads names, sizes and small JSON files;
imports no torch and opens no network.
"""

import argparse
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.console import human_bytes, warn
from config.errors import UserError
from config.hub_cache import (
    cached_repositories,
    disk_size,
    find_in_hub_cache,
    folder_of,
    gguf_models,
    has_weights,
)
from config.registry import MODELS_DIR, ModelEntry, entries, lookup, models_dir
from model.config_hf import from_hf
from quant.directory import Stored, read_stored
from quant.receipt import Receipt

_MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True)
class Here:
    """A model on this machine. `name`: what a command takes."""

    name: str
    path: Path
    nbytes: int
    entry: ModelEntry | None = None
    whole: bool = True
    """False: a download that was cut off."""
    stored: Stored | None = None
    """What a quantized copy says of itself."""

    def document(self) -> dict[str, Any]:
        stored = self.stored
        return {
            "name": self.name,
            "path": str(self.path),
            "bytes": self.nbytes,
            "complete": self.whole,
            "registry": self.entry.name if self.entry is not None else None,
            "quantized": None
            if stored is None
            else {
                "recipe": json.loads(stored.recipe.text),
                "dtype": stored.dtype,
                "source": stored.source,
                "receipt": stored.receipt.document() if stored.receipt is not None else None,
            },
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "torchchat list [WORD …] [options]"
    parser.add_argument("words", metavar="WORD", nargs="*", help="only models with all these words in name or purpose")
    parser.add_argument("--here", action="store_true", help="only what is on this machine")
    parser.add_argument(
        "--in",
        dest="directories",
        metavar="DIRECTORY",
        action="append",
        default=[],
        help="look for models there too, as for quantized copies; may be given again",
    )
    parser.add_argument("--json", action="store_true", help="as one JSON document")
    parser.epilog = (
        f"What is here: the built-in model, the Hugging Face cache, and the directories of models in the current "
        f"directory and in the one that {MODELS_DIR} names."
    )


def run(args: argparse.Namespace) -> int:
    places = [Path(), *([found] if (found := models_dir()) is not None else []), *map(Path, args.directories)]
    for place in places:
        if not place.is_dir():
            raise UserError(f"--in {place}: is not a directory")
    words = [word.lower() for word in args.words]
    here = [model for model in _all_here(places) if _has_words(words, _words_of_here(model))]
    known = [entry for entry in entries() if entry.hub_id is not None and _has_words(words, _words_of(entry))]
    if args.json:
        print(json.dumps(_document(here, [] if args.here else known), indent=2, ensure_ascii=False))
        return 0
    there = {model.entry.name for model in here if model.entry is not None and model.whole}
    if not args.here:
        _print_known([entry for entry in known if entry.name not in there])
    _print_here(here)
    if not here and (args.here or not known):
        warn(f"nothing here has {' and '.join(args.words)} in its name" if words else "nothing is here")
    return 0


def _all_here(places: Sequence[Path]) -> Iterator[Here]:
    for entry in entries():
        if entry.directory is not None and has_weights(entry.directory):
            yield Here(entry.name, entry.directory, disk_size(entry.directory), entry)
    for hub_id in cached_repositories():
        yield from _in_cache(hub_id)
    seen: set[Path] = set()
    for place in places:
        if (resolved := place.resolve()) not in seen:
            seen.add(resolved)
            yield from _in_directory(place)


def _in_cache(hub_id: str) -> Iterator[Here]:
    """One model; or each GGUF file of a repository that holds those; nothing for what is no language model."""
    entry, folder = lookup(hub_id), folder_of(hub_id)
    snapshot = find_in_hub_cache(hub_id)
    name = entry.name if entry is not None else hub_id
    if snapshot is None:
        files = _gguf_files(folder / "snapshots")
        if any((folder / "blobs").glob("*.incomplete")):
            yield Here(name, folder, disk_size(folder), entry, whole=False)
    elif entry is not None or _runs(snapshot):
        yield Here(name, snapshot, disk_size(folder), entry)
        return
    else:
        files = _gguf_files(snapshot)
    for file in files:
        yield Here(f"{hub_id}:{file.name}", file, file.stat().st_size, entry)


def _in_directory(place: Path) -> Iterator[Here]:
    """The models among what is in a directory, by what a command takes for them."""
    by_name = place == models_dir()
    for path in sorted(place.iterdir()):
        name = path.name if by_name else str(path) if path.is_absolute() else os.path.join(".", path)
        if path.is_file() and gguf_models([path.name]):
            yield Here(name, path, path.stat().st_size)
        elif path.is_dir() and has_weights(path):
            try:
                stored = read_stored(path)
            except UserError as error:
                warn(str(error))
                continue
            if stored is not None or _runs(path) or _gguf_files(path):
                yield Here(name, path, disk_size(path), stored=stored)


def _runs(directory: Path) -> bool:
    """Whether its configuration is one of a language model that can be run here."""
    if (directory / "params.json").is_file():
        return True
    file = directory / "config.json"
    try:
        if file.stat().st_size > _MAX_CONFIG_BYTES:
            return False
        config = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(config, dict):
            from_hf(config, str(file))
            return True
    except (OSError, ValueError, RecursionError):  # a UserError is a ValueError
        pass
    return False


def _gguf_files(folder: Path) -> list[Path]:
    files = {path.resolve(): path for path in sorted(folder.rglob("*.gguf")) if path.is_file()}
    return [path for path in files.values() if gguf_models([path.name])]


def _has_words(words: Iterable[str], text: str) -> bool:
    return all(word in text.lower() for word in words)


def _words_of(entry: ModelEntry) -> str:
    return " ".join((entry.name, *entry.aliases, entry.hub_id or "", entry.description))


def _words_of_here(model: Here) -> str:
    about = _words_of(model.entry) if model.entry is not None else ""
    quantized = f"quantized {model.stored.source}" if model.stored is not None else ""
    return f"{model.name} {about} {quantized}"


def _document(here: Sequence[Here], known: Sequence[ModelEntry]) -> dict[str, Any]:
    return {
        "here": [model.document() for model in here],
        "known": [
            {
                "name": entry.name,
                "aliases": list(entry.aliases),
                "hub_id": entry.hub_id,
                "parameters": entry.parameters,
                "context": entry.context,
                "gated": entry.gated,
                "description": entry.description,
            }
            for entry in known
        ],
    }


def _print_known(known: Sequence[ModelEntry]) -> None:
    if not known:
        return
    print("known (`torchchat download NAME`; sizes in bf16; * access must be asked for)")
    rows = [
        (
            entry.name + (" *" if entry.gated else ""),
            short_count(entry.parameters),
            short_context(entry.context),
            human_bytes(entry.parameters * 2),
            entry.description,
        )
        for entry in known
    ]
    _print_table(("name", "parameters", "context", "size", "what for"), rows)
    print()


def _print_here(here: Sequence[Here]) -> None:
    if not here:
        return
    print("on this machine")
    rows = [
        (
            model.name,
            short_count(model.entry.parameters) if model.entry is not None else "",
            short_context(model.entry.context) if model.entry is not None else "",
            human_bytes(model.nbytes),
            _purpose(model),
        )
        for model in here
    ]
    _print_table(("name", "parameters", "context", "size", "what for"), rows)


def _purpose(model: Here) -> str:
    if not model.whole:
        return f"a download that was cut off: `torchchat download {model.name}` goes on"
    if model.stored is not None:
        schemes = ", ".join(entry.key for entry in model.stored.recipe.entries)
        return f"{model.stored.source}, quantized: {schemes}{_quality(model.stored.receipt)}"
    return model.entry.description if model.entry is not None else ""


def _quality(receipt: Receipt | None) -> str:
    """What it lost, in short."""
    if receipt is None:
        return "; not measured"
    lost = ""
    if receipt.perplexity is not None and receipt.perplexity_unquantized:
        lost = f"; perplexity {receipt.perplexity / receipt.perplexity_unquantized - 1:+.2%}"
    return lost + (f", top-1 agreement {receipt.top1_agreement:.1%}" if receipt.top1_agreement is not None else "")


def _print_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """The first and last columns to the left, the figures between them to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head) - 1)]
    for row in (head, *rows):
        figures = [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:], strict=True)]
        print(f"  {'  '.join((row[0].ljust(widths[0]), *figures))}  {row[-1]}".rstrip())


def short_count(count: int) -> str:
    """ "596 M", "8.03 B": three digits, in the field's words."""
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if count >= size * 0.9995:
            return f"{count / size:.3g} {unit}"
    return f"{count:,}"


def short_context(tokens: int) -> str:
    """ "128k" of 131,072."""
    return f"{tokens // 1024}k" if tokens >= 1024 else str(tokens)
