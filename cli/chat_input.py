"""What is typed -> messages and commands: where one ends, what its words are, and how a script's come line by line.
Knows no terminal.
"""

import re
from dataclasses import dataclass
from typing import BinaryIO

from config.errors import UserError

QUOTES = '"""'
MAX_BYTES = 64 * 2**20
_FIRST_WORD = re.compile(r"/([A-Za-z?]*)(?:\s+|$)")


@dataclass(frozen=True)
class Typed:
    """A message, or the words of a command: its name, without the slash, and all that comes after it."""

    command: str | None
    text: str


def parse(text: str) -> Typed:
    """What a text means that is whole. Raises UserError for quotes that are not closed.

    A slash begins a command only as the very first character, and only before letters: paths and comments are messages.
    """
    found = _FIRST_WORD.match(text)
    rest = text[found.end() :] if found else text
    return Typed(found[1].lower() if found else None, _unquoted(rest))


def is_open(text: str) -> bool:
    """Whether a message or a command's text begins with three quotes that nothing has closed yet."""
    found = _FIRST_WORD.match(text)
    rest = (text[found.end() :] if found else text).strip()
    return rest.startswith(QUOTES) and not _closes(rest[len(QUOTES) :])


def _closes(text: str) -> bool:
    """Whether the quotes that a block opened with end here: at the end of a line."""
    return text.rstrip().endswith(QUOTES)


def _unquoted(text: str) -> str:
    quoted = text.strip()
    if not quoted.startswith(QUOTES):
        return text.strip("\r\n").rstrip()
    if is_open(quoted):
        raise UserError(f"the text begins with {QUOTES} and nothing closes it: {QUOTES} at the end of a line does")
    return quoted[len(QUOTES) : -len(QUOTES)].removeprefix("\n").removesuffix("\n")


class Script:
    """Messages and commands from a stream of bytes: a line each, or several lines within three quotes."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._number = 0

    def read(self) -> str:
        """The next text. Raises EOFError at the end, UserError for one that cannot be read; the next one then can."""
        text = self._line()
        if not is_open(text):
            return text
        lines = [text]
        while len(lines) == 1 or not _closes(lines[-1]):
            try:
                lines.append(self._line())
            except EOFError:  # what is left open is told where the text is parsed
                break
        return "\n".join(lines)

    def _line(self) -> str:
        data = self._stream.readline(MAX_BYTES + 1)
        if not data:
            raise EOFError
        self._number += 1
        if len(data) > MAX_BYTES:
            while data and not data.endswith(b"\n"):
                data = self._stream.readline(MAX_BYTES)
            raise UserError(f"line {self._number}: more than {MAX_BYTES >> 20} MB is no message")
        try:
            return data.decode("utf-8-sig" if self._number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"line {self._number}: not UTF-8 text (byte {error.start})") from error
