"""The command `where`: the path of a model that is on this machine, on stdout."""

import argparse
from pathlib import Path

from config.registry import resolve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "torchchat where MODEL"
    parser.add_argument("model", metavar="MODEL", help="a name, a path or a hub id, as the other commands take it")
    parser.epilog = "Downloads nothing: a model that is not here is an error."


def run(args: argparse.Namespace) -> int:
    print(path_of(args.model))
    return 0


def path_of(name: str) -> Path:
    """Absolute. Raises UserError for a model that is not here."""
    path = resolve(name).path
    assert path is not None
    return path.absolute()
