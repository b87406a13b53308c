"""Messages to prompt token ids, by the model's own template or its family's. Knows which of the special tokens are the
template's.

What is in a message is text: a special token that somebody spells there is none. Templates are code from strangers and
run in a sandbox, in a process of its own that can be ended, with bounds on size, memory and time.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from config.errors import UserError
from model.chat_families import PLAIN, TEMPLATES, find_format
from model.chat_files import DEFAULT, TOOL_USE, TemplateText, own_templates
from model.chat_process import Sandbox
from model.config import ModelConfig
from model.tokenizer_base import Tokenizer

# Templates build special tokens from roles ("<|" + role + "|>"), so that a role is one of these and nothing else.
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""The names by which a message's thoughts are known."""
STAND_INS = range(0x20000, 0x2A6D7)
"""Characters that are written as they are also where a template writes a list or an object as Python does."""
MAX_ERROR_CHARACTERS = 400
OPEN_END = "(the message ends here) "
"""Shows where the last message ends in what a template makes of it, as Transformers does it."""


def load_chat_template(path: Path, tokenizer: Tokenizer, config: ModelConfig, name: str = "") -> "ChatTemplate":
    """The template of the model at `path`: its own, or else the format of its family, which `name` may tell, or else a
    dialogue in plain text.

    Raises UserError when its own is too large or no template.
    """
    if own := own_templates(path):
        return ChatTemplate(own, tokenizer)
    found = find_format(tokenizer, config, name or path.name)
    plain = found is PLAIN
    origin = "plain text (no chat format of it is known)" if plain else f"{found.name} (the model brings no template)"
    text = TemplateText(TEMPLATES / found.template, found.read())
    return ChatTemplate({DEFAULT: text}, tokenizer, origin=origin, plain=plain, stop=found.stop)


