"""What a person sees in a terminal: lines on stderr, a progress line, streamed text. Knows nothing of models."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, TextIO

from config.cache import cache_dir, cache_location
from config.registry import PTE_ENDING
from config.settings import BuildSettings

if TYPE_CHECKING:  # only their names: this module is imported for --help, which must not wait for torch
    from model.device import DeviceChoice, DtypeChoice
    from quant.plan import Plan

CONTROLS = {code: "�" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""Characters that would steer a terminal rather than show something."""


def warn(text: str) -> None:
    """One line for a person on stderr, so that stdout holds the result alone."""
    print(wrapped(f"torchchat: {_one_line(text)}", sys.stderr), file=sys.stderr, flush=True)


def print_error(text: str) -> None:
    """The one line that a failed command ends with."""
    warn(f"error: {text}")


def status(text: str) -> None:
    """A line about what goes on; dimmed where the terminal has colours."""
    line = wrapped(f"torchchat: {_one_line(text)}", sys.stderr)
    print(f"\x1b[2m{line}\x1b[0m" if has_colour(sys.stderr) else line, file=sys.stderr, flush=True)


@lru_cache(maxsize=1)
def cache_dir_or_say() -> Path | None:
    """The cache directory; where there is none, one line says so, once."""
    path = cache_dir()
    if path is None:
        place = cache_location() or "the home directory"
        warn(
            f"nothing is kept between runs: {place} is not a private directory that can be written; "
            "TORCHCHAT_CACHE_DIR may name another"
        )
    return path


def _one_line(text: str) -> str:
    return " ".join(text.split()).translate(CONTROLS)


def wrapped(line: str, stream: TextIO, indent: int = 0) -> str:
    """A line that is wider than the terminal as several that end between words, all but the first behind `indent`
    blanks. What goes elsewhere stays one line.
    """
    if not stream.isatty():
        return line
    try:
        width = os.get_terminal_size(stream.fileno()).columns
    except OSError:
        return line
    if len(line) <= width or width < indent + 20:
        return line
    import textwrap

    found = textwrap.wrap(
        line, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(found)


def has_colour(stream: TextIO) -> bool:
    """Whether escape sequences are welcome: a terminal, not a dumb one, and nobody has set NO_COLOR."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def describe_build(
    settings: BuildSettings, device: "DeviceChoice", dtype: "DtypeChoice", plan: "Plan | None" = None
) -> str:
    """What was chosen and why: "default · cpu (fast: no cuda, no mps) · bf16 (--dtype) · eager · unquantized"."""
    parts = [part for part, on in (("decode", settings.compile), ("prefill", settings.compile_prefill)) if on]
    model_is_pte = settings.model.endswith(PTE_ENDING) and not settings.random_weights
    return " · ".join(
        (
            f"{settings.model}, random weights" if settings.random_weights else settings.model,
            f"{device.device.type} ({device.why})",
            f"{dtype.name} ({dtype.why})",
            f"compiled {' and '.join(parts)}" if parts else "ExecuTorch" if model_is_pte else "eager",
            f"quantized: {plan.describe()}" if plan is not None else "unquantized",
        )
    )


def human_bytes(count: float) -> str:
    """ "512 B", "15.3 MB", "2.05 GB": three digits, units of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """The first Ctrl-C only fills the list, so that no step is left half done; the second is a KeyboardInterrupt."""
    signals: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return

    def note(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield signals
    finally:
        signal.signal(signal.SIGINT, before)


class TextWriter:
    """Streamed text on stdout: every piece appears at once; a terminal gets no control characters from a model."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = sys.stdout if stream is None else stream
        self.is_terminal = self.stream.isatty()
        self.at_line_start = True

    def write(self, text: str) -> None:
        """Show one piece of text; a piece must hold whole characters."""
        if text:
            self.stream.write(text.translate(CONTROLS) if self.is_terminal else text)
            self.stream.flush()
            self.at_line_start = text.endswith("\n")

    def end_line(self) -> None:
        """Begin a new line unless one has just begun."""
        if not self.at_line_start:
            self.write("\n")


class Progress:
    """A line on stderr that is rewritten in place while something long goes on and is gone when it ends.

    Only a terminal sees it. Use as a context manager; `advance` may be called as often as one likes.
    """

    INTERVAL_S = 0.1
    WIDTH = 24

    def __init__(self, title: str, total: int, *, in_bytes: bool = False) -> None:
        self.title, self.total, self.in_bytes = title, total, in_bytes
        self.done = 0
        self.began = time.monotonic()
        self.shown_at = self.began  # what takes less than INTERVAL_S shows nothing
        self.is_shown = False
        self.is_terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def advance(self, amount: int = 1) -> None:
        """`amount` more of the total (things, or bytes) is done."""
        self.done += amount
        now = time.monotonic()
        if self.is_terminal and now - self.shown_at >= self.INTERVAL_S:
            print(f"\r{self.line(now - self.began)}\x1b[K", end="", file=sys.stderr, flush=True)
            self.shown_at, self.is_shown = now, True

    def line(self, elapsed_s: float) -> str:
        """The line as it stands after `elapsed_s` seconds."""
        filled = min(self.WIDTH, self.WIDTH * self.done // max(self.total, 1))
        bar = "█" * filled + "░" * (self.WIDTH - filled)
        if not self.in_bytes:
            return f"{self.title} {bar} {self.done}/{self.total}"
        rate = self.done / max(elapsed_s, 1e-9)
        return f"{self.title} {bar} {human_bytes(self.done)} of {human_bytes(self.total)}, {human_bytes(rate)}/s"
