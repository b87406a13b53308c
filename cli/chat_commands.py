"""The commands of a conversation: their names, what each does, what can be completed after it. Knows the session that
they change, not the terminal that they are typed at; imports no torch.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import chat_files
from cli.chat_settings import SETTINGS, setting_name, settings_rows
from cli.chat_view import aligned, tell
from cli.options import did_you_mean
from config.errors import UserError
from config.registry import entries
from config.settings import DEVICES, DTYPES, shorten
from quant.recipe import READY_MADE

if TYPE_CHECKING:  # only its name: it is what runs the commands
    from cli.chat import Chat

Run = Callable[["Chat", str], None]
KEYS = (
    ('"""', "begins a text of several lines, which the same ends; Alt-Enter begins a line anywhere"),
    ("Ctrl-X Ctrl-E", "opens the text in your editor ($VISUAL, $EDITOR), and sends what was saved there"),
    ("Ctrl-C", "stops an answer and keeps what there is of it"),
    ("Ctrl-R, Up", "search, or go back in, what was typed before"),
)


@dataclass(frozen=True)
class Command:
    """What a word after a slash does. words: what can come after it, as /help has it."""

    words: str
    help: str
    run: Run
    choices: Callable[[str], Iterable[str]] = field(default=lambda typed: ())
    """What can stand after it, given what was typed of that."""


def find(name: str) -> Command:
    """The command of that name. Raises UserError with the nearest."""
    command = COMMANDS.get(ALIASES.get(name, name))
    if command is None:
        near = did_you_mean(f"/{name}", [f"/{one}" for one in (*COMMANDS, *ALIASES)])
        raise UserError(
            f"unknown command /{shorten(name)}{near} (/help lists them; with a space before the slash it is a message)"
        )
    return command


def completions(before: str) -> Iterator[tuple[str, int, str]]:
    """What can stand at the end of a text that begins with a slash: text, how much of the end it replaces, a remark."""
    if not before.startswith("/") or "\n" in before:
        return
    name, space, typed = before[1:].partition(" ")
    if not space:
        for known, command in COMMANDS.items():
            if known.startswith(name.lower()):
                yield f"/{known}", len(before), command.help
        return
    named = COMMANDS.get(ALIASES.get(name.lower(), name.lower()))
    for choice in named.choices(typed) if named is not None else ():
        if choice.startswith(typed) and choice != typed:
            yield choice, len(typed), ""


# ---- The conversation ----


def _help(chat: "Chat", text: str) -> None:
    _nothing_after("help", text)
    names = {name: ", ".join(f"/{alias}" for alias, meant in ALIASES.items() if meant == name) for name in COMMANDS}
    rows = [
        (f"/{name} {command.words}".rstrip(), f"{command.help}{f' (also {names[name]})' if names[name] else ''}")
        for name, command in COMMANDS.items()
    ]
    tell([*aligned([*rows, *KEYS]), "", "  All else is a message."])


def _system(chat: "Chat", text: str) -> None:
    if not text:
        tell([chat.session.system or "  there is no system text"])
        return
    if not chat.session.set_system(None if text == "off" else text):
        chat.note(f"the chat format of {chat.session.prepared.name} leaves the system text out")
    else:
        _confirm(chat, "no system text" if text == "off" else "the model is told that from now on")


def _clear(chat: "Chat", text: str) -> None:
    _nothing_after("clear", text)
    chat.session.clear()
    chat.note("a new conversation; settings and system text stay")


def _retry(chat: "Chat", text: str) -> None:
    _nothing_after("retry", text)
    if "seed" in chat.session.chosen and chat.session.params().temperature:
        chat.note("the seed is set, so that the answer is the same: /set seed default")
    chat.answer(chat.session.retry)


def _undo(chat: "Chat", text: str) -> None:
    _nothing_after("undo", text)
    undone = chat.session.undo()
    if undone is None:
        raise UserError("there is nothing to undo")
    chat.note(f"forgotten, with its answer: {shorten(undone, 60)}")


def _save(chat: "Chat", text: str) -> None:
    session = chat.session
    saved = chat_files.Saved(session.prepared.name, session.system, session.conversation.messages, session.chosen)
    chat.note(f"saved: {chat_files.save(text, saved)}")


def _load(chat: "Chat", text: str) -> None:
    chat.load(chat_files.load(text))


def _exit(chat: "Chat", text: str) -> None:
    _nothing_after("exit", text)
    chat.leaving = True


# ---- What is known ----


def _set(chat: "Chat", text: str) -> None:
    name, _, value = text.partition(" ")
    if value.strip():
        chat.session.set(name, value.strip())
        rows = settings_rows(chat.session.params(), chat.session.chosen)
        _confirm(chat, next(f"{key}: {shown}" for key, shown, _ in rows if key == setting_name(name)))
    elif name:
        raise UserError(f"/set {shorten(name)} to what? a value, or default; /set alone shows all")
    else:
        tell(aligned(settings_rows(chat.session.params(), chat.session.chosen)))


def _show(chat: "Chat", text: str) -> None:
    _nothing_after("show", text)
    tell(aligned(chat.session.facts()))


