"""Where the prompt comes from: a flag, a file, standard input, or a default. Never waits for input that nobody will
give without saying so; knows nothing of tokens.
"""

import argparse
import os
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from cli.console import status
from config.errors import UserError

MAX_BYTES = 64 * 2**20
SILENCE_S = 1.0
DEFAULT_PROMPT = "Once upon a time"
DEFAULT_MESSAGE = "Hello! How are you today?"


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """--prompt, --prompt-file and --chat."""
    group = parser.add_argument_group("prompt")
    group.add_argument(
        "--prompt",
        metavar="TEXT",
        help="the text to continue; -: read it from standard input, which is also read without --prompt when it is a "
        f"pipe or a file (default: {DEFAULT_PROMPT!r})",
    )
    group.add_argument("--prompt-file", metavar="FILE", help="read the prompt from a file of UTF-8 text")
    group.add_argument(
        "--chat", action="store_true", help="the prompt is a message to the model: apply the model's chat template"
    )


def read_prompt(
    args: argparse.Namespace, say: Callable[[str], None] = status, remark: Callable[[str], None] = status
) -> str:
    """The prompt that the flags ask for. Text from a file or from standard input loses one line break at its end.

    say: told at once that this waits for text. remark: told which prompt is taken where none was given.
    Raises UserError for text that is not UTF-8, an unreadable file, and contradictory flags.
    """
    if args.prompt is not None and args.prompt_file is not None:
        raise UserError("--prompt and --prompt-file both give a prompt: leave one out")
    if args.prompt_file is not None:
        return _from_file(Path(args.prompt_file))
    if args.prompt == "-":
        text = _from_stdin(say)
        if not text:
            raise UserError("--prompt -: nothing came from standard input")
        return text
    if args.prompt is not None:
        prompt: str = args.prompt
        try:
            prompt.encode()
        except UnicodeEncodeError as error:  # undecodable bytes of the command line
            raise UserError("--prompt: the text is not valid UTF-8") from error
        return prompt
    if _stdin_has_content() and (text := _from_stdin(say)):
        return text
    text = DEFAULT_MESSAGE if args.chat else DEFAULT_PROMPT
    remark(f"no --prompt given: {'saying' if args.chat else 'continuing'} {text!r}")
    return text


def _stdin_has_content() -> bool:
    """Whether standard input is a pipe or a file: a terminal, a socket, /dev/null or nothing at all is not read
    unasked.
    """
    try:
        mode = os.fstat(0).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _from_stdin(say: Callable[[str], None]) -> str:
    if sys.stdin is None:
        raise UserError("--prompt -: standard input is closed")
    end = "Ctrl-D ends it" if sys.stdin.isatty() else "its writer closes it"
    timer = threading.Timer(SILENCE_S, say, [f"reading the prompt from standard input until {end}"])
    timer.daemon = True
    timer.start()
    try:
        return _decoded(sys.stdin.buffer, "standard input")
    finally:
        timer.cancel()


def _from_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return _decoded(file, f"--prompt-file {path}")
    except OSError as error:
        raise UserError(f"--prompt-file {path}: {error.strerror}") from error


def _decoded(file: BinaryIO, where: str) -> str:
    data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise UserError(f"{where}: more than {MAX_BYTES >> 20} MB is no prompt")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text (byte {error.start})") from error
    return text.removesuffix("\r\n" if text.endswith("\r\n") else "\n")
