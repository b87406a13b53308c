"""The settings that a conversation can change while it goes on: their names, and how each is typed. Knows no model."""

import json
from typing import Any

from cli.options import did_you_mean
from config.errors import UserError
from config.settings import SamplingParams, shorten

SETTINGS: dict[str, type] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "max_new_tokens": int,
    "seed": int,
    "stop": tuple,
}
"""Fields of SamplingParams, and of which kind each is."""
WITHOUT_EFFECT = ("top_p", "top_k", "min_p", "seed")
"""At temperature 0."""


def setting_name(word: str) -> str:
    """The setting that somebody means. Raises UserError with the nearest."""
    name = word.replace("-", "_").lower()
    if name not in SETTINGS:
        near = did_you_mean(name, SETTINGS)
        raise UserError(f"{shorten(word)!r} cannot be set{near} ({', '.join(SETTINGS)} can)")
    return name


def read_setting(name: str, text: str) -> Any:
    """The value that somebody typed for a setting, of its kind; its range is not checked here. Raises UserError."""
    kind = SETTINGS[name]
    if kind is tuple:
        return _read_stop(text)
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"{name} must be {what}, or default, not {shorten(text)!r}") from None


def _read_stop(text: str) -> tuple[Any, ...]:
    if text[:1] not in ("[", '"'):
        return (text,)
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError('stop takes a text, or JSON such as "\\n\\n" and ["User:", "###"]') from None
    return tuple(found) if isinstance(found, list) else (found,)


def settings_rows(params: SamplingParams, chosen: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Of each setting its name, its value in `params`, and whether somebody chose it."""
    rows = []
    for name in SETTINGS:
        value = vars(params)[name]
        if name == "stop":
            text = json.dumps(list(value), ensure_ascii=False) if value else "none"
        elif name == "seed" and name not in chosen:
            text = "a new one for each answer"
        elif value is None:
            text = "until the end"
        else:
            text = f"{value:g}" if isinstance(value, float) else str(value)
        rows.append((name, text, "set here" if name in chosen else ""))
    return rows
