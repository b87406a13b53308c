"""The command `chat`: a conversation in a terminal, or a script of one through a pipe. Imports torch only once the
flags are known to be good, and what draws on a terminal only when there is one.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Generator
from contextlib import closing
from typing import TYPE_CHECKING, Protocol

from cli import chat_files
from cli.chat_commands import ALIASES, COMMANDS, completions, find
from cli.chat_input import Script, parse
from cli.chat_settings import SETTINGS
from cli.chat_view import PlainView, View, note, typing_unseen
from cli.console import cache_dir_or_say, has_colour, interruptible, print_error, status
from cli.options import add_model_arguments, add_pte_argument, add_sampling_arguments, build_settings, sampling_params
from config.errors import UserError
from config.settings import SamplingParams

if TYPE_CHECKING:  # only its name: this module is imported for --help, which must not wait for torch
    from cli.chat_session import Session
    from generate.conversation import Reply

EXIT_WRONG = 2
EXIT_INTERRUPTED = 130
Answer = Callable[[Callable[[int], None]], Generator[str, None, None]]
"""Begins an answer, given what is to be told when old messages are left out."""


class Reader(Protocol):
    """Where messages and commands come from."""

    def read(self) -> str:
        """The next one. Raises EOFError when there is none, UserError for one that cannot be read."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `chat`."""
    add_model_arguments(parser)
    add_pte_argument(parser)
    add_sampling_arguments(parser)
    group = parser.add_argument_group("conversation")
    group.add_argument("--system", metavar="TEXT", help="what the model is told before the first message")
    group.add_argument("--load", metavar="FILE", help="go on with a conversation that /save wrote")
    group.add_argument("--stats", action="store_true", help="show figures after each answer")
    group.add_argument(
        "--history",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep what is typed in a terminal for the next time (default: yes)",
    )


def run(args: argparse.Namespace) -> int:
    """Converse until the input ends. The exit code: 0; of a script 2 when any of its lines failed, 130 after Ctrl-C."""
    build_settings(args, os.environ, say=lambda _: None)  # a bad value is refused before anything slow
    sampling_params(args, SamplingParams())
    if sys.stdin is None:
        raise UserError("there is nobody to converse with: standard input is closed")
    saved = None if args.load is None else chat_files.load(args.load)
    chosen = {name: value for name, value in vars(args).items() if name in SETTINGS and value is not None}
    if "stop" in chosen:
        chosen["stop"] = tuple(args.stop)

    # Torch from here on.
    from cli.chat_session import Session

    system, messages = args.system, []
    if saved is not None:
        chosen, messages = {**saved.settings, **chosen}, list(saved.messages)
        system = saved.system if system is None else system
    session = Session(vars(args), os.environ, chosen, system, messages, status)
    if args.explain:
        from cli.explain_report import show_explanation

        return show_explanation(session.prepared, session.context, as_json=False)
    interactive = sys.stdin.isatty() and (sys.stdout.isatty() or sys.stderr.isatty())
    chat = Chat(session, interactive=interactive, stats=args.stats)
    chat.introduce()
    session.load()
    if saved is not None:
        chat.note_loaded(saved)
    return chat.converse(_terminal(args.history) if interactive else Script(sys.stdin.buffer))


def _terminal(history: bool) -> Reader:
    from cli.chat_terminal import Terminal

    directory = cache_dir_or_say() if history else None
    return Terminal(completions, None if directory is None else directory / "chat_history", note)