def _stats(chat: "Chat", text: str) -> None:
    if text in ("on", "off"):
        chat.stats = text == "on"
        _confirm(chat, f"figures: {text}")
    elif text:
        raise UserError(f"/stats takes on or off, or nothing for those of the last answer, not {shorten(text)!r}")
    else:
        tell(aligned([(chat.last_figures or "there is no answer yet",)]))


# ---- The model ----


def _model(chat: "Chat", text: str) -> None:
    _change(chat, "model", text, "a name, a directory or a file", {"model": text})


def _quantize(chat: "Chat", text: str) -> None:
    session = chat.session
    if text == "off":
        if session.prepared.stored is not None:
            raise UserError(
                f"{session.prepared.name} is stored quantized; /model {session.prepared.stored.source} is the original"
            )
        _changed(chat, session.rebuild({"quantize": None}, without=("TORCHCHAT_QUANTIZE",)))
        return
    _change(chat, "quantize", text, f"off, {', '.join(READY_MADE)}, a JSON file, or JSON", {"quantize": text})


def _dtype(chat: "Chat", text: str) -> None:
    _change(chat, "dtype", text, ", ".join(DTYPES), {"dtype": text})


def _device(chat: "Chat", text: str) -> None:
    _change(chat, "device", text, ", ".join(DEVICES), {"device": text})


COMPILE = {
    "on": {"compile": True},
    "prefill": {"compile_prefill": True},
    "off": {"compile": False, "compile_prefill": False},
}


def _compile(chat: "Chat", text: str) -> None:
    if (text or "on") not in COMPILE:
        raise UserError(f"/compile takes {', '.join(COMPILE)}, not {shorten(text)!r}")
    _changed(chat, chat.session.rebuild(COMPILE[text or "on"]))


def _change(chat: "Chat", name: str, text: str, values: str, changes: dict[str, Any]) -> None:
    """Build the model anew; without a value, say what there is and what could be."""
    if text:
        _changed(chat, chat.session.rebuild(changes))
    else:
        tell(aligned([(chat.session.describe(),), (f"/{name} takes {values}",)]))


def _changed(chat: "Chat", anew: bool) -> None:
    if anew:
        chat.introduce()
    else:
        chat.note(f"nothing to change: {chat.session.describe()}")


def _confirm(chat: "Chat", line: str) -> None:
    """For a person, who would else see nothing; a script knows what it said."""
    if chat.interactive:
        chat.note(line)


def _nothing_after(name: str, text: str) -> None:
    if text:
        raise UserError(f"/{name} takes nothing, not {shorten(text)!r}")


# ---- What can be completed ----


def _paths(typed: str) -> list[str]:
    """The files and directories that a path may become."""
    folder, _, start = typed.rpartition("/")
    folder = f"{folder}/" if "/" in typed else ""
    try:
        inside = list(os.scandir(Path(folder or ".").expanduser()))
        found = [entry.name + ("/" if entry.is_dir() else "") for entry in inside]
    except (OSError, RuntimeError):
        return []
    return sorted(f"{folder}{name}" for name in found if not name.startswith(".") or start.startswith("."))


def _recipes(typed: str) -> list[str]:
    return ["off", *READY_MADE, *(path for path in _paths(typed) if path.endswith((".json", "/")))]


def _models(typed: str) -> list[str]:
    return [*(entry.name for entry in entries()), *(path for path in _paths(typed) if path.endswith("/"))]


COMMANDS: dict[str, Command] = {
    "help": Command("", "this list", _help),
    "system": Command("[TEXT|off]", "what the model is to be told first", _system, lambda typed: ("off",)),
    "set": Command(
        "[NAME VALUE]",
        "how answers are sampled; alone: all settings",
        _set,
        lambda typed: (*SETTINGS, *(f"{name} default" for name in SETTINGS if typed.startswith(f"{name} "))),
    ),
    "show": Command("", "the model, how it was built, and how much of the context is used", _show),
    "stats": Command("[on|off]", "figures after each answer; alone: the last ones", _stats, lambda t: ("on", "off")),
    "retry": Command("", "another answer to the last message", _retry),
    "undo": Command("", "forget the last message and its answer", _undo),
    "clear": Command("", "begin a new conversation", _clear),
    "save": Command("FILE", "write the conversation and its settings", _save, _paths),
    "load": Command("FILE", "go on with a conversation that was saved", _load, _paths),
    "model": Command("[MODEL]", "go on with another model", _model, _models),
    "quantize": Command("[RECIPE|off]", "quantize its weights", _quantize, _recipes),
    "dtype": Command("[DTYPE]", "change its precision", _dtype, lambda typed: DTYPES),
    "device": Command("[DEVICE]", "move it", _device, lambda typed: DEVICES),
    "compile": Command("[on|prefill|off]", "compile it, or run it as it is", _compile, lambda typed: tuple(COMPILE)),
    "exit": Command("", "leave, as Ctrl-D does", _exit),
}
ALIASES = {"quit": "exit", "bye": "exit", "?": "help"}
