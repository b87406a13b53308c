"""The command `server`: OpenAI's API over HTTP. Flags, and nothing else of its own."""

import argparse
import os

from cli.serving import add_serving_arguments, serve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `server`."""
    add_serving_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal ends it; 0, or 1 when the engine failed. Raises UserError."""
    return serve(args, os.environ)
