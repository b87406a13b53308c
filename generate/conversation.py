"""A conversation with an engine, turn by turn: what was said before is not read again, and when the context is full its
oldest part is left out. Knows messages and tokens; neither how messages are written for a model nor who shows them.
"""

import time
from collections.abc import Callable, Generator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from config.errors import UserError
from config.settings import SamplingParams
from generate.detokenizer import Detokenizer
from generate.engine import Engine, TokenBytes
from generate.sequence import FinishReason, RequestOutput

Message = dict[str, str]
"""{"role": "user", "assistant" or "system", "content": text}."""
OnDrop = Callable[[int], None]
"""Told how many of the oldest messages the model no longer sees, beside those that it was told of before."""

ROOM = 4
"""One part of so many of the context is left for an answer, if old messages can make way for it."""


class Encoder(Protocol):
    """What writes messages as a prompt: a chat template."""

    def render(self, messages: SequenceOf[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[int]: ...


@dataclass
class Reply:
    """An answer, while it is made and afterwards."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    """Of the whole conversation as the model saw it."""
    reused_tokens: int = 0
    """Of these, those that were in the cache and not read again."""
    finish_reason: FinishReason | None = None
    dropped: int = 0
    """Messages that the model does not see any more."""
    first_token_s: float | None = None
    seconds: float = 0.0
    context_used: int = 0


class Conversation:
    """Messages, and answers to them. One at a time; the engine is not used for anything else meanwhile."""

    def __init__(
        self,
        engine: Engine,
        template: Encoder,
        tokenizer: TokenBytes,
        *,
        system: str | None = None,
        messages: SequenceOf[Message] = (),
    ) -> None:
        self.engine, self.template, self.tokenizer = engine, template, tokenizer
        self.system = system
        self.messages = [dict(message) for message in messages]
        self.reply: Reply | None = None
        self._left_out = 0
        self._read: tuple[int, ...] = ()
        """What the model read and said last, in the very tokens."""

    def ask(self, text: str, params: SamplingParams, on_drop: OnDrop | None = None) -> Generator[str, None, None]:
        """The answer to a message, piece by piece; the first may be empty, while the prompt is read. Closing the
        iterator stops the answer and keeps what there is; one that has not begun takes the message with it. Raises
        UserError for a message that does not fit.
        """
        self.messages.append({"role": "user", "content": text})
        answered = False
        try:
            yield from self._answer(params, on_drop)
        finally:
            answered = self.messages[-1]["role"] == "assistant"
            if not answered:
                self.messages.pop()

    def retry(self, params: SamplingParams, on_drop: OnDrop | None = None) -> Generator[str, None, None]:
        """Another answer in the place of the last, which stays if the new one does not begin. Raises UserError."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise UserError("there is no answer yet that could be given again")
        last = self.messages.pop()
        try:
            yield from self._answer(params, on_drop)
        finally:
            if self.messages[-1]["role"] != "assistant":
                self.messages.append(last)

    def undo(self) -> str | None:
        """Forget the last exchange; the user's words in it, None if there is none."""
        for at in reversed(range(len(self.messages))):
            if self.messages[at]["role"] == "user":
                text = self.messages[at]["content"]
                del self.messages[at:]
                return text
        return None

    def clear(self) -> None:
        """Forget all that was said; the system text stays."""
        self.messages.clear()

    def _answer(self, params: SamplingParams, on_drop: OnDrop | None) -> Generator[str, None, None]:
        reply = self.reply = Reply()
        began = time.perf_counter()
        answer = _Answer(self.tokenizer, params, reply)
        context = self.engine.cache.max_seq_len
        try:
            while reply.finish_reason is None:
                # Later rounds go on with an answer that reached the end of the context.
                prompt = self._prompt(reply, params, on_drop)
                if prompt is None:
                    reply.finish_reason = "length"
                    break
                left = None if params.max_new_tokens is None else params.max_new_tokens - len(reply.token_ids)
                sequence = self.engine.add(prompt, replace(params, stop=(), max_new_tokens=left))
                try:
                    while not sequence.finished and not answer.stopped:
                        outputs = self.engine.step()
                        if not outputs:
                            yield ""  # a part of the prompt was read: whoever wants to stop can
                        for output in outputs:
                            if output.seq_id != sequence.seq_id or answer.stopped:
                                continue
                            if reply.first_token_s is None:
                                reply.first_token_s = time.perf_counter() - began
                                reply.prompt_tokens, reply.reused_tokens = len(prompt), sequence.num_reused
                            cut = output.finish_reason == "length" and sequence.max_new_tokens != left
                            text = answer.take(output, last=output.finish_reason is not None and not cut)
                            reply.seconds = time.perf_counter() - began
                            reply.context_used = min(context, len(prompt) + len(sequence.token_ids))
                            if text:
                                yield text
                finally:
                    self.engine.cancel(sequence)
                    self._read = (*prompt, *sequence.token_ids)
            if text := answer.end():
                yield text
        finally:
            if reply.finish_reason is None:
                reply.finish_reason = "abort"
            if reply.token_ids:
                self.messages.append({"role": "assistant", "content": reply.text})

    def _prompt(self, reply: Reply, params: SamplingParams, on_drop: OnDrop | None) -> list[int] | None:
        """What the model reads next: the conversation, and the answer as far as it is there. Leaves out as many of the
        oldest messages as must be; None if an answer that has begun cannot go on.
        """
        context = self.engine.cache.max_seq_len
        wanted = context // ROOM
        if params.max_new_tokens is not None:
            wanted = min(wanted, params.max_new_tokens - len(reply.token_ids))
        before = self._left_out = min(self._left_out, self._last_exchange())
        prompt = self._rendered(reply)
        while len(prompt) + wanted > context and self._left_out < self._last_exchange():
            # A template may want its first message to be the user's: exchanges go as wholes.
            self._left_out += 1
            while self._left_out < self._last_exchange() and self.messages[self._left_out]["role"] != "user":
                self._left_out += 1
            prompt = self._rendered(reply)
        reply.dropped = self._left_out
        if self._left_out > before and on_drop is not None:
            on_drop(self._left_out - before)
        if len(prompt) >= context:
            if reply.token_ids:
                return None
            raise UserError(
                f"the message has {len(prompt)} tokens with what stands around it, and the context holds {context}, of "
                "which the answer needs at least one: shorten it, or make --max-seq-len larger"
            )
        return prompt

    def _last_exchange(self) -> int:
        """Where the exchange begins that is answered now."""
        return len(self.messages) - 1

    def _rendered(self, reply: Reply) -> list[int]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        rendered = self.template.render([*system, *self.messages[self._left_out :]])
        return [*spliced(self._read, rendered, self.tokenizer), *reply.token_ids]


class _Answer:
    """Puts the text of an answer together out of tokens, across the rounds that it takes."""

    def __init__(self, tokenizer: TokenBytes, params: SamplingParams, reply: Reply) -> None:
        self._tokenizer, self._reply = tokenizer, reply
        self._detokenizer = Detokenizer(params.stop)
        self._begun = False

    @property
    def stopped(self) -> bool:
        return self._detokenizer.stopped

    def take(self, output: RequestOutput, *, last: bool) -> str:
        """The text that a step's token makes certain. last: the answer ends with it."""
        self._reply.token_ids.extend(output.token_ids)
        text = ""
        if output.finish_reason != "stop":  # else the token is the end, which has no text
            data = self._tokenizer.decode_bytes(output.token_ids)
            if data and not self._begun:  # without the space that stands before a first word
                data, self._begun = self._tokenizer.decode_bytes(output.token_ids, start=True), True
            text = self._detokenizer.push(data)
        if self.stopped:
            self._reply.finish_reason = "stop"
        elif last:
            self._reply.finish_reason = output.finish_reason
        self._reply.text += text
        return text

    def end(self) -> str:
        """What was held back."""
        text = self._detokenizer.finish()
        self._reply.text += text
        return text


def spliced(read: SequenceOf[int], wanted: list[int], tokenizer: TokenBytes) -> list[int]:
    """`wanted`, but with the tokens that were read last where they are the same text cut differently, as what a model
    says may be cut otherwise than the tokenizer cuts it. So they need not be read again.
    """
    same = next((at for at, (a, b) in enumerate(zip(read, wanted, strict=False)) if a != b), None)
    if same is None:
        return wanted
    # Up to the first token without bytes on either side, which is a special one.
    ours = _text(read[same:], tokenizer)
    theirs = _text(wanted[same:], tokenizer)
    if b"".join(ours) != b"".join(theirs) or not ours:
        return wanted
    return [*read[: same + len(ours)], *wanted[same + len(theirs) :]]


def _text(ids: SequenceOf[int], tokenizer: TokenBytes) -> list[bytes]:
    """The bytes of each of the first tokens that have any."""
    pieces: list[bytes] = []
    for token in ids:
        data = tokenizer.decode_bytes((token,))
        if not data:
            break
        pieces.append(data)
    return pieces
