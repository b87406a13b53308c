"""The chat templates that a model brings, by name: which of its files hold them, and which of those comes first. Knows
nothing of what they say.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.errors import UserError
from model.checkpoint import read_json
from model.gguf_within import templates_within

FILES = ("chat_template.jinja", "chat_template.json")
FOLDER = "additional_chat_templates"
MAX_TEMPLATE_BYTES = 256 << 10
DEFAULT = "default"
TOOL_USE = "tool_use"


@dataclass(frozen=True)
class TemplateText:
    """A template, and the file that errors name. Raises UserError when it is too large."""

    source: Path
    text: str

    def __post_init__(self) -> None:
        if len(self.text.encode(errors="surrogatepass")) > MAX_TEMPLATE_BYTES:
            raise _too_large(self.source)


def own_templates(path: Path) -> dict[str, TemplateText]:
    """The templates of the model at `path`, one of them named "default"; none where it brings none.

    Those in a GGUF file come first. Then, as Transformers has it, chat_template.jinja and the files in
    additional_chat_templates, before what tokenizer_config.json says; chat_template.json, of older processors, is last.
    Raises UserError for what is no template.
    """
    directory = path if path.is_dir() else path.parent
    for found in (_in_gguf(path), _in_files(directory), _in_json(directory / "chat_template.json")):
        if found and DEFAULT not in found:
            source = next(iter(found.values())).source
            raise UserError(f'{source}: has chat templates ({", ".join(sorted(found))}), but none named "{DEFAULT}"')
        if found:
            return found
    return {}


def _in_gguf(path: Path) -> dict[str, TemplateText]:
    within = templates_within(path)
    return {} if within is None else {name: TemplateText(within[0], text) for name, text in within[1].items()}


def _in_files(directory: Path) -> dict[str, TemplateText]:
    file = directory / "chat_template.jinja"
    found = {DEFAULT: _read(file)} if file.exists() else {}
    for file in sorted((directory / FOLDER).glob("*.jinja")):
        found[file.name.removesuffix(".jinja")] = _read(file)
    # Where files are only for other uses, what the configuration says is for this one.
    return found if DEFAULT in found else {**_in_json(directory / "tokenizer_config.json"), **found}


def _read(file: Path) -> TemplateText:
    try:
        if file.stat().st_size > MAX_TEMPLATE_BYTES:
            raise _too_large(file)
        return TemplateText(file, file.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{file}: is not UTF-8, so that it is no template") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from None


def _in_json(file: Path) -> dict[str, TemplateText]:
    value = read_json(file).get("chat_template") if file.exists() else None
    if value is None:
        return {}
    named = _by_name(value)
    if named is None:
        raise UserError(f'{file}: "chat_template" is neither a template nor a list of named ones')
    return {name: TemplateText(file, text) for name, text in named.items()}


def _by_name(value: Any) -> Mapping[str, str] | None:
    """A template alone is the default one; several are a list of {"name", "template"}, or an object."""
    if isinstance(value, str):
        return {DEFAULT: value}
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    if isinstance(value, dict) and all(isinstance(item, str) for pair in value.items() for item in pair):
        return value
    return None


def _too_large(source: Path) -> UserError:
    return UserError(f"{source}: the chat template is larger than {MAX_TEMPLATE_BYTES >> 10} KiB")
