"""A person at a terminal: a program runs in this process on a pseudo-terminal while a thread types and reads the
screen. And a model that says what a test wants said.
"""

import fcntl
import itertools
import json
import os
import pty
import re
import signal
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pyte
import pytest
import torch
from torch import Tensor

from cli import chat_session
from cli.builder import PREFILL_CHUNK
from cli.main import main
from model.kv_cache import KVCache
from tests.tiny_checkpoint import EOS, VOCAB, write_tiny_checkpoint

CHUNK = PREFILL_CHUNK["cpu"]
PATIENCE_S = 120.0
ENTER, ALT_ENTER, CTRL_C, CTRL_D, CTRL_X_CTRL_E = "\r", "\x1b\r", "\x03", "\x04", "\x18\x05"
UP, TAB = "\x1b[A", "\t"


class _Screen(pyte.HistoryScreen):
    """Answers what a program asks of its terminal."""

    def __init__(self, columns: int, lines: int, answer: Callable[[str], None]) -> None:
        super().__init__(columns, lines, history=10_000, ratio=0.001)
        self.write_process_input = answer


class Person:
    """Types at a terminal and looks at its screen."""

    def __init__(self, columns: int = 80, lines: int = 24) -> None:
        self.master, self.slave = pty.openpty()
        self.resize(columns, lines)
        self.raw = b""
        self.over = threading.Event()
        """The program has ended."""
        self._lock = threading.Lock()
        self._screen = _Screen(columns, lines, lambda data: self._write(data.encode()))
        self._stream = pyte.ByteStream(self._screen)
        threading.Thread(target=self._read, daemon=True).start()

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self.master, 65536)
            except OSError:
                return
            with self._lock:
                self.raw += data
                self._stream.feed(data)

    def _write(self, data: bytes) -> None:
        os.write(self.master, data)

    def types(self, text: str) -> None:
        self._write(text.encode())

    def says(self, text: str) -> None:
        """Types a line, once there is a prompt for it."""
        self.waits(self.is_asked, "a prompt")
        self.types(text)
        self.waits(lambda: not self.is_asked(), text)
        self.types(ENTER)

    def leaves(self) -> None:
        """Ctrl-D, once there is a prompt: before, the terminal itself would take it."""
        self.waits(self.is_asked, "a prompt")
        self.types(CTRL_D)

    def is_asked(self) -> bool:
        """Whether the cursor is at a prompt with nothing behind it."""
        return self.lines[-1:] == ["> a message, or /help"]

    def pastes(self, text: str) -> None:
        self._write(b"\x1b[200~" + text.replace("\n", "\r").encode() + b"\x1b[201~")

    def interrupts(self) -> None:
        """What Ctrl-C does while a program does not read the keyboard itself."""
        os.kill(os.getpid(), signal.SIGINT)

    @property
    def lines(self) -> list[str]:
        """All that is on the screen and above it, without the blank lines at the end."""
        with self._lock:
            above = ["".join(row[x].data for x in range(self._screen.columns)) for row in self._screen.history.top]
            lines = [line.rstrip() for line in (*above, *self._screen.display)]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def sees(self, pattern: str) -> None:
        """Waits until it is on the screen."""
        self.waits(lambda: re.search(pattern, self.text, re.MULTILINE), pattern)

    def waits(self, condition: Callable[[], object], what: str) -> None:
        until = time.monotonic() + PATIENCE_S
        while not condition():
            if time.monotonic() > until or self.over.is_set():
                time.sleep(0.1)  # for what was written last to be read
                assert condition(), f"{what!r} never came:\n{self.text}"
            time.sleep(0.01)

    def last(self, count: int) -> list[str]:
        return self.lines[-count:]


def at_terminal(
    monkeypatch: pytest.MonkeyPatch, argv: Iterable[object], acts: Callable[[Person], None], person: Person
) -> int:
    """Run a command line in this process while the person `acts`: its exit code."""
    failure: list[BaseException] = []

    def act() -> None:
        try:
            acts(person)
            assert person.over.wait(4 * PATIENCE_S), f"the program did not end:\n{person.text}"
        except BaseException as error:
            failure.append(error)
            # One after the other: what comes while a prompt ends and the next begins is for nobody.
            for key in itertools.cycle((CTRL_C, CTRL_D)):
                person.types(key)
                if person.over.wait(0.3):
                    break
                person.interrupts()

    with monkeypatch.context() as patch:
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            patch.setattr(sys, name, open(os.dup(person.slave), mode, encoding="utf-8"))  # noqa: SIM115
        for name in ("COLORTERM", "COLUMNS", "LINES"):
            patch.delenv(name, raising=False)
        thread = threading.Thread(target=act)
        thread.start()
        try:
            code = main(list(map(str, argv)))
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
        finally:
            person.over.set()
            thread.join()
            for stream in (sys.stdin, sys.stdout, sys.stderr):
                stream.close()
    if failure:
        raise failure[0]
    time.sleep(0.05)  # for what was written last to be read
    return code


class Replies:
    """Says one text after the other, a byte at a time, whatever it reads; and keeps what it read."""

    def __init__(self, *texts: str, pause_s: float = 0.0) -> None:
        self.texts, self.pause_s = list(texts), pause_s
        self.said = self.calls = 0
        self.when: dict[int, Callable[[], None]] = {}
        """What happens in the first call, the second, …"""
        self.read: list[list[int]] = []
        """The tokens of each turn that had to be read anew."""
        self._ids: Callable[[str], list[int]] = lambda text: list(text.encode())
        self._rest: list[int] = []
        self._next_position, self._last = -1, -1

    def __call__(
        self,
        tokens_BT: Tensor,
        start_B: Tensor,
        cache: KVCache,
        slots_B: Tensor,
        context: int,
        logits_at_B: Tensor | None = None,
    ) -> Tensor:
        self.calls += 1
        self.when.get(self.calls, lambda: None)()
        tokens, start = tokens_BT[0].tolist(), int(start_B[0])
        time.sleep(self.pause_s)
        if len(self.read) and len(self.read[-1]) % CHUNK == 0 and start == self._next_position:
            self.read[-1] += tokens
        elif tokens != [self._last] or start != self._next_position:
            self.read.append(tokens)
            self._rest = [*self._ids(self.texts[self.said % len(self.texts)]), EOS]
            self.said += 1
        self._next_position = start + len(tokens)
        self._last = self._rest.pop(0) if self._rest else EOS
        logits_1V = torch.zeros(1, VOCAB)
        logits_1V[0, self._last] = 1000.0
        return logits_1V

    def install(self, monkeypatch: pytest.MonkeyPatch) -> "Replies":
        """In every engine that a conversation is held with."""
        real, renewed = chat_session.build, chat_session.make_engine

        def build(*args, **options):
            built = real(*args, **options)
            built.engine.model = self
            tokenizer = built.prepared.tokenizer
            self._ids = lambda text: tokenizer.encode(text, bos=False)
            return built

        def make_engine(*args, **options):
            engine = renewed(*args, **options)
            engine.model = self
            return engine

        monkeypatch.setattr(chat_session, "build", build)
        monkeypatch.setattr(chat_session, "make_engine", make_engine)
        return self


def write_chatty_checkpoint(directory: Path, *, context: int = 4096, chat: bool = True) -> Path:
    """The tiny model with room for a conversation, a byte a token."""
    write_tiny_checkpoint(directory, chat=chat)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": context}))
    return directory
