"""A conversation as a file: one JSON object with who said what, the system text and the settings. Knows no model."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.chat_settings import SETTINGS
from cli.options import did_you_mean
from config.cache import atomic_write
from config.errors import UserError
from config.settings import SamplingParams, shorten

MAX_BYTES = 256 * 2**20
KEYS = ("model", "system", "messages", "settings")
Message = dict[str, str]


@dataclass(frozen=True)
class Saved:
    """A conversation: exchanges of a message and its answer, in turn. model: the one it was held with."""

    model: str
    system: str | None
    messages: Sequence[Message]
    settings: Mapping[str, Any]
    """Of SamplingParams; what is missing is the model's own."""


def save(name: str, saved: Saved) -> Path:
    """Write the file, whole or not at all. One that is there is replaced if it is a conversation. Raises UserError."""
    path = _path(name)
    if path.exists():
        try:
            load(name)
        except UserError as error:
            raise UserError(f"{path} is there and is no conversation, so it stays as it is: choose another") from error
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no directory {path.parent}")
    document = {key: vars(saved)[key] for key in KEYS}
    try:
        atomic_write(path, (json.dumps(document, ensure_ascii=False, indent=1) + "\n").encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    return path


def load(name: str) -> Saved:
    """Read a file that `save` wrote, or that somebody wrote by hand. Raises UserError, naming what is wrong."""
    path = _path(name)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise UserError(f"{path}: more than {MAX_BYTES >> 20} MB is no conversation")
    try:
        document: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON: {shorten(str(error))}") from error
    try:
        return _checked(document)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _path(name: str) -> Path:
    if not name or "\0" in name:
        raise UserError("which file? give its name")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(f"{shorten(name)}: {error}") from error


def _checked(document: Any) -> Saved:
    if not isinstance(document, dict) or not isinstance(document.get("messages"), list):
        raise UserError('is no conversation: a JSON object with "messages" is needed')
    if unknown := [key for key in document if key not in KEYS]:
        raise UserError(f"unknown key {shorten(unknown[0])!r}{did_you_mean(unknown[0], KEYS)}")
    system, model, settings = document.get("system"), document.get("model", ""), document.get("settings", {})
    messages = [_message(number, one) for number, one in enumerate(document["messages"], 1)]
    if system is None and messages and messages[0]["role"] == "system":
        system, messages = messages[0]["content"], messages[1:]
    if not isinstance(system, str | None) or not isinstance(model, str) or not isinstance(settings, dict):
        raise UserError('"system" and "model" must be texts and "settings" an object')
    for number, message in enumerate(messages, 1):
        expected = "user" if number % 2 else "assistant"
        if message["role"] != expected:
            raise UserError(f"message {number} is of {message['role']!r}, and {expected!r} comes there")
    if len(messages) % 2:
        raise UserError("the last message has no answer: leave it out, and ask it anew")
    return Saved(model, system, messages, _settings(settings))


def _message(number: int, one: Any) -> Message:
    texts = isinstance(one, dict) and set(one) == {"role", "content"} and all(isinstance(v, str) for v in one.values())
    if not texts:
        raise UserError(f'message {number} must be {{"role": a text, "content": a text}}, not {shorten(repr(one))}')
    return {"role": one["role"], "content": one["content"]}


def _settings(settings: dict[str, Any]) -> dict[str, Any]:
    for name in settings:
        if name not in SETTINGS:
            raise UserError(f"unknown setting {shorten(name)!r}{did_you_mean(name, SETTINGS)}")
    found = dict(settings)
    if "stop" in found:
        stop = found["stop"]
        if not isinstance(stop, str | list):
            raise UserError(f"stop must be a text or a list of texts, not {shorten(repr(stop))}")
        found["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    SamplingParams(**found)
    return found
