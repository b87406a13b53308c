"""A conversation and the model that it is held with: how answers are sampled, and how the model is built anew in its
middle. Shows nothing; what a person should know goes to `say`.
"""

import argparse
import dataclasses
import gc
import secrets
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch

from cli.builder import Built, Prepared, build, context_length, make_engine, prepare
from cli.chat_settings import WITHOUT_EFFECT, read_setting, setting_name
from cli.console import cache_dir_or_say, describe_build, human_bytes
from cli.options import MODEL_FLAGS, build_settings
from config.errors import UserError
from config.settings import SamplingParams, shorten
from generate.conversation import Conversation, Message, Reply
from generate.stats import Ledger
from model.chat_template import ChatTemplate
from model.device import give_back_freed_memory
from model.tokenizer import Tokenizer


class Session:
    """Of the model there is at most one at any time; the history outlives it."""

    def __init__(
        self,
        asked: Mapping[str, Any],
        environ: Mapping[str, str],
        chosen: Mapping[str, Any],
        system: str | None,
        messages: list[Message],
        say: Callable[[str], None],
    ) -> None:
        """asked: MODEL and the flags of MODEL_FLAGS by name, None where left out. chosen: settings of SETTINGS. Checks
        all that can be known without weights; `load` does the rest. Raises UserError.
        """
        self._asked = {name: asked[name] for name in ("model", "pte_path", *MODEL_FLAGS)}
        self._environ = dict(environ)
        self.chosen = dict(chosen)
        self._say, self._said = say, set[str]()
        self._system = system
        self._messages = messages
        self._built: Built | None = None
        self._conversation: Conversation | None = None
        self.reply: Reply | None = None
        """Of the last answer."""
        self.seed = 0
        """That the last answer was sampled with."""
        self.prepared = self._prepare(self._asked, self._environ)

    # ---- The model ----

    def load(self) -> None:
        """Weights, engine, and what is compiled. Raises UserError."""
        self._install(self.prepared, None)

    @property
    def conversation(self) -> Conversation:
        assert self._conversation is not None
        return self._conversation

    @property
    def has_model(self) -> bool:
        """Not before `load`, and not when the model could be built neither anew nor as it was."""
        return self._built is not None

    @property
    def template(self) -> ChatTemplate:
        return _template(self.prepared)

    @property
    def context(self) -> int:
        return context_length(self.prepared)

    def describe(self) -> str:
        prepared = self.prepared
        return describe_build(prepared.settings, prepared.device, prepared.dtype, prepared.plan)

    def remarks(self) -> list[str]:
        """What a person may not expect of the model as it is prepared now."""
        lines = self.prepared.remarks()
        if self.template.plain:
            lines.append(f"{self.prepared.name} was not made to converse: {self.template.origin}")
        elif self.template.origin != "its own":
            lines.append(f"chat format: {self.template.origin}")
        if self.system is not None and not self._uses_system(self.prepared, self.system):
            lines.append(f"the chat format of {self.prepared.name} leaves the system text out")
        return lines

    def rebuild(self, changes: Mapping[str, Any], *, without: Sequence[str] = ()) -> bool:
        """The model as it would be had it been started with these flags too, and `without` these variables of the
        environment; False when that is what there is.

        Everything is checked while the old model is there; then its memory is freed before the new one's weights are
        read. Raises UserError, and goes on with the old model, when that fails or Ctrl-C ends it.
        """
        assert self._built is not None
        asked = {**self._asked, **changes}
        environ = {name: value for name, value in self._environ.items() if name not in without}
        before, after = self.prepared, self._prepare(asked, environ)
        if _alike(before, after):
            self._asked, self._environ = asked, environ
            return False
        model = self._built.model if _same_weights(before, after) else None
        self._forget_engine()
        failure = None
        try:
            self._install(after, model)
        except UserError as error:
            failure = str(error)
        except KeyboardInterrupt:
            failure = "interrupted"
        if failure is not None:  # outside of the handlers, which keep alive what was loaded so far
            self._forget_engine()
            self._install(dataclasses.replace(before, ledger=Ledger()), model)
            raise UserError(f"{failure}; it goes on as before: {self.describe()}")
        self._asked, self._environ = asked, environ
        return True

    def renew_engine(self) -> None:
        """After a step that was broken off: the same weights, and a cache that is read anew."""
        assert self._built is not None
        prepared, model = self.prepared, self._built.model
        self._forget_engine()
        self._install(prepared, model)

    def _prepare(self, asked: Mapping[str, Any], environ: Mapping[str, str]) -> Prepared:
        prepared = prepare(build_settings(argparse.Namespace(**asked), environ, self._say_once))
        if self.system is not None:
            self._uses_system(prepared, self.system)  # a format that refuses one says so now
        return prepared

    def _install(self, prepared: Prepared, model: Any) -> None:
        if model is None:
            built = build(prepared)
        else:
            prepared.ledger.weight_bytes_per_token = self.prepared.ledger.weight_bytes_per_token
            built = Built(make_engine(prepared, model, context_length(prepared), cache_dir_or_say()), model, prepared)
        built.engine.prepare(_params(prepared, self.chosen, 0))
        self.prepared, self._built = prepared, built
        self._begin()

    def _begin(self) -> None:
        """A conversation that goes on from what was said."""
        assert self._built is not None
        tokenizer: Tokenizer | None = self.prepared.tokenizer
        assert tokenizer is not None
        self._conversation = Conversation(
            self._built.engine, self.template, tokenizer, system=self._system, messages=self._messages
        )
        self.reply = None

    def _forget_engine(self) -> None:
        """Free the engine's memory, and the weights' unless somebody holds them."""
        if self._conversation is not None:
            self._system, self._messages = self._conversation.system, self._conversation.messages
        self._conversation = self._built = None
        gc.collect()
        give_back_freed_memory()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._say(line)

    # ---- What is said ----

    @property
    def system(self) -> str | None:
        return self._system if self._conversation is None else self._conversation.system

    def set_system(self, text: str | None) -> bool:
        """False when the model's chat format leaves it out. Raises UserError when it refuses one."""
        used = text is None or self._uses_system(self.prepared, text)
        self.conversation.system = text
        return used

    def ask(self, text: str, on_drop: Callable[[int], None]) -> Generator[str, None, None]:
        """The answer, piece by piece; closing the iterator stops it there. Raises UserError."""
        yield from self._answered(self.conversation.ask(text, self._drawn(), on_drop))

    def retry(self, on_drop: Callable[[int], None]) -> Generator[str, None, None]:
        """Another answer in the place of the last. Raises UserError."""
        yield from self._answered(self.conversation.retry(self._drawn(), on_drop))

    def replace(self, system: str | None, messages: list[Message], chosen: Mapping[str, Any]) -> None:
        """Another conversation, with its settings, in the place of this one. Raises UserError and changes nothing."""
        if system is not None:
            self._uses_system(self.prepared, system)
        self._choose(chosen)
        self._system, self._messages = system, messages
        self._begin()

    def clear(self) -> None:
        """Forget what was said; the system text and the settings stay."""
        self.conversation.clear()
        self.reply = None

    def undo(self) -> str | None:
        """Forget the last exchange; what the person said in it."""
        self.reply = None
        return self.conversation.undo()

    def opens_thought(self) -> bool:
        """Whether the chat format itself begins an answer with a thought, so that "<think>" is not in its text."""
        ids = self.template.render([{"role": "user", "content": "x"}])
        assert self.prepared.tokenizer is not None
        return self.prepared.tokenizer.decode(ids[-8:]).rstrip().endswith("<think>")

    def _answered(self, pieces: Generator[str, None, None]) -> Generator[str, None, None]:
        self.reply = None
        try:
            yield from pieces
        finally:
            reply = self.conversation.reply
            self.reply = reply if reply is not None and reply.token_ids else None

    def _context_used(self) -> int:
        if self.reply is not None:
            return self.reply.context_used
        if not self.conversation.messages:
            return 0
        system: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        ids = self.template.render([*system, *self.conversation.messages], add_generation_prompt=False)
        return min(len(ids), self.context)

    @staticmethod
    def _uses_system(prepared: Prepared, text: str) -> bool:
        question: list[Message] = [{"role": "user", "content": "x"}]
        render = _template(prepared).render
        return render([{"role": "system", "content": text}, *question]) != render(question)

    # ---- How it is sampled ----

    def params(self) -> SamplingParams:
        """As the next answer is sampled; with a seed that is drawn anew each time, unless one was set."""
        return _params(self.prepared, self.chosen, secrets.randbits(32))

    def _drawn(self) -> SamplingParams:
        params = self.params()
        self.seed = params.seed
        template = self.template
        return dataclasses.replace(params, stop=(*params.stop, *template.stop))

    def set(self, name: str, text: str) -> None:
        """Choose a setting; "default" gives back the model's own. Raises UserError and changes nothing."""
        name = setting_name(name)
        chosen = {key: value for key, value in self.chosen.items() if key != name}
        if text != "default":
            chosen[name] = read_setting(name, text)
        self._choose(chosen)
        if self.params().temperature == 0 and name in chosen and name in WITHOUT_EFFECT:
            self._say(f"{name} is without effect: temperature 0 takes the likeliest token each time")

    def _choose(self, chosen: Mapping[str, Any]) -> None:
        params = _params(self.prepared, chosen, 0)
        self.chosen = dict(chosen)
        self.conversation.engine.prepare(params)  # what it takes is compiled now, not in an answer

    def facts(self) -> list[tuple[str, str]]:
        """What there is to know of the model and of the conversation, by name."""
        prepared, count = self.prepared, len(self.conversation.messages)
        return [
            ("model", prepared.name if prepared.path is None else f"{prepared.name}, {prepared.path}"),
            ("built", self.describe()),
            ("chat format", self.template.origin),
            ("context", f"{self._context_used():,} of {self.context:,} tokens used"),
            ("weights", f"{human_bytes(prepared.ledger.weight_bytes_per_token)} are read for a token"),
            ("messages", f"{count:,}"),
            ("system", "none" if self.system is None else shorten(self.system, 200)),
        ]


def _params(prepared: Prepared, chosen: Mapping[str, Any], seed: int) -> SamplingParams:
    return dataclasses.replace(prepared.sampling, **{"seed": seed, **chosen})


def _template(prepared: Prepared) -> ChatTemplate:
    assert prepared.template is not None
    return prepared.template


def _same_weights(a: Prepared, b: Prepared) -> bool:
    """Whether what one has loaded serves the other."""
    return (a.path, a.device.device, a.dtype.dtype, a.plan) == (b.path, b.device.device, b.dtype.dtype, b.plan)


def _alike(a: Prepared, b: Prepared) -> bool:
    """Whether building one would give the other."""
    kinds = [(p.settings.compile, p.settings.compile_prefill, context_length(p)) for p in (a, b)]
    return _same_weights(a, b) and kinds[0] == kinds[1]
