"""Which models are known by name, and where a model that somebody names lies on this machine. Opens no network; knows
shapes only as the config.json objects of models.json, and what is in a directory only by the names of its files.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from config.errors import UserError

DEFAULT_MODEL = "default"

_PROJECT = Path(__file__).resolve().parent.parent
# What a directory must have one of, to be a model: by the endings of its weights.
_WEIGHT_ENDINGS = (".safetensors", ".bin", ".pth", ".pt")
_MAX_NAME = 4096


@dataclass(frozen=True)
class ModelEntry:
    """One model of the registry. `config` is its config.json as published: the shapes, for a model of random weights.

    The embedded model has a `directory` and no `hub_id`; its `config` is the file in that directory.
    """

    name: str
    aliases: tuple[str, ...]
    description: str
    hub_id: str | None
    directory: Path | None
    config: Mapping[str, Any]


@dataclass(frozen=True)
class ResolvedModel:
    """What a name means here. `path`: the directory or file with the weights, or None where random weights were asked
    for and there are none; `entry`: the registry's entry, if it is of the registry. One of the two is there.
    """

    name: str
    path: Path | None
    entry: ModelEntry | None


def entries() -> tuple[ModelEntry, ...]:
    """Every entry, the embedded model first."""
    return _load_entries()


def find(name: str) -> ModelEntry:
    """The entry of that name, alias or hub id, in whatever case. Raises UserError with the nearest names."""
    entry = _lookup(name)
    if entry is None:
        raise _unknown(name)
    return entry


def resolve(name: str, *, random_weights: bool = False) -> ResolvedModel:
    """What `name` means: a registry name, alias or hub id, a local directory or file, or a hub id in the local cache.

    A registry model that is on this machine wins over a directory of the same name; write ./NAME for that. With
    `random_weights` it need not be on this machine. Raises UserError with what to do.
    """
    if not name or len(name) > _MAX_NAME or "\0" in name:
        raise UserError(f"{name[:60]!r} is not the name of a model: give a registry name, a path or a hub id")
    entry = _lookup(name)
    if entry is not None:
        weights = _weights_of(entry)
        if weights is not None or random_weights:
            return ResolvedModel(entry.name, weights, entry)
    try:
        path = Path(name).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError):  # a name too long for the file system, or the home of nobody
        path, exists = Path(name), False
    if exists:
        return ResolvedModel(path.resolve().name, _checked(path, random_weights), None)
    if entry is not None:
        raise _not_here(entry)
    if _is_hub_id(name):
        snapshot = find_in_hub_cache(name)
        if snapshot is not None:
            return ResolvedModel(name, snapshot, None)
    if name.startswith((".", "~", os.sep)) or path.suffix in (*_WEIGHT_ENDINGS, ".json"):
        raise UserError(f"{name[:200]}: no such file or directory")
    raise _unknown(name)


def hub_cache_dir() -> Path:
    """Where Hugging Face's tools keep what they download: $HF_HUB_CACHE, else $HF_HOME/hub, else the user's cache."""
    environ = os.environ
    explicit = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE")
    if explicit:
        return Path(explicit).expanduser()
    home = environ.get("HF_HOME")
    if home:
        return Path(home).expanduser() / "hub"
    return Path(environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface" / "hub"


def find_in_hub_cache(hub_id: str) -> Path | None:
    """The snapshot of `hub_id` that main points at in the local cache, else its newest; None without weights."""
    folder = hub_cache_dir() / ("models--" + hub_id.replace("/", "--"))
    snapshots = folder / "snapshots"
    try:
        revision = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        revision = ""
    candidates = [snapshots / revision] if revision and "/" not in revision and ".." not in revision else []
    try:
        candidates += sorted(snapshots.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    except OSError:
        return None
    return next((path for path in candidates if _has_weights(path)), None)


@lru_cache(maxsize=1)
def _load_entries() -> tuple[ModelEntry, ...]:
    text = (Path(__file__).parent / "models.json").read_text(encoding="utf-8")
    return tuple(_entry(item) for item in json.loads(text))


def _entry(item: dict[str, Any]) -> ModelEntry:
    directory = _PROJECT / item["directory"] if "directory" in item else None
    config = item.get("config")
    if config is None and directory is not None and (directory / "config.json").is_file():
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return ModelEntry(
        name=item["name"],
        aliases=tuple(item["aliases"]),
        description=item["description"],
        hub_id=item.get("hub_id"),
        directory=directory,
        config=config or {},
    )


@lru_cache(maxsize=1)
def _by_name() -> dict[str, ModelEntry]:
    table: dict[str, ModelEntry] = {}
    for entry in entries():
        for name in (entry.name, *entry.aliases, *([entry.hub_id] if entry.hub_id else [])):
            table[name.lower()] = entry
    return table


def _lookup(name: str) -> ModelEntry | None:
    return _by_name().get(name.lower())


def _weights_of(entry: ModelEntry) -> Path | None:
    if entry.directory is not None:
        return entry.directory if _has_weights(entry.directory) else None
    return find_in_hub_cache(entry.hub_id) if entry.hub_id is not None else None


def _has_weights(directory: Path) -> bool:
    try:
        return any(path.name.endswith(_WEIGHT_ENDINGS) and path.is_file() for path in directory.iterdir())
    except OSError:
        return False


def _checked(path: Path, random_weights: bool) -> Path:
    """A local path that may be a model; what is in the files is for the loader to say."""
    if path.is_file():
        if path.suffix not in (*_WEIGHT_ENDINGS, ".json"):
            endings = ", ".join(_WEIGHT_ENDINGS)
            raise UserError(f"{path}: is not a checkpoint that can be read here (those end in {endings})")
        return path
    if not random_weights and not _has_weights(path):
        endings = ", ".join(_WEIGHT_ENDINGS)
        raise UserError(f"{path}: is a directory without weights ({endings}); name the directory of a model")
    return path


def _is_hub_id(name: str) -> bool:
    """OWNER/REPOSITORY, and nothing that could lead out of the cache's folder."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) is not None and "--" not in name


def _not_here(entry: ModelEntry) -> UserError:
    if entry.hub_id is None:
        return UserError(f"{entry.name}: {entry.directory} has no weights: this copy of the program is incomplete")
    return UserError(
        f"{entry.name}: its weights are not on this machine; fetch them with `hf download {entry.hub_id}`, or give the "
        f"directory where you have them, or measure its shapes with `bench --random-weights {entry.name}`"
    )


def _unknown(name: str) -> UserError:
    table = _by_name()
    near = [table[match].name for match in get_close_matches(name.lower(), table, n=5, cutoff=0.5)]
    if near:
        return UserError(f"{name[:80]!r} is not a known model; did you mean {' or '.join(dict.fromkeys(near[:3]))}?")
    if _is_hub_id(name):
        return UserError(
            f"{name}: no such directory, and not in the local Hugging Face cache; `hf download {name}` first"
        )
    known = ", ".join(entry.name for entry in entries())
    return UserError(f"{name[:80]!r} is not a known model, nor a path or a downloaded hub id; known are {known}")
