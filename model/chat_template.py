"""Messages to prompt token ids, by the model's own template. Knows which of the special tokens are the template's.

What is in a message is text: a special token that somebody spells there is none. Templates are code from strangers and
run in a sandbox, in a process of its own that can be ended, with bounds on size, memory and time.
"""

import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from config.errors import UserError
from model.checkpoint import read_json
from model.tokenizer_base import Tokenizer

MAX_TEMPLATE_BYTES = 256 << 10
MAX_SECONDS = 10.0
# Templates build special tokens from roles ("<|" + role + "|>"), so that a role is one of these and nothing else.
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
BOOTSTRAP = "import runpy, sys; sys.path += sys.argv[2:]; runpy.run_path(sys.argv[1], run_name='__main__')"
SANDBOX = Path(__file__).with_name("chat_sandbox.py")


def load_chat_template(path: Path, tokenizer: Tokenizer) -> "ChatTemplate | None":
    """The template of the model at `path`, from chat_template.jinja or else tokenizer_config.json; None without one.

    Raises UserError when it is too large or no template.
    """
    directory = path if path.is_dir() else path.parent
    file, settings = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    if file.exists():
        if file.stat().st_size > MAX_TEMPLATE_BYTES:
            raise _too_large(file)
        try:
            return ChatTemplate(file, file.read_text(encoding="utf-8"), tokenizer)
        except UnicodeDecodeError:
            raise UserError(f"{file}: is not UTF-8, so that it is no template") from None
    template = read_json(settings).get("chat_template") if settings.exists() else None
    if template is None:
        return None
    if isinstance(template, list):
        defaults = (entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default")
        template = next(defaults, {}).get("template")
    if not isinstance(template, str):
        raise UserError(f'{settings}: "chat_template" is neither a template nor a list with one named "default"')
    return ChatTemplate(settings, template, tokenizer)


class ChatTemplate:
    """A model's template. Threads may share it."""

    def __init__(self, source: Path, template: str, tokenizer: Tokenizer) -> None:
        if len(template.encode()) > MAX_TEMPLATE_BYTES:
            raise _too_large(source)
        self._source, self._template, self._tokenizer = source, template, tokenizer
        self._sandbox = _Sandbox()
        # No special token can begin and end in text that has neither the first nor the last character of one.
        self._marks = {mark for piece in tokenizer.special_pieces for mark in (piece[0], piece[-1])}

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """The ids of a conversation, BOS included where the template writes it, ready for the model to answer.

        messages: {"role", "content"} and what else the template knows, of JSON's types. Raises UserError with the
        template's own words when it refuses them, and when it fails or takes too long.
        """
        for message in messages:
            if message.get("role") not in ROLES:
                raise UserError(f"a message has role {message.get('role')!r}; it can be {', '.join(ROLES)}")
        variables: dict[str, Any] = {"messages": list(messages), "tools": None, "documents": None}
        variables |= {**self._tokenizer.named, "add_generation_prompt": add_generation_prompt}
        stand_ins = self._stand_ins(messages)
        if not stand_ins:
            (text,) = self._render([variables])
            return self._tokenizer.encode_parts(self._tokenizer.split_specials(text))
        # Where other characters stand for these marks in the messages, every special token is the template's own.
        there = str.maketrans(stand_ins)
        back = str.maketrans({stand_in: mark for mark, stand_in in stand_ins.items()})
        text, safe = self._render([variables, {**variables, "messages": _translate(list(messages), there)}])
        parts = self._tokenizer.split_specials(safe)
        if safe.translate(back) != text:
            # The template looks at what a message says, such as the end of a thought, and did not see the marks. It saw
            # the true messages too: that text is the better one, if they brought no special token with them.
            true_parts = self._tokenizer.split_specials(text)
            if _only_ids(true_parts) == _only_ids(parts):
                parts = true_parts
        return self._tokenizer.encode_parts([p.translate(back) if isinstance(p, str) else p for p in parts])

    def _stand_ins(self, messages: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        """For each mark that the messages hold, a character that is nowhere in them or in the template."""
        characters = set().union(*_strings(messages))
        marks = sorted(self._marks & characters)
        taken = characters | set(self._template)
        free = (c for c in map(chr, range(0xF0000, 0x10FFFE)) if c not in taken)
        stand_ins = dict(zip(marks, free, strict=False))
        if len(stand_ins) < len(marks):
            raise UserError("the messages hold every private character of Unicode; leave some out")
        return stand_ins

    def _render(self, renders: list[dict[str, Any]]) -> list[str]:
        answer = self._sandbox.ask({"template": self._template, "renders": renders})
        if answer is None:
            raise UserError(f"{self._source}: the chat template was ended: it took more than {MAX_SECONDS:g} s or died")
        if "error" in answer:
            raise UserError(f"{self._source}: the chat template says: {' '.join(str(answer['error']).split())}")
        texts: list[str] = answer["texts"]
        return texts


def _too_large(source: Path) -> UserError:
    return UserError(f"{source}: the chat template is larger than {MAX_TEMPLATE_BYTES >> 10} KiB")


def _only_ids(parts: Sequence[str | int]) -> list[int]:
    return [part for part in parts if isinstance(part, int)]


def _strings(value: Any) -> Iterator[str]:
    """Every string in a value of JSON's types, but for the keys of objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)


def _translate(value: Any, table: Mapping[int, str]) -> Any:
    """The same value with every such string translated."""
    if isinstance(value, str):
        return value.translate(table)
    if isinstance(value, Mapping):
        return {key: _translate(item, table) for key, item in value.items()}
    return [_translate(item, table) for item in value] if isinstance(value, Sequence) else value


class _Sandbox:
    """The process that renders: started when it is first asked, and again when it had to be ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._process is not None and self._process.poll() is None:
            return self._process
        # -I: neither the environment nor the working directory says what is imported; our own path does.
        command = [sys.executable, "-I", "-c", BOOTSTRAP, str(SANDBOX), *filter(None, sys.path)]
        # In a session of its own it does not hear Ctrl-C, which is for us.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        weakref.finalize(self, _end, process)
        self._process = process
        return process

    def ask(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """The answer; None when there was none in time."""
        with self._lock:
            process = self._started()
            timer = threading.Timer(MAX_SECONDS, process.kill)
            timer.daemon = True
            timer.start()
            try:
                stdin, stdout = _pipes(process)
                stdin.write(json.dumps(request).encode() + b"\n")
                stdin.flush()
                line = stdout.readline()
                answer: dict[str, Any] = json.loads(line)
            except (OSError, ValueError):
                process.kill()
                process.wait()
                return None
            finally:
                timer.cancel()
            return answer


def _pipes(process: "subprocess.Popen[bytes]") -> tuple[IO[bytes], IO[bytes]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for pipe in _pipes(process):
        try:
            pipe.close()
        except OSError:
            # What was still to be written to it has nowhere to go.
            continue