class ChatTemplate:
    """The templates of one model. Threads may share it.

    origin: where it comes from, for a person. plain: the model was not taught to converse as far as is known, and
    continues a dialogue. stop: texts that end an answer beside the tokens that do.
    """

    def __init__(
        self,
        templates: Mapping[str, TemplateText],
        tokenizer: Tokenizer,
        *,
        origin: str = "its own",
        plain: bool = False,
        stop: tuple[str, ...] = (),
    ) -> None:
        """templates: by name, with one that is named "default"."""
        self.origin, self.plain, self.stop = origin, plain, stop
        self._templates, self._tokenizer = templates, tokenizer
        self._sandbox = Sandbox()
        # No special token can begin and end in text that has neither the first nor the last character of one.
        self._marks = {mark for piece in tokenizer.special_pieces for mark in (piece[0], piece[-1])}
        self._spellings = {frozenset(piece) for piece in tokenizer.special_pieces}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The ids of a conversation, BOS included where the template writes it, ready for the model to answer.

        messages: {"role", "content"} and what else the template knows, of JSON's types. tools: functions that the model
        may call, as OpenAI describes them; a template of the model for this is used then. variables: what else the
        template may ask for, such as enable_thinking. Raises UserError with the template's own words when it refuses
        them, and when it fails or takes too long.
        """
        template = self._templates[TOOL_USE if tools is not None and TOOL_USE in self._templates else DEFAULT]
        fixed, given = self._given(messages, add_generation_prompt, tools, variables)
        try:
            return self._encoded(template, fixed, given)
        except RecursionError:
            raise UserError("the messages or the tools are nested too deeply") from None

    @property
    def template(self) -> str:
        """The template itself: the one that is used without tools."""
        return self._templates[DEFAULT].text

    def text(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, *, open_end: bool = False
    ) -> str:
        """The text of a conversation as the template writes it, special tokens spelled: where a message spells one, it
        is one too. open_end: the text ends within the last message, which is to be continued. Raises UserError as
        `render` does.
        """
        if open_end:
            *before, last = messages
            messages = [*before, {**last, "content": last["content"] + OPEN_END}]
        fixed, given = self._given(messages, add_generation_prompt, None, None)
        template = self._templates[DEFAULT]
        (text,) = self._render(template, [fixed | given])
        if not open_end:
            return text
        at = text.rfind(OPEN_END.strip())
        if at < 0:
            raise UserError(f"{template.source}: the chat template does not write what the last message says")
        # Without the space after it, the template strips what a message says.
        return text[:at] if text[at:].startswith(OPEN_END) else text[:at].rstrip()

    def _given(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What templates are told by us, and what by others. Raises UserError for a role that is none."""
        for message in messages:
            if message.get("role") not in ROLES:
                raise UserError(f"a message has role {message.get('role')!r}; it can be {', '.join(ROLES)}")
        fixed = {**self._tokenizer.named, "add_bos": self._tokenizer.add_bos}
        fixed["add_generation_prompt"] = add_generation_prompt
        given: dict[str, Any] = {"documents": None, **(variables or {})}
        given |= {"messages": [_as_expected(message) for message in messages], "tools": tools and list(tools)}
        given = {name: value for name, value in given.items() if name not in fixed}
        return fixed, given

    def _encoded(self, template: TemplateText, fixed: dict[str, Any], given: dict[str, Any]) -> list[int]:
        characters: set[str] = set().union(*_strings(given))
        stand_ins = self._stand_ins(characters, template.text)
        if not stand_ins:
            (text,) = self._render(template, [fixed | given])
            return self._tokenizer.encode_parts(self._tokenizer.split_specials(text))
        # Where other characters stand for these marks in the messages, every special token is the template's own.
        there = str.maketrans(stand_ins)
        back = str.maketrans({stand_in: mark for mark, stand_in in stand_ins.items()})
        # But the template may look at what a message says, such as the end of a thought, and would not see the marks.
        near = _mapped(given, self._nearly(template.text, characters, there))
        far = _mapped(given, lambda text: text.translate(there))
        safe, seen = self._render(template, [fixed | far, fixed | near])
        parts = self._tokenizer.split_specials(safe)
        if safe.translate(back) != seen.translate(back):
            # What it saw is the better text, if that brought no special token.
            seen_parts = self._tokenizer.split_specials(seen)
            if _only_ids(seen_parts) == _only_ids(parts):
                parts = seen_parts
        return self._tokenizer.encode_parts([p.translate(back) if isinstance(p, str) else p for p in parts])

    def _stand_ins(self, characters: set[str], template: str) -> dict[str, str]:
        """For each mark among the messages' characters, a character that is neither there nor in the template."""
        marks = sorted(self._marks & characters)
        taken = characters.union(template, *self._spellings)
        free = (c for c in map(chr, STAND_INS) if c not in taken)
        stand_ins = dict(zip(marks, free, strict=False))
        if len(stand_ins) < len(marks):
            raise UserError("the messages hold every character that could stand for others; leave some out")
        return stand_ins

    def _nearly(self, template: str, characters: set[str], there: Mapping[int, str]) -> Callable[[str], str]:
        """What a text of the messages becomes to be as true as is safe.

        As they are, where their characters do not suffice to spell a special token, however they are cut and joined.
        Else with marks only in what the template may look for: a text in it that neither holds a special token nor is
        a part of one.
        """
        if not any(spelling <= characters for spelling in self._spellings):
            return lambda text: text
        looked_for = {_unescaped(run) for run in re.split("['\"]", template)}
        specials = self._tokenizer.special_pieces
        kept = [text for text in looked_for if len(text) > 1 and self._marks & set(text)]
        kept = [text for text in kept if not any(text in piece or piece in text for piece in specials)]
        pattern = re.compile("|".join(["(?!)", *map(re.escape, sorted(kept, key=len, reverse=True))]))

        def translate(text: str) -> str:
            at, pieces = 0, []
            for match in pattern.finditer(text):
                pieces += [text[at : match.start()].translate(there), match[0]]
                at = match.end()
            return "".join([*pieces, text[at:].translate(there)])

        return translate

    def _render(self, template: TemplateText, renders: list[dict[str, Any]]) -> list[str]:
        answer = self._sandbox.ask(template.text, renders)
        if isinstance(answer, str):
            words = " ".join("".join(c if c.isprintable() else " " for c in answer).split())
            cut = words if len(words) <= MAX_ERROR_CHARACTERS else f"{words[:MAX_ERROR_CHARACTERS]}…"
            raise UserError(f"{template.source}: the chat template {cut}")
        return answer


def _as_expected(message: Mapping[str, Any]) -> dict[str, Any]:
    """As Transformers gives it to templates: nothing that is null, and thoughts by the names that are asked for."""
    given = {name: value for name, value in message.items() if value is not None}
    thoughts = [given[name] for name in THOUGHTS if name in given]
    return {"thinking": thoughts[0], **given, "reasoning_content": thoughts[0]} if thoughts else given


def _only_ids(parts: Sequence[str | int]) -> list[int]:
    return [part for part in parts if isinstance(part, int)]


def _unescaped(text: str) -> str:
    """As a text in a template is meant, of which this is what is written."""
    return text.replace("\\n", "\n").replace("\\t", "\t").replace("\\\\", "\\")


def _strings(value: Any) -> Iterator[str]:
    """Every text in a value of JSON's types. The names by which a template gets at things are none."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not key.isidentifier():
                yield key
            yield from _strings(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """The same value with every such text changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        keys = (key if key.isidentifier() else change(key) for key in value)
        return {key: _mapped(item, change) for key, item in zip(keys, value.values(), strict=True)}
    return [_mapped(item, change) for item in value] if isinstance(value, Sequence) else value
