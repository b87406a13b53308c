"""How an answer is shown while it is made: as it comes, or as markdown on a terminal. `cli.chat_markdown`, which needs
rich, does the latter.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from cli.console import CONTROLS, TextWriter, has_colour, wrapped


class View(Protocol):
    """Of one answer."""

    def write(self, text: str) -> None:
        """Show the next piece of it."""

    def end(self, *, whole: bool) -> None:
        """No more comes: leave the cursor at the beginning of a line. whole: the answer ended by itself."""


class PlainView:
    """The text itself, ending with a line's end; a terminal gets no control characters."""

    def __init__(self) -> None:
        self._writer = TextWriter()
        self._empty = True

    def write(self, text: str) -> None:
        self._writer.write(text)
        self._empty = self._empty and not text

    def end(self, *, whole: bool) -> None:
        if self._empty and whole:
            self._writer.write("\n")  # an answer is a line at least, so that a script can count them
        self._writer.end_line()


def tell(lines: Iterable[str]) -> None:
    """Lines that a person asked for, on stderr."""
    for line in lines:
        print(line.translate(CONTROLS), file=sys.stderr, flush=True)


def note(line: str) -> None:
    """A remark in the middle of a conversation on a terminal, dimmed where it has colours."""
    line = wrapped(f"({line.translate(CONTROLS)})", sys.stderr)
    print(f"\x1b[2m{line}\x1b[0m" if has_colour(sys.stderr) else line, file=sys.stderr, flush=True)


def aligned(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Rows of cells as lines, every column but the last as wide as its widest cell. What is wider than the terminal
    goes on below the last column.
    """
    table = list(rows)
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]) - 1)] if table else []
    lines = []
    for row in table:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        line = "  " + "  ".join([*cells, row[-1]]).rstrip()
        lines.append(wrapped(line, sys.stderr, indent=2 + sum(width + 2 for width in widths)))
    return lines


@contextmanager
def typing_unseen() -> Iterator[None]:
    """While an answer is shown, what is typed does not appear in its middle; it waits for the next prompt."""
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    if not sys.stdin.isatty():
        yield
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    silent = termios.tcgetattr(terminal)
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
