"""Which models are known by name, and where a model that somebody names lies on this machine. Opens no network; knows
shapes only as the config.json objects of models.json, and what is in a directory only by the names of its files.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from config.errors import UserError
from config.hub_cache import (
    WEIGHT_ENDINGS,
    HubName,
    find_gguf_in_hub_cache,
    find_in_hub_cache,
    gguf_models,
    has_weights,
    parse_hub_name,
)

DEFAULT_MODEL = "default"
MODELS_DIR = "TORCHCHAT_MODELS_DIR"
"""The variable that names a directory of models, each by the name of its own directory."""

EXPORTED_ENDING, PTE_ENDING = ".pt2", ".pte"
"""Of models that were exported, which are programs: a package of ours, and a program of ExecuTorch's."""

_PROJECT = Path(__file__).resolve().parent.parent
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
    parameters: int
    """Of what runs here, as published: without the parts for images, and a matrix that is used twice counted once."""
    gated: bool
    """Whether access must be asked for on Hugging Face."""

    @property
    def hub_ids(self) -> tuple[str, ...]:
        """The repository, and the other names that it had or has."""
        return tuple(name for name in (self.hub_id, *self.aliases) if name is not None and "/" in name)

    @property
    def short_aliases(self) -> tuple[str, ...]:
        return tuple(name for name in self.aliases if "/" not in name)

    @property
    def context(self) -> int:
        """The longest text that the model was made for, in tokens."""
        return int(self.config.get("text_config", self.config)["max_position_embeddings"])


@dataclass(frozen=True)
class ResolvedModel:
    """What a name means here. `path`: the directory or file with the weights, or None where random weights were asked
    for and there are none; `entry`: the registry's entry, if it is of the registry. One of the two is there.
    """

    name: str
    path: Path | None
    entry: ModelEntry | None


class ModelNotHere(UserError):
    """A model that is not on this machine and that may be had from Hugging Face. `wanted`: what to fetch; `entry`: the
    registry's, if it is of the registry.
    """

    def __init__(self, name: str, wanted: HubName, entry: ModelEntry | None, hint: str = "") -> None:
        self.name, self.wanted, self.entry = name, wanted, entry
        size = f" (about {entry.parameters * 2 / 1e9:.1f} GB)" if entry is not None else ""
        super().__init__(f"{name} is not on this machine: `torchchat download {name}` fetches it{size}{hint}")

    @property
    def hub_id(self) -> str:
        return self.wanted.hub_id

    @property
    def filename(self) -> str | None:
        return self.wanted.file


def entries() -> tuple[ModelEntry, ...]:
    """Every entry, the embedded model first."""
    return _load_entries()


def find(name: str) -> ModelEntry:
    """The entry of that name, alias or hub id, in whatever case. Raises UserError with the nearest names."""
    entry = lookup(name)
    if entry is None:
        raise _unknown(name)
    return entry


def lookup(name: str) -> ModelEntry | None:
    """As `find`, and None where there is none."""
    return _by_name().get(name.lower())


def resolve(name: str, *, random_weights: bool = False) -> ResolvedModel:
    """What `name` means: a registry name, alias or hub id, a local directory or file, a directory in
    $TORCHCHAT_MODELS_DIR, or a hub id (with a revision, or a GGUF file) in the local cache.

    A registry model that is on this machine wins over a directory of the same name; write ./NAME for that. With
    `random_weights` it need not be on this machine. Raises UserError with what to do; ModelNotHere where that is to
    download it.
    """
    if not name or len(name) > _MAX_NAME or "\0" in name:
        raise UserError(f"{name[:60]!r} is not the name of a model: give a registry name, a path or a hub id")
    entry = lookup(name)
    if entry is not None:
        weights = weights_of(entry)
        if weights is not None or random_weights:
            return ResolvedModel(entry.name, weights, entry)
    for path in _places(name):
        return ResolvedModel(path.resolve().name, _checked(path, random_weights), None)
    if entry is not None:
        raise _not_here(entry)
    if (wanted := parse_hub_name(name)) is not None and not _is_path(name):
        return _in_cache(name, wanted)
    if _is_path(name):
        raise UserError(f"{name[:200]}: no such file or directory")
    raise _unknown(name)


def weights_of(entry: ModelEntry) -> Path | None:
    """Where the model of an entry lies, if it is here and whole."""
    if entry.directory is not None:
        return entry.directory if has_weights(entry.directory) else None
    return next((path for hub_id in entry.hub_ids if (path := find_in_hub_cache(hub_id)) is not None), None)


def models_dir() -> Path | None:
    """The directory that $TORCHCHAT_MODELS_DIR names, if it is there."""
    named = os.environ.get(MODELS_DIR)
    path = Path(named).expanduser() if named else None
    return path if path is not None and path.is_dir() else None


@lru_cache(maxsize=1)
def _load_entries() -> tuple[ModelEntry, ...]:
    items = json.loads((Path(__file__).parent / "models.json").read_text(encoding="utf-8"))
    by_name = {item["name"]: item for item in items}
    return tuple(_entry(item, by_name) for item in items)


