"""The command `remove`: what was downloaded goes, after a question. Deletes nothing but what is in the cache of Hugging
Face's tools.
"""

import argparse
import logging
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from cli.console import human_bytes, status
from config.errors import UserError
from config.hub_cache import HubName, disk_size, find_gguf_in_hub_cache, folder_of, hub_cache_dir, parse_hub_name
from config.registry import find, lookup


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "torchchat remove MODEL [--yes]"
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a name or a hub id of what was downloaded; with @REVISION or :FILE that revision or GGUF file alone",
    )
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.epilog = "Only what is in the Hugging Face cache is removed; directories of your own are yours to delete."


def run(args: argparse.Namespace) -> int:
    targets = targets_of(args.model)
    size = sum(target_size(target) for target in targets)
    places = ", ".join(str(folder_of(target.hub_id)) for target in targets)
    if not args.yes and not _agreed(f"remove {args.model}, {human_bytes(size)} in {places}? [y/N] "):
        status("nothing was removed")
        return 0
    before = sum(disk_size(folder_of(target.hub_id)) for target in targets)
    for target in targets:
        _delete(target)
    freed = before - sum(disk_size(folder_of(target.hub_id)) for target in targets)
    status(f"removed {args.model}: {human_bytes(freed)} freed")
    return 0


def targets_of(model: str) -> list[HubName]:
    """What a name means in the cache. Raises UserError for what is not there, or not of it."""
    entry = lookup(model)
    if entry is not None and entry.hub_id is None:
        raise UserError(f"{entry.name}: is part of torchchat; it is removed with it")
    names = [HubName(hub_id) for hub_id in entry.hub_ids] if entry is not None else []
    if entry is None:
        if Path(model).expanduser().exists():
            raise UserError(f"{model}: is a file or directory of yours, not a download: delete it yourself")
        name = parse_hub_name(model)
        if name is None:
            find(model)  # which says what is near
            raise AssertionError(model)
        names = [name]
    found = [name for name in names if _is_there(name)]
    if not found:
        raise UserError(f"{model}: is not in {hub_cache_dir()}: there is nothing to remove")
    return found


def target_size(name: HubName) -> int:
    """Bytes that removing it would free, at most."""
    if name.file is not None:
        file = find_gguf_in_hub_cache(name)
        assert file is not None
        return file.stat().st_size
    return disk_size(folder_of(name.hub_id))


def _is_there(name: HubName) -> bool:
    if name.file is not None:
        return find_gguf_in_hub_cache(name) is not None
    return folder_of(name.hub_id).is_dir()


def _agreed(question: str) -> bool:
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UserError("nobody can be asked here whether to remove it: --yes answers for you")
    print(question, end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _delete(name: HubName) -> None:
    if name.file is not None:
        _delete_file(name)
    elif not _delete_revisions(name):
        if name.revision is not None:
            raise UserError(f"{name}: {name.hub_id} is here, but not that revision of it")
        shutil.rmtree(folder_of(name.hub_id))  # begun and never finished: huggingface_hub sees no repository in it


def _delete_revisions(name: HubName) -> bool:
    """By huggingface_hub, which knows which files other revisions share; False where it knows of none."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        cache = scan_cache_dir(hub_cache_dir())
    except CacheNotFound:
        return False
    repositories = {one for one in cache.repos if one.repo_type == "model" and one.repo_id == name.hub_id}
    commits = [
        revision.commit_hash
        for repository in repositories
        for revision in repository.revisions
        if name.revision is None or name.revision in (revision.commit_hash, *revision.refs)
    ]
    if commits:
        # Of this repository alone: a copy of it may have the same commits.
        replace(cache, repos=frozenset(repositories)).delete_revisions(*commits).execute()
    return bool(commits)


def _delete_file(name: HubName) -> None:
    """One file: its links in all snapshots, and what they point at."""
    file = find_gguf_in_hub_cache(name)
    assert file is not None
    target = file.resolve()
    for link in folder_of(name.hub_id).glob("snapshots/**/*.gguf"):
        if link.resolve() == target:
            link.unlink()
    target.unlink(missing_ok=True)