class Chat:
    """A session, and how it is shown."""

    def __init__(self, session: "Session", *, interactive: bool, stats: bool = False) -> None:
        """interactive: a person types, so that what fails is told and forgotten."""
        self.session, self.interactive, self.stats = session, interactive, stats
        self.leaving = False
        self.last_figures: str | None = None
        """Of the last answer, whatever became of the model since."""
        self._view = _view_of(session)
        self._failed = False

    def converse(self, reader: Reader) -> int:
        """Messages and commands one after the other; the exit code."""
        while not self.leaving:
            try:
                self.handle(reader.read())
            except EOFError:
                break
            except UserError as error:
                if os.environ.get("TORCHCHAT_DEBUG", "") not in ("", "0"):
                    traceback.print_exc()
                print_error(str(error))
                self._failed = True
                if not self.session.has_model:
                    return EXIT_WRONG
            except KeyboardInterrupt:
                if not (self.interactive and self.session.has_model):
                    return EXIT_INTERRUPTED
                self.note("interrupted")
        return EXIT_WRONG if self._failed and not self.interactive else 0

    def handle(self, text: str) -> None:
        """One message or command. Raises UserError."""
        typed = parse(text)
        # What is pasted and begins with a slash is a message, but for a command that takes several lines.
        known = typed.command in COMMANDS or typed.command in ALIASES
        if typed.command is not None and (known or "\n" not in text):
            with typing_unseen():  # some take a while
                find(typed.command).run(self, typed.text)
        elif message := typed.text if typed.command is None else text.strip():
            self.answer(lambda on_drop: self.session.ask(message, on_drop))

    def answer(self, begin: Answer) -> None:
        """Show an answer while it is made. Ctrl-C stops it between two tokens, a second one at once."""
        left_out: list[int] = []
        pieces, view, broken_off = begin(left_out.append), self._view(), False
        with interruptible() as interrupted, typing_unseen():
            try:
                with closing(pieces):
                    for piece in pieces:
                        view.write(piece)
                        if interrupted:
                            break
            except KeyboardInterrupt:
                broken_off = True
            except UserError:
                view.end(whole=False)
                raise
            view.end(whole=not (interrupted or broken_off))
        reply = self.session.reply
        if broken_off:
            self.session.renew_engine()
        if left_out and reply is not None:
            self.note(f"the context is full: the {reply.dropped:,} oldest messages are no longer seen")
        self._remark(reply, stopped=bool(interrupted) or broken_off)
        if interrupted and not self.interactive:
            raise KeyboardInterrupt

    def _remark(self, reply: "Reply | None", *, stopped: bool) -> None:
        if stopped:
            self.note("stopped")
        elif reply is not None and reply.finish_reason == "length":
            self.note(f"cut after {len(reply.token_ids):,} tokens")
        elif reply is not None and not reply.text:
            self.note("the answer is empty")
        if (figures := self._figures()) is not None:
            self.last_figures = figures
            if self.stats:
                self.note(figures)

    def _figures(self) -> str | None:
        """What the last answer took, in a line."""
        reply = self.session.reply
        if reply is None or reply.first_token_s is None:
            return None
        from cli.ledger import rate, seconds

        made, spent = len(reply.token_ids), reply.seconds - reply.first_token_s
        parts = [
            f"{reply.prompt_tokens - reply.reused_tokens:,} new tokens read, {reply.reused_tokens:,} reused",
            f"first token after {seconds(reply.first_token_s)}",
            f"{made:,} made" + (f" at {rate((made - 1) / spent)}" if made > 1 and spent > 0 else ""),
            f"context {reply.context_used:,} of {self.session.context:,}",
            *([f"seed {self.session.seed}"] if self.session.params().temperature else []),
        ]
        return " · ".join(parts)

    def introduce(self) -> None:
        """Say what answers, and what a person may not expect of it."""
        for line in (self.session.describe(), *self.session.remarks()):
            status(line)

    def load(self, saved: chat_files.Saved) -> None:
        """Go on with a saved conversation. Raises UserError and changes nothing."""
        self.session.replace(saved.system, list(saved.messages), saved.settings)
        self.note_loaded(saved)

    def note_loaded(self, saved: chat_files.Saved) -> None:
        """Say what is here now."""
        other = f", held with {saved.model}" if saved.model not in ("", self.session.prepared.name) else ""
        self.note(f"{len(saved.messages):,} messages are here{other}")

    def note(self, line: str) -> None:
        """A remark for the person, or for whoever reads what a script says on stderr."""
        (note if self.interactive else status)(line)


def _view_of(session: "Session") -> Callable[[], View]:
    """Begins to show an answer, as suits stdout."""
    if not has_colour(sys.stdout):
        return PlainView
    from cli.chat_markdown import MarkdownView

    return lambda: MarkdownView(sys.stdout, in_thought=session.opens_thought())
