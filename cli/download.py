"""The command `download`: a model from Hugging Face into the cache that its tools share. stdout gets where it is."""

import argparse
from dataclasses import replace
from pathlib import Path

from cli.console import status
from cli.hub import plan_download, run_download
from config.errors import UserError
from config.hub_cache import HubName, find_gguf_in_hub_cache, find_in_hub_cache, parse_hub_name
from config.registry import find, lookup


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "torchchat download MODEL [options]"
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a name that `torchchat list` shows, or OWNER/REPOSITORY on Hugging Face; with @REVISION, or with :FILE "
        "or :QUANTIZATION for one GGUF file of it (OWNER/REPOSITORY:Q4_K_M)",
    )
    parser.add_argument("--revision", metavar="R", help="a branch, a tag or a commit (default: main)")
    parser.add_argument(
        "--token",
        metavar="T",
        help="of a Hugging Face account, for what is private or must be asked for (default: HF_TOKEN, or the one that "
        "`hf auth login` keeps); others on this machine can see what is given here",
    )
    parser.epilog = (
        "The same files as `hf download` would keep, in the same place (HF_HOME and HF_HUB_CACHE name another), each "
        "checked by its digest; what was cut off goes on where it stopped. Prints the path of the model."
    )


def run(args: argparse.Namespace) -> int:
    name = hub_name(args.model)
    if args.revision is not None:
        if name.revision not in (None, args.revision):
            raise UserError(f"--revision {args.revision} and {args.model} name two revisions: leave one")
        name = parse_hub_name(str(replace(name, revision=args.revision))) or _no_revision(args.revision)
    try:
        download = plan_download(name, args.token)
    except UserError as error:
        there = find_gguf_in_hub_cache(name) if name.file else find_in_hub_cache(name.hub_id, name.revision)
        if there is None:
            raise
        status(f"{args.model} is here; whether there is a newer one could not be found out: {error}")
        print(there)
        return 0
    if not download.missing():
        status(f"{args.model} is here already")
    print(run_download(download))
    return 0


def hub_name(model: str) -> HubName:
    """The repository that a name means. Raises UserError for what is none, or what need not be fetched."""
    entry = lookup(model)
    if entry is not None:
        if entry.hub_id is None:
            raise UserError(f"{entry.name}: is part of torchchat and need not be downloaded")
        return HubName(entry.hub_id)
    if Path(model).exists():
        raise UserError(f"{model}: is a file or directory here, and need not be downloaded")
    name = parse_hub_name(model)
    if name is None:
        find(model)  # which says what is near
        raise AssertionError(model)
    return name


def _no_revision(revision: str) -> HubName:
    raise UserError(f"--revision {revision[:80]!r}: is not the name of a branch, a tag or a commit")
