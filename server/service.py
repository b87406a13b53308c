"""Checked requests -> answers that are being made: prompts rendered and encoded, counted against the context, handed to
the worker. Knows models as tokenizer, template and engine; no HTTP.
"""

import hashlib
import json
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from config import __version__
from config.errors import UserError
from config.settings import SamplingParams
from generate.engine import Engine
from generate.sequence import RequestOutput
from model.chat_template import ChatTemplate
from model.tokenizer import Tokenizer
from server.answers import ChatChoice, Choice, Chunk, CompletionChoice, fold_chat, fold_completion
from server.errors import RequestError, context_exceeded, invalid
from server.guides import Grammars, Guide
from server.protocol import ChatRequest, CompletionRequest, Options, seeds
from server.tools import ToolParser, ToolTemplate
from server.worker import Ask, Job, Worker

DONE = b"data: [DONE]\n\n"
PACED_FROM = 16
PACE_S = 0.0002
"""With more answers in the making than PACED_FROM, so long for each of them passes before one is looked at again:
beyond some dozens, a thread's turn and a write for each token would take all of Python's time from the engine.
"""
NOTHING = RequestOutput(-1, "", (), "length")


@dataclass(frozen=True)
class Served:
    """The model that is served. sampling: what a request that says nothing gets. facts: what GET /v1/customization
    tells, JSON's types.
    """

    name: str
    engine: Engine
    tokenizer: Tokenizer
    template: ChatTemplate
    sampling: SamplingParams
    facts: Mapping[str, Any] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def context(self) -> int:
        return self.engine.cache.max_seq_len

    @cached_property
    def fingerprint(self) -> str:
        """The same for the same model, built the same way by the same version."""
        told = json.dumps([__version__, self.name, self.facts], sort_keys=True, default=str)
        return f"fp_{hashlib.sha256(told.encode()).hexdigest()[:12]}"


