"""Where a person types: lines with history, completion and an editor, through prompt_toolkit. Knows what a command
looks like, not what any does.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import create_input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output
from prompt_toolkit.styles import Style

from cli.chat_input import is_open
from config.cache import atomic_write

MAX_HISTORY_BYTES = 2**20
MENU_LINES = 6
STYLE = Style([("prompt", "bold"), ("placeholder", "fg:ansibrightblack"), ("more", "fg:ansibrightblack")])

Completions = Callable[[str], Iterator[tuple[str, int, str]]]
"""What can stand at the end of a text: a text, how much of the end it replaces, a remark."""


class Terminal:
    """Reads messages from the terminal."""

    def __init__(self, completions: Completions, history: Path | None, note: Callable[[str], None]) -> None:
        """history: the file in which what is typed is kept; None keeps it for this conversation only. note: tells a
        person something.
        """
        self._note = note
        self._prompt: PromptSession[str] = PromptSession(
            [("class:prompt", "\n> ")],
            multiline=True,
            prompt_continuation=FormattedText([("class:more", "  ")]),
            placeholder=_placeholder,
            completer=_Completer(completions),
            complete_while_typing=True,
            reserve_space_for_menu=MENU_LINES,
            history=InMemoryHistory() if history is None else _history(history, note),
            key_bindings=_bindings(),
            enable_open_in_editor=True,
            tempfile_suffix=".md",
            enable_suspend=True,
            style=STYLE,
            input=create_input(sys.stdin),
            output=create_output(sys.stdout if sys.stdout.isatty() else sys.stderr),
        )

    def read(self) -> str:
        """What is typed next. Raises EOFError when Ctrl-D leaves."""
        while True:
            try:
                text = self._prompt.prompt()
            except _CtrlC as pressed:
                if pressed.nothing_typed:
                    self._note("Ctrl-D or /exit leaves")
                continue
            # What is no UTF-8 comes as halves of characters, which no model's tokenizer knows.
            return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _placeholder() -> FormattedText:
    return FormattedText([] if get_app().is_done else [("class:placeholder", "a message, or /help")])


class _CtrlC(Exception):
    def __init__(self, *, nothing_typed: bool) -> None:
        super().__init__()
        self.nothing_typed = nothing_typed


def _bindings() -> KeyBindings:
    keys = KeyBindings()
    in_text = has_focus(DEFAULT_BUFFER)

    @keys.add("enter", filter=in_text)
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.complete_state is not None and buffer.complete_state.current_completion is not None:
            buffer.complete_state = None  # what was chosen from the menu stands there
        elif is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=in_text)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c", filter=in_text)
    @keys.add("<sigint>")
    def _(event: KeyPressEvent) -> None:
        nothing = not event.app.current_buffer.text
        event.app.exit(exception=_CtrlC(nothing_typed=nothing), style="class:aborting")

    return keys


class _Completer(Completer):
    def __init__(self, completions: Completions) -> None:
        self._completions = completions

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        for text, replaced, remark in self._completions(document.text_before_cursor):
            yield Completion(text, start_position=-replaced, display_meta=remark)


# ---- History ----


def _history(path: Path, note: Callable[[str], None]) -> History:
    """The history in a private file, the older half of which goes when it has grown too long."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        if path.stat().st_size > MAX_HISTORY_BYTES:
            _, mark, newer = path.read_bytes()[-MAX_HISTORY_BYTES // 2 :].partition(b"\n# ")
            atomic_write(path, mark + newer)
        path.chmod(0o600)
    except OSError as error:
        note(f"what is typed is not kept: {path}: {error.strerror}")
        return InMemoryHistory()
    return _PrivateHistory(path, note)


class _PrivateHistory(FileHistory):
    """Works without its file when that cannot be written any more."""

    def __init__(self, path: Path, note: Callable[[str], None]) -> None:
        super().__init__(path)
        self._note = note
        self._writes = True

    def store_string(self, string: str) -> None:
        if not self._writes:
            return
        try:
            super().store_string(string.encode("utf-8", "replace").decode())
        except OSError as error:
            self._writes = False
            self._note(f"what is typed is not kept any more: {error.strerror}")
