"""The cache that Hugging Face's tools share, read by its folders alone: which repositories are there, which snapshot a
revision means, how large it is. Opens no network, writes nothing; knows weights by the names of files only.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# What a directory must have one of, to be a model: by the endings of its weights.
WEIGHT_ENDINGS = (".safetensors", ".bin", ".pth", ".pt")
_MAX_INDEX_BYTES = 1 << 26
_REPOSITORY = r"\w[\w.-]*/\w[\w.-]*"
_NAME = re.compile(rf"({_REPOSITORY})(?:@([\w][\w./-]*))?(?::([\w][\w./ ()+-]*))?", re.ASCII)


@dataclass(frozen=True)
class HubName:
    """OWNER/REPOSITORY, a revision of it after "@", and one of its GGUF files (its name or its quantization) after ":".
    """

    hub_id: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.hub_id}{revision}" + (f":{self.file}" if self.file else "")


def parse_hub_name(text: str) -> HubName | None:
    """The name, if it can be one and cannot lead out of the cache's folder."""
    found = _NAME.fullmatch(text)
    if found is None or "--" in found[1] or ".." in text or len(text) > 512:
        return None
    return HubName(found[1], found[2], found[3])


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


def folder_of(hub_id: str) -> Path:
    """Where a repository is kept, whether it is there or not."""
    return hub_cache_dir() / ("models--" + hub_id.replace("/", "--"))


def cached_repositories() -> Iterator[str]:
    """The ids of the models' repositories that have a folder there, in order of their names."""
    try:
        names = sorted(path.name for path in hub_cache_dir().iterdir() if path.name.startswith("models--"))
    except OSError:
        return
    for name in names:
        hub_id = name.removeprefix("models--").replace("--", "/")
        if (found := parse_hub_name(hub_id)) is not None and str(found) == hub_id:
            yield hub_id


def find_in_hub_cache(hub_id: str, revision: str | None = None) -> Path | None:
    """The snapshot that `revision` (a branch, a tag or a commit; main) points at, else the newest where none was asked
    for; None where that has no weights, or not all of them.
    """
    return next((path for path in _snapshots(hub_id, revision) if has_weights(path)), None)


def find_gguf_in_hub_cache(name: HubName) -> Path | None:
    """The GGUF file that `name.file` means, in the snapshot that its revision means or in any."""
    assert name.file is not None
    for snapshot in _snapshots(name.hub_id, name.revision):
        files = [path for path in sorted(snapshot.rglob("*.gguf")) if path.is_file()]
        found = match_gguf(name.file, [path.relative_to(snapshot).as_posix() for path in files])
        if len(found) == 1:
            return snapshot / found[0]
    return None


def match_gguf(wanted: str, names: Iterable[str]) -> list[str]:
    """Which GGUF files of a repository `wanted` means: the one of that name, or those whose names have it as a part
    between dashes and dots, as quantizations are written ("Q4_K_M").
    """
    known = gguf_models(names)
    if wanted in known:
        return [wanted]
    part = re.compile(rf"(?:^|[-./]){re.escape(wanted.removesuffix('.gguf'))}(?=[-./]|$)", re.IGNORECASE)
    return [name for name in known if part.search(name.removesuffix(".gguf"))]


def gguf_models(names: Iterable[str]) -> list[str]:
    """The GGUF files that are language models: not the projectors of images that lie beside some."""
    return [name for name in names if name.endswith(".gguf") and "mmproj" not in name.rpartition("/")[2].lower()]


def has_weights(directory: Path) -> bool:
    """Whether a directory has a model's weights: all files that its index names, where there is one."""
    try:
        names = {path.name for path in directory.iterdir() if path.is_file()}
    except OSError:
        return False
    if not any(name.endswith((*WEIGHT_ENDINGS, ".gguf")) for name in names):
        return False
    indexes = sorted((name for name in names if name.endswith(".index.json")), reverse=True)  # safetensors first
    return not indexes or _indexed(directory / indexes[0]) <= names


def disk_size(folder: Path) -> int:
    """Bytes of all that is in a folder; what links point at is counted where it lies."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except OSError:
                continue
    return total


def _snapshots(hub_id: str, revision: str | None) -> list[Path]:
    """Those that the revision may mean, the likeliest first."""
    folder = folder_of(hub_id)
    snapshots = folder / "snapshots"
    try:
        commit = (folder / "refs" / (revision or "main")).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        commit = revision or ""
    named = [snapshots / commit] if re.fullmatch(r"[\w.-]+", commit) and ".." not in commit else []
    try:
        there = sorted(snapshots.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    except OSError:
        return []
    if revision is None:
        return named + there
    return named or []


def _indexed(index: Path) -> set[str]:
    """The files that an index of shards names; none for one that cannot be read: the loader has the words for it."""
    try:
        if index.stat().st_size > _MAX_INDEX_BYTES:
            return set()
        document = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return set()
    shards = document.get("weight_map") if isinstance(document, dict) else None
    return {str(name) for name in shards.values()} if isinstance(shards, dict) else set()