class TokenNames:
    """How tokens are shown: their text, or the spelling of special ones."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        spelled = ((tokenizer.special_id(piece), piece) for piece in tokenizer.special_pieces)
        self._special = {token: piece for token, piece in spelled if token is not None}

    def name(self, token: int) -> str:
        return self._special.get(token) or self._tokenizer.decode_bytes((token,)).decode(errors="replace")

    def name_bytes(self, token: int) -> bytes:
        return self._special[token].encode() if token in self._special else self._tokenizer.decode_bytes((token,))


class Service:
    """Answers requests with one model. Threads may share it."""

    def __init__(self, served: Served, worker: Worker) -> None:
        self.served, self.worker = served, worker
        self._names = TokenNames(served.tokenizer)
        self._tools = ToolTemplate(served.template, served.tokenizer)
        self._grammars = Grammars(served.tokenizer, served.engine.vocab_size, served.engine.eos_ids)

    def chat(self, request: ChatRequest) -> "Answer":
        """Raises RequestError."""
        options, tools = request.options, request.tools
        template, tokenizer = self.served.template, self.served.tokenizer
        allowed = [tool for tool in tools if not request.required or tool["function"]["name"] in request.required]
        try:
            ids = self._tools.render(request.messages, tools, request.variables)
            if request.required and (opening := self._tools.format.opening):
                ids = [*ids, *tokenizer.encode_parts(tokenizer.split_specials(f"{opening}\n"))]
        except UserError as error:
            raise invalid("messages", str(error)) from None
        params = _with_stops(options.params, template.stop)
        self._check_biases(params)
        self._check_length(ids, options.params.max_new_tokens, "messages")
        schema, param = options.schema, "response_format"
        if request.required:
            schema, param = self._tools.format.schema(allowed), "tools"
        choices: list[Choice] = []
        asks = []
        prompt = tuple(ids)
        for index, one in enumerate(seeds(params, options.n)):
            guide = None if schema is None else self._grammars.guide(schema, param)
            asks.append(Ask(prompt, one, new_text=True, guide=guide))
            parser = None
            if tools:
                parser = ToolParser(
                    self._tools.format, tools, tokenizer, forced=bool(request.required), parallel=request.parallel
                )
            choices.append(ChatChoice(index, self._names, self._ends(params), parser))
        return Answer(self, "chat", options, choices, asks, len(prompt))

    def complete(self, request: CompletionRequest) -> "Answer":
        """Raises RequestError."""
        options = request.options
        self._check_biases(options.params)
        choices: list[Choice] = []
        asks = []
        total = 0
        for prompt in request.prompts:
            ids = self.encode(prompt)
            total += len(ids)
            nothing = request.echo and options.params.max_new_tokens is None
            self._check_length(ids, options.params.max_new_tokens, "prompt")
            text = ""
            if request.echo:
                text = prompt if isinstance(prompt, str) else self.served.tokenizer.decode(ids)
            for params in seeds(options.params, options.n):
                guide = None if options.schema is None else self._grammars.guide(options.schema, "response_format")
                choices.append(CompletionChoice(len(choices), self._names, self._ends(params), text))
                if not nothing:
                    asks.append(Ask(tuple(ids), params, new_text=prompt == "", guide=guide))
        return Answer(self, "completion", options, choices, asks, total)

    def encode(self, prompt: str | list[int]) -> list[int]:
        """Raises RequestError for tokens that are none and texts that cannot be encoded."""
        tokenizer, vocab_size = self.served.tokenizer, self.served.engine.vocab_size
        if isinstance(prompt, list):
            if max(prompt) >= vocab_size:
                raise invalid("prompt", f"'prompt' has a token that is not among the model's {vocab_size}")
            return prompt
        try:
            ids = tokenizer.encode(prompt, bos=tokenizer.add_bos or not prompt)
        except UserError as error:
            raise invalid("prompt", str(error)) from None
        if not ids:
            raise invalid("prompt", "'prompt' is empty, and the model has no token that begins a text")
        return ids

    def decode(self, tokens: list[int]) -> str:
        """Raises RequestError for a token that is none."""
        try:
            return self.served.tokenizer.decode(tokens)
        except UserError as error:
            raise invalid("tokens", str(error)) from None

    def render(self, given: Mapping[str, Any]) -> list[int]:
        """The tokens that the fields of /tokenize ask for. Raises RequestError."""
        tokenizer = self.served.tokenizer
        try:
            if "messages" in given:
                variables = given.get("chat_template_kwargs")
                if not given.get("add_generation_prompt", True):
                    return self.served.template.render(
                        given["messages"], False, tools=given["tools"] or None, variables=variables
                    )
                return self._tools.render(given["messages"], given["tools"], variables)
            return tokenizer.encode(given["prompt"], bos=tokenizer.add_bos and given.get("add_special_tokens", True))
        except UserError as error:
            raise invalid("messages" if "messages" in given else "prompt", str(error)) from None

    def _ends(self, params: SamplingParams) -> frozenset[int]:
        """The tokens that end an answer and are no part of it."""
        return frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.served.engine.eos_ids)

    def _check_length(self, prompt: list[int], wanted: int | None, param: str) -> None:
        if len(prompt) + (wanted or 1) > self.served.context:
            raise context_exceeded(len(prompt), wanted, self.served.context, param)

    def _check_biases(self, params: SamplingParams) -> None:
        vocab_size = self.served.engine.vocab_size
        for token, _ in params.logit_bias:
            if token >= vocab_size:
                why = f"'logit_bias' has token {token}, which is not among the model's {vocab_size}"
                raise invalid("logit_bias", why)


class Answer:
    """One request's answer, while it is made: chunks as they come, or the whole of them."""

    def __init__(
        self, service: Service, kind: str, options: Options, choices: list[Choice], asks: list[Ask], prompt_tokens: int
    ) -> None:
        self.options = options
        self._worker, self._kind, self._choices = service.worker, kind, choices
        self._job = Job(asks)
        self._prompt_tokens, self._cached = prompt_tokens, 0
        self.tokens = 0
        streamed = ".chunk" if kind == "chat" and options.stream else ""
        self._head = {
            "id": f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{secrets.token_hex(16)}",
            "object": f"chat.completion{streamed}" if kind == "chat" else "text_completion",
            "created": int(time.time()),
            "model": service.served.name,
            "system_fingerprint": service.served.fingerprint,
        }
        self._opening = json.dumps(self._head, separators=(",", ":"))[:-1]

    def begin(self) -> None:
        """Hand it to the engine. Raises RequestError when that takes nothing."""
        if self._job.asks:
            self._worker.submit(self._job)

    def close(self) -> None:
        """Nobody wants it any more, or it is done."""
        if not self._job.is_over:
            self._worker.cancel(self._job)

    def whole(self) -> dict[str, Any]:
        """The answer as one document. Raises RequestError and Cancelled."""
        fold = fold_chat if self._kind == "chat" else fold_completion
        choices = fold(self._in_pace(self._chunks()), len(self._choices))
        return {**self._head, "choices": choices, "usage": self._usage()}

    def events(self) -> Iterator[bytes]:
        """The answer as server-sent events. Waits for the first, until when it raises RequestError and Cancelled; what
        fails later is an event too.
        """
        chunks = self._chunks()
        first = next(chunks, None)
        return self._events(first, chunks)

    def _events(self, first: Chunk | None, chunks: Iterator[Chunk]) -> Iterator[bytes]:
        more = {"usage": None} if self.options.include_usage else {}
        unsent = []
        try:
            if first is not None:
                yield self._event({"choices": [first], **more})
            for chunk in chunks:
                unsent.append(self._event({"choices": [chunk], **more}))
                if not self._job.has_more:
                    yield b"".join(unsent)
                    unsent = []
                    self._rest()
            if self.options.include_usage:
                unsent.append(self._event({"choices": [], "usage": self._usage()}))
        except RequestError as error:
            unsent.append(f"data: {json.dumps(error.body())}\n\n".encode())
        yield b"".join((*unsent, DONE))

    def _in_pace(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        for chunk in chunks:
            yield chunk
            if not self._job.has_more:
                self._rest()

    def _rest(self) -> None:
        """Let a few steps pass where there are many answers."""
        if (running := self._worker.running) > PACED_FROM:
            time.sleep(PACE_S * running)

    def _event(self, document: dict[str, Any]) -> bytes:
        return f"data: {self._opening},{json.dumps(document, separators=(',', ':'))[1:]}\n\n".encode()

    def _chunks(self) -> Iterator[Chunk]:
        if not self._job.asks:  # nothing but the prompt was asked for
            for choice in self._choices:
                yield from choice.push(NOTHING)
        counted: set[int] = set()
        for piece in self._job.pieces():
            self.tokens += len(piece.output.token_ids)
            prompt = piece.index // self.options.n
            if prompt not in counted and piece.index % self.options.n == 0:
                counted.add(prompt)
                self._cached += piece.reused
            yield from self._choices[piece.index].push(piece.output)
            guide = self._job.asks[piece.index].guide
            if piece.output.finish_reason is not None and isinstance(guide, Guide) and guide.failed:
                raise RequestError(500, "the format became too complex to hold to", code="grammar_failure")

    def _usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self.tokens,
            "total_tokens": self._prompt_tokens + self.tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached},
        }


def _with_stops(params: SamplingParams, stops: tuple[str, ...]) -> SamplingParams:
    return replace(params, stop=(*params.stop, *stops)) if stops else params