def _entry(item: Mapping[str, Any], by_name: Mapping[str, Mapping[str, Any]]) -> ModelEntry:
    directory = _PROJECT / item["directory"] if "directory" in item else None
    config = _config(item, by_name)
    if directory is not None and (directory / "config.json").is_file():
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return ModelEntry(
        name=item["name"],
        aliases=tuple(item["aliases"]),
        description=item["description"],
        hub_id=item.get("hub_id"),
        directory=directory,
        config=config,
        parameters=item["parameters"],
        gated=item.get("gated", False),
    )


def _config(item: Mapping[str, Any], by_name: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The item's own keys over those of the model that it is `like`."""
    like = _config(by_name[item["like"]], by_name) if "like" in item else {}
    return {**like, **item.get("config", {})}


@lru_cache(maxsize=1)
def _by_name() -> dict[str, ModelEntry]:
    table: dict[str, ModelEntry] = {}
    for entry in entries():
        for name in (entry.name, *entry.aliases, *([entry.hub_id] if entry.hub_id else [])):
            table[name.lower()] = entry
    return table


def _places(name: str) -> list[Path]:
    """The files and directories that a name may mean, as far as they are there."""
    try:
        path = Path(name).expanduser()
        places = [path] if path.exists() else []
        directory = models_dir()
        if directory is not None and Path(name).name == name and (directory / name).exists():
            places.append(directory / name)
    except (OSError, RuntimeError):  # a name too long for the file system, or the home of nobody
        return []
    return places


def _is_path(name: str) -> bool:
    """Whether a name that is nothing here was meant as a path."""
    endings = (*WEIGHT_ENDINGS, ".json", ".gguf", EXPORTED_ENDING, PTE_ENDING)
    ends_as_file = ":" not in name and Path(name).suffix in endings
    return ends_as_file or name.startswith((".", "~", os.sep))


def _in_cache(name: str, wanted: HubName) -> ResolvedModel:
    entry = lookup(wanted.hub_id)
    if wanted.file is not None:
        path = find_gguf_in_hub_cache(wanted)
    else:
        path = find_in_hub_cache(wanted.hub_id, wanted.revision)
        path = _in_directory(path, f"name one as {name}:FILE") if path is not None else None
    if path is None:
        near = near_names(name) if entry is None else []
        raise ModelNotHere(name, wanted, entry, f" (or did you mean {' or '.join(near)}?)" if near else "")
    return ResolvedModel(name, path, entry)


def _checked(path: Path, random_weights: bool) -> Path:
    """A local path that may be a model; what is in the files is for the loader to say."""
    endings = ", ".join((*WEIGHT_ENDINGS, ".gguf"))
    if path.is_file():
        if path.suffix in (EXPORTED_ENDING, PTE_ENDING) and random_weights:
            raise UserError(f"{path}: is exported with its own weights; name the directory that it was exported from")
        if path.suffix not in (*WEIGHT_ENDINGS, ".json", ".gguf", EXPORTED_ENDING, PTE_ENDING):
            known = f"{endings}, {EXPORTED_ENDING}, {PTE_ENDING}"
            raise UserError(f"{path}: is not a checkpoint that can be read here (those end in {known})")
        return path
    if random_weights:
        return path
    if not has_weights(path):
        raise UserError(f"{path}: is a directory without weights ({endings}); name the directory of a model")
    return _in_directory(path, "name one of them")


def _in_directory(path: Path, advice: str) -> Path:
    """The directory itself, or the one GGUF file of a directory that has no other weights."""
    names = sorted(file.name for file in path.iterdir())
    found = gguf_models(names)
    if not found or any(name.endswith(WEIGHT_ENDINGS) for name in names):
        return path
    if len(found) > 1:
        listed = ", ".join(found[:8]) + (", …" if len(found) > 8 else "")
        raise UserError(f"{path}: has several GGUF files; {advice}: {listed}")
    return path / found[0]


def _not_here(entry: ModelEntry) -> UserError:
    if entry.hub_id is None:
        return UserError(f"{entry.name}: {entry.directory} has no weights: this copy of the program is incomplete")
    hint = f", or measure its shapes with `torchchat bench --random-weights {entry.name}`"
    if entry.gated:
        hint = f", once access is granted at https://huggingface.co/{entry.hub_id}{hint}"
    return ModelNotHere(entry.name, HubName(entry.hub_id), entry, hint)


def near_names(name: str) -> list[str]:
    """The names of the registry that are most like one that is not in it."""
    table = _by_name()
    near = [table[match].name for match in get_close_matches(name.lower(), table, n=5, cutoff=0.5)]
    return list(dict.fromkeys(near))[:3]


def _unknown(name: str) -> UserError:
    if near := near_names(name):
        return UserError(f"{name[:80]!r} is not a known model; did you mean {' or '.join(near)}?")
    return UserError(
        f"{name[:80]!r} is not a known model, nor a path or the id of a repository on Hugging Face (OWNER/NAME); "
        "`torchchat list` shows what is known"
    )
